"""Processes, seeds, shards and exact reductions, the same on one process and on many.

Every collective here is the identity on a single process, so that callers are
written once. `core.processes.launch` starts the processes.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from core.launch_arguments import DEFAULT_TIMEOUT
from core.processes.shared_memory import SharedMemory, connect


@dataclass(frozen=True)
class Process:
    """This process among its peers.

    Attributes:
        rank: Index of this process over all nodes.
        world_size: Number of processes over all nodes.
        device: Device that this process computes on.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes (rank 0)."""
        return self.rank == 0


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device) with `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """One 64-bit seed from several integers, well mixed and the same everywhere."""
    return int(np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, "u8")[0])


_ALONE: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block this process works by itself: every collective is the identity."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_size() -> int:
    """Number of processes in the group; 1 where there is none."""
    if _ALONE.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in the group; 0 where there is none."""
    if _ALONE.get():
        return 0
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shard_sizes(n: int, parts: int) -> list[int]:
    """Split `n` samples over `parts` processes as evenly as possible, larger shards first.

    Example:
        >>> shard_sizes(7, 3)
        [3, 2, 2]
    """
    small, extra = divmod(n, parts)
    return [small + (part < extra) for part in range(parts)]


def shard_slice(sizes: Sequence[int], part: int) -> slice:
    """The slice of a whole batch that belongs to shard `part`."""
    start = sum(sizes[:part])
    return slice(start, start + sizes[part])


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes in place (no gradient) and return it."""
    if world_size() == 1:
        return tensor
    shared = _shared_memory(tensor)
    if shared is None or not shared.all_reduce(tensor):
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Concatenate the shards (n_r x ...) of every process along the first dimension.

    Args:
        rows: This process's shard; `sizes[rank]` rows.
        sizes: Rows of every shard, the same on every process; they may differ.

    Returns:
        All rows, in the order of ranks, on every process.
    """
    if world_size() == 1:
        return rows
    shared = _shared_memory(rows)
    if shared is not None:
        whole = shared.all_gather_rows(rows, sizes)
        if whole is not None:
            return whole
    # NCCL and gloo gather equal shapes only; pad to the largest shard.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


# Seconds that the processes of a group wait for each other.
_TIMEOUTS: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


def join_group(backend: str, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
    """Become a process of the group.

    Args:
        backend: "nccl" or "gloo".
        store: Where the processes meet.
        rank: Index of this process.
        world_size: Number of processes.
        timeout: Seconds that one waits for another.
    """
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    _TIMEOUTS[dist.group.WORLD] = timeout


# What the processes of a group share, for as long as the group is there.
_CONNECTED: weakref.WeakKeyDictionary[Any, SharedMemory | None] = weakref.WeakKeyDictionary()


def _shared_memory(tensor: torch.Tensor) -> SharedMemory | None:
    """What to send a tensor through, if not torch.distributed; a collective operation."""
    if tensor.device.type != "cpu" or dist.get_backend() != "gloo":
        return None
    if torch.compiler.is_compiling():
        # A compiler would take the others' values for constants.
        return None
    group = dist.group.WORLD
    if group not in _CONNECTED:
        _CONNECTED[group] = connect(_TIMEOUTS.get(group, DEFAULT_TIMEOUT))
    return _CONNECTED[group]


def broadcast_object(value: Any) -> Any:
    """Send rank 0's plain value to every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
