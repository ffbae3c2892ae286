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


@contextlib.contextmanager
def interruptions_noted(device: torch.device) -> Iterator[Callable[[], None]]:
    """Within the block, SIGINT to a process of a group is written down and interrupts nothing.

    A process by itself is interrupted as always.

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
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    def look() -> None:
        # Of a process that works alone it is the identity.
        if all_reduce(torch.tensor([float(bool(noted))], device=device)).item():
            raise InterruptedTogether

    before = signal.signal(signal.SIGINT, note)
    try:
        yield look
    finally:
        # A terminal interrupts the ranks, and their parent does so again: once is enough.
        signal.signal(signal.SIGINT, signal.SIG_IGN if noted else before)
