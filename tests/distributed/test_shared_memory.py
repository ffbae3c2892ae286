"""Sums and gathers through shared memory, against gloo's sockets."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from core.errors import RankError
from core.launch_arguments import LaunchSettings, add_launch_arguments
from core.processes import distributed, ranks, shared_memory
from core.processes.distributed import Process
from core.processes.launch import launch

Work = Callable[[Process, argparse.Namespace], Any]
# Of one value, of a table of BatchNorm, above what everyone sums alone, and far above.
SIZES = (1, 515, 70_001, 1_000_003)
SHARDS = ([1, 1, 1], [4, 0, 3], [0, 0, 30_000])


def run(work: Work, processes: int, out: Path) -> list[Any]:
    """What every process left."""
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    flags = ["--cpu", "--multiprocessing-distributed", "--dist-url", "tcp://127.0.0.1:0"]
    args = parser.parse_args([*flags, "--nproc-per-node", str(processes)])
    args.out, args.work = str(out), work
    launch(left_by, LaunchSettings.from_arguments(args), args)
    return [torch.load(out / f"{rank}.pt") for rank in range(processes)]


def left_by(process: Process, args: argparse.Namespace) -> None:
    torch.save(args.work(process, args), Path(args.out) / f"{process.rank}.pt")


def values(size: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size + rank)
    return (10 * torch.randn(size, generator=generator)).to(dtype)


def sums(process: Process, args: argparse.Namespace) -> dict[str, tuple[torch.Tensor, ...]]:
    found = {}
    with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("through a socket")):
        for dtype in (torch.float32, torch.float64, torch.int64):
            for size in SIZES:
                ours = distributed.all_reduce(values(size, process.rank, dtype))
                found[f"{dtype} {size}"] = [ours]
    for dtype in (torch.float32, torch.float64, torch.int64):
        for size in SIZES:
            theirs = values(size, process.rank, dtype)
            dist.all_reduce(theirs)
            found[f"{dtype} {size}"].append(theirs)
    return found


@pytest.mark.parametrize("processes", [2, 3])
def test_sums_are_those_of_gloo(processes: int, tmp_path: Path) -> None:
    found = run(sums, processes, tmp_path)
    assert len(found[0]) == 3 * len(SIZES)
    for name, (ours, theirs) in found[0].items():
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
        for other in found[1:]:
            assert torch.equal(other[name][0], ours)


def gathers(process: Process, args: argparse.Namespace) -> list[torch.Tensor]:
    found = []
    with mock.patch.object(dist, "all_gather", side_effect=AssertionError("through a socket")):
        for sizes in SHARDS:
            rows = torch.full((sizes[process.rank], 2, 3), float(process.rank))
            found.append(distributed.all_gather_rows(rows, sizes))
            # The next sum must not overtake who still reads.
            found.append(distributed.all_reduce(torch.ones(6)))
    return found


def test_rows_of_unequal_shards_are_gathered_in_order(tmp_path: Path) -> None:
    for found in run(gathers, 3, tmp_path):
        for whole, ones, sizes in zip(found[::2], found[1::2], SHARDS, strict=True):
            ranks = torch.arange(3.0).repeat_interleave(torch.tensor(sizes))
            assert torch.equal(whole, ranks.view(-1, 1, 1).expand(-1, 2, 3))
            assert torch.equal(ones, torch.full((6,), 3.0))


def hurried(process: Process, args: argparse.Namespace) -> torch.Tensor:
    total = torch.zeros(300)
    for turn in range(2000):
        if turn % 97 == process.rank:
            time.sleep(1e-3)
        total += distributed.all_reduce(torch.full((300,), float(turn)))
    return total


def test_many_sums_in_a_row_do_not_mix(tmp_path: Path) -> None:
    for total in run(hurried, 3, tmp_path):
        assert torch.equal(total, torch.full((300,), 3.0 * sum(range(2000))))


def one_cannot(process: Process, args: argparse.Namespace) -> list[Any]:
    can = process.rank != 1
    with mock.patch.object(shared_memory, "_can_share", return_value=can):
        whole = distributed.all_reduce(torch.ones(3))
        rows = distributed.all_gather_rows(torch.ones(process.rank, 2), [0, 1, 2])
    return [whole, rows, distributed._shared_memory(whole) is None]


def test_where_one_process_cannot_share_none_does(tmp_path: Path) -> None:
    for whole, rows, sockets in run(one_cannot, 3, tmp_path):
        assert torch.equal(whole, torch.full((3,), 3.0))
        assert torch.equal(rows, torch.ones(3, 2))
        assert sockets


def no_room(process: Process, args: argparse.Namespace) -> list[torch.Tensor]:
    small = distributed.all_reduce(torch.ones(3))
    full = process.rank == 0
    kind = mock.patch.object(shared_memory, "_OwnSegment", side_effect=OSError("no space left"))
    with kind if full else mock.patch.object(shared_memory, "_NAP", 1e-4):
        large = distributed.all_reduce(torch.ones(1_000_000))
        rows = distributed.all_gather_rows(torch.ones(1, 1_000_000), [1, 1])
    return [small, large, rows, distributed.all_reduce(torch.ones(3))]


def test_without_room_sums_go_through_sockets(tmp_path: Path) -> None:
    for small, large, rows, after in run(no_room, 2, tmp_path):
        assert torch.equal(large, torch.full((1_000_000,), 2.0))
        assert rows.shape == (2, 1_000_000)
        assert torch.equal(small, after)


def refused_often(process: Process, args: argparse.Namespace) -> list[int]:
    distributed.all_reduce(torch.ones(3))
    shared = distributed._shared_memory(torch.ones(3))
    assert shared is not None
    full = mock.patch.object(shared_memory, "_allocated", return_value=None)
    opened = []
    for _ in range(3):
        with full if process.rank == 0 else contextlib.nullcontext():
            assert not shared.grow(1 << 20)
        opened.append(len(os.listdir("/proc/self/fd")))
    return opened


def test_what_was_refused_leaves_no_open_files(tmp_path: Path) -> None:
    for opened in run(refused_often, 2, tmp_path):
        assert len(set(opened)) == 1


def left_alone(process: Process, args: argparse.Namespace) -> str:
    distributed.all_reduce(torch.ones(3))
    if process.rank == 1:
        # As if killed: no word to anyone.
        torch.save("gone", Path(args.out) / "1.pt")
        os.kill(os.getpid(), 9)
    begun = time.monotonic()
    with pytest.raises(shared_memory.PeerLostError, match="rank 1 has ended"):
        distributed.all_reduce(torch.ones(3))
    assert time.monotonic() - begun < 30
    torch.save("noticed", Path(args.out) / "0.pt")
    raise SystemExit(0)


def test_who_waits_for_a_dead_process_is_told(tmp_path: Path) -> None:
    # The parent ends the others soon after one has died, which would hide what they noticed.
    with (
        mock.patch.object(ranks, "_SETTLING", 60.0),
        pytest.raises(RankError, match="rank 1 was killed by SIGKILL"),
    ):
        run(left_alone, 2, tmp_path)
    assert torch.load(tmp_path / "0.pt") == "noticed"


def at_odds(process: Process, args: argparse.Namespace) -> str:
    distributed.all_reduce(torch.ones(3))
    with pytest.raises(RuntimeError, match="different collective operations"):
        distributed.all_reduce(torch.ones(3 + process.rank))
    return "told"


def test_tensors_of_different_sizes_are_refused(tmp_path: Path) -> None:
    assert run(at_odds, 2, tmp_path) == ["told", "told"]


def late(process: Process, args: argparse.Namespace) -> str:
    distributed.all_reduce(torch.ones(3))
    shared = distributed._shared_memory(torch.ones(3))
    assert shared is not None
    if process.rank == 1:
        time.sleep(3)
        return "late"
    shared._timeout = 1.0
    with pytest.raises(shared_memory.PeerLostError, match="rank 0 has waited"):
        distributed.all_reduce(torch.ones(3))
    return "impatient"


def test_waiting_has_an_end(tmp_path: Path) -> None:
    assert run(late, 2, tmp_path) == ["impatient", "late"]


def test_memory_of_something_else_is_refused(tmp_path: Path) -> None:
    mine = shared_memory._OwnSegment(64)
    assert shared_memory._opened(mine.address).token == mine.address.token
    others = shared_memory._Address(mine.address.path, b"x" * 16, 64)
    with pytest.raises(OSError, match="another process"):
        shared_memory._opened(others)
    other_size = shared_memory._Address(mine.address.path, mine.address.token, 65)
    with pytest.raises(OSError, match="something else"):
        shared_memory._opened(other_size)
    mine.close()
    with pytest.raises(OSError):
        shared_memory._opened(mine.address)


def again(process: Process, args: argparse.Namespace) -> list[torch.Tensor]:
    before = distributed.all_reduce(torch.ones(2))
    store = f"file://{args.out}/second"
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=store, rank=1 - process.rank, world_size=2)
    return [before, distributed.all_gather_rows(torch.full((1, 1), float(process.rank)), [1, 1])]


def test_a_new_group_gets_memory_of_its_own(tmp_path: Path) -> None:
    for before, places in run(again, 2, tmp_path):
        assert torch.equal(before, torch.full((2,), 2.0))
        # The processes have changed places.
        assert places.flatten().tolist() == [1.0, 0.0]
