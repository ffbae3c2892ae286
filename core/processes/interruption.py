"""Ctrl-C in several processes: all of them stop at the same point of their common work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

from core.processes.distributed import all_reduce


class InterruptedTogether(KeyboardInterrupt):
    """Every process of the group is interrupted, and at the same point."""


class _Noted:
    """A handler of SIGINT that writes it down.

    Args:
        device: Of the group's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.came = device, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def stop_if_came(self) -> None:
        # Of a process that works alone the sum is the identity.
        if all_reduce(torch.tensor([float(self.came)], device=self.device)).item():
            raise InterruptedTogether


@contextlib.contextmanager
def interruptions_noted(device: torch.device) -> Iterator[Callable[[], None]]:
    """Within the block, SIGINT to a process of a group is written down and interrupts nothing.

    A process by itself is interrupted as always. A block within a block shares its notes.

    Args:
        device: Of the group's tensors.

    Yields:
        A function for all processes to call at the same point: it raises `InterruptedTogether`
        in each if one of them got the signal.
    """
    group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not group or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)
    if isinstance(before, _Noted):
        yield before.stop_if_came
        return
    noted = _Noted(device)
    signal.signal(signal.SIGINT, noted)
    try:
        yield noted.stop_if_came
    finally:
        # A terminal interrupts the ranks, and their parent does so again: once is enough.
        signal.signal(signal.SIGINT, signal.SIG_IGN if noted.came else before)
