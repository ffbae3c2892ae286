"""Sums over the processes of one machine, through memory that all of them map.

gloo sends everything through sockets. A process that waits for one sleeps, and is woken at the
scheduler's leisure: most small sums take 0.1 to 0.4 ms so, and some several ms, longer than the
layer whose BatchNorm waits for them. Here every process writes into memory of its own, the
others read it there, and who waits looks at counters without falling asleep.

For processes whose stores others see in the order they were made (x86), and that can open each
other's memory (Linux, one machine, one user). `connect` finds out, and all processes come to
the same answer; elsewhere torch.distributed does the work.

The memory has no name: it is gone with the last process that maps it, however that ended.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_TOKEN_BYTES = 16
# Before the values: the token, and from the second cache line on the counters.
_HEADER_BYTES, _COUNTERS_AT, _COUNTERS_END = 4096, 64, 128
# Of a process: how many times it has written its values, summed its part of them, and read what
# it wanted of the others'; and the bytes it wrote last.
_WRITTEN, _SUMMED, _READ, _BYTES = range(4)
# Below, every process sums everything itself: meeting twice takes longer.
_SUMMED_BY_ALL_BYTES = 1 << 16
_FIRST_CAPACITY = 1 << 16
# Seconds until a waiting process naps between looks; of a nap; between looks for the living.
_PATIENCE, _NAP, _LOOK_EVERY = 0.05, 1e-4, 1.0


class PeerLostError(RuntimeError):
    """Another process of the group ended, or does not come."""


@dataclass(frozen=True)
class _Address:
    """Where other processes find a segment.

    Attributes:
        path: Path of the file that is mapped.
        token: What it begins with. On another machine the path may lead to something else.
        size: Bytes of values.
    """

    path: str
    token: bytes
    size: int


class _Segment:
    """Memory that a process shares.

    Args:
        file: Open file descriptor.
        size: Bytes of values.

    Attributes:
        counters: Integers of 64 bits.
        values: Size of the mapped memory in bytes.
    """

    def __init__(self, file: int, size: int) -> None:
        mapped = mmap.mmap(file, _HEADER_BYTES + size)
        self._header = memoryview(mapped)
        self.counters = self._header[_COUNTERS_AT:_COUNTERS_END].cast("q")
        self.values = torch.frombuffer(mapped, dtype=torch.uint8, offset=_HEADER_BYTES)

    @property
    def token(self) -> bytes:
        """What it begins with."""
        return bytes(self._header[:_TOKEN_BYTES])

    @token.setter
    def token(self, token: bytes) -> None:
        self._header[:_TOKEN_BYTES] = token


class _OwnSegment(_Segment):
    """Memory of this process; others can open it until `close`.

    Raises:
        OSError: There is none.
    """

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create("gradients")
        try:
            os.ftruncate(self._file, _HEADER_BYTES + size)
            super().__init__(self._file, size)
        except OSError:
            self.close()
            raise
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = _Address(f"/proc/{os.getpid()}/fd/{self._file}", self.token, size)

    def close(self) -> None:
        """Who has opened it keeps it."""
        os.close(self._file)


def _opened(address: _Address) -> _Segment:
    """Another process's memory.

    Raises:
        OSError: It is out of reach.
    """
    file = os.open(address.path, os.O_RDWR)
    try:
        if os.fstat(file).st_size != _HEADER_BYTES + address.size:
            raise FileNotFoundError(f"{address.path} is something else")
        segment = _Segment(file, address.size)
    finally:
        os.close(file)
    if segment.token != address.token:
        raise FileNotFoundError(f"{address.path} is another process's")
    return segment


def connect(timeout: float) -> SharedMemory | None:
    """The shared memory of all processes; None where one of them cannot join.

    A collective operation.

    Args:
        timeout: Seconds to wait for another process.
    """
    shared = SharedMemory(timeout)
    return shared if shared.grow(_FIRST_CAPACITY) else None


def _can_share() -> bool:
    in_order = platform.machine().lower() in ("x86_64", "amd64")
    return in_order and sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedMemory:
    """Collective operations of processes on one machine; use `connect`.

    Every process must call the same ones in the same order, from one thread. Values are added
    in the order of ranks, on every process the same.

    Args:
        timeout: Seconds to wait for another process.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._others = [r for r in range(self._size) if r != self._rank]
        self._mine: _OwnSegment | None = None
        self._addresses: list[_Address] = []
        self._capacity = 0
        # So many bytes were refused before.
        self._too_many = math.inf

    def grow(self, capacity: int) -> bool:
        """Make room for so many bytes of each process; False if one cannot, and then none has.

        A collective operation.
        """
        mine = _allocated(capacity) if _can_share() else None
        addresses = self._told(None if mine is None else mine.address)
        segments = None if None in addresses or mine is None else self._open(addresses, mine)
        if not all(self._told(segments is not None)):
            if mine is not None:
                mine.close()
            return False
        assert segments is not None
        if self._mine is not None:
            self._mine.close()
        self._mine, self._addresses, self._capacity = mine, addresses, capacity
        self._counters = [segment.counters for segment in segments]
        self._values = [segment.values for segment in segments]
        return True

    def _told(self, value: Any) -> list[Any]:
        """What every process says."""
        answers: list[Any] = [None] * self._size
        dist.all_gather_object(answers, value)
        return answers

    def _open(self, addresses: Sequence[_Address], mine: _OwnSegment) -> list[_Segment] | None:
        try:
            return [
                mine if rank == self._rank else _opened(address)
                for rank, address in enumerate(addresses)
            ]
        except OSError:
            return None

    @torch.no_grad()
    def all_reduce(self, tensor: torch.Tensor) -> bool:
        """Sum a contiguous tensor over all processes in place; False if there is no room."""
        flat = tensor.view(-1)
        slots = self._write(flat, flat.numel())
        if slots is None:
            return False
        if flat.numel() * flat.element_size() <= _SUMMED_BY_ALL_BYTES:
            _sum(slots, flat)
        else:
            self._sum_in_parts(slots, flat)
        self._done_reading()
        return True

    def _sum_in_parts(self, slots: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
        """Every process sums a part, and takes the others' sums."""
        part = -(-flat.numel() // self._size)
        parts = [slice(rank * part, (rank + 1) * part) for rank in range(self._size)]
        own = parts[self._rank]
        _sum([slot[own] for slot in slots], flat[own])
        # Nobody else reads this part of this slot before.
        slots[self._rank][own].copy_(flat[own])
        self._meet(_SUMMED)
        for rank in self._others:
            flat[parts[rank]].copy_(slots[rank][parts[rank]])

    @torch.no_grad()
    def all_gather_rows(self, rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
        """The rows (n_r x ...) of all processes; None if there is no room."""
        width = math.prod(rows.shape[1:])
        slots = self._write(rows.reshape(-1), max(sizes) * width)
        if slots is None:
            return None
        parts = [slot[: n * width] for slot, n in zip(slots, sizes, strict=True)]
        whole = torch.cat(parts).view(sum(sizes), *rows.shape[1:])
        self._done_reading()
        return whole

    def _write(self, flat: torch.Tensor, most: int) -> list[torch.Tensor] | None:
        """Show this process's values; the values of all, at most so many, once they are there."""
        n_bytes = most * flat.element_size()
        if not self._has_room(n_bytes):
            return None
        mine = self._counters[self._rank]
        # What was written before must have been read.
        self._wait(_READ, mine[_READ])
        slots = [values[:n_bytes].view(flat.dtype) for values in self._values]
        slots[self._rank][: flat.numel()].copy_(flat)
        mine[_BYTES] = n_bytes
        self._meet(_WRITTEN)
        if any(counters[_BYTES] != n_bytes for counters in self._counters):
            raise RuntimeError("processes are in different collective operations")
        return slots

    def _has_room(self, n_bytes: int) -> bool:
        if n_bytes <= self._capacity:
            return True
        if n_bytes < self._too_many and self.grow(n_bytes):
            return True
        self._too_many = min(self._too_many, n_bytes)
        return False

    def _done_reading(self) -> None:
        self._counters[self._rank][_READ] += 1

    def _meet(self, counter: int) -> None:
        """Say that this process has come to a point, and wait until all have."""
        mine = self._counters[self._rank]
        mine[counter] += 1
        self._wait(counter, mine[counter])

    def _wait(self, counter: int, value: int) -> None:
        for rank in self._others:
            if self._counters[rank][counter] < value:
                self._wait_for(rank, counter, value)

    def _wait_for(self, rank: int, counter: int, value: int) -> None:
        counters = self._counters[rank]
        begun = time.monotonic()
        looked = begun
        while counters[counter] < value:
            now = time.monotonic()
            if now - begun < _PATIENCE:
                # Others get the processor, if there are any.
                os.sched_yield()
                continue
            time.sleep(_NAP)
            if now - looked > _LOOK_EVERY:
                looked = now
                self._look_for(rank, now - begun)

    def _look_for(self, rank: int, waited: float) -> None:
        if not os.path.exists(self._addresses[rank].path):
            raise PeerLostError(f"rank {rank} has ended, and rank {self._rank} waits for it")
        if waited > self._timeout:
            raise PeerLostError(f"rank {self._rank} has waited {waited:.0f} s for rank {rank}")


def _allocated(capacity: int) -> _OwnSegment | None:
    try:
        return _OwnSegment(capacity)
    except OSError:
        return None


def _sum(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    torch.add(tensors[0], tensors[1], out=out)
    for tensor in tensors[2:]:
        out.add_(tensor)
