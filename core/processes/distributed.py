"""Process groups, shards and exact reductions, the same on one process and on many.

Every collective here is the identity on a single process, so that callers are
written once. Launching follows the published commands: `--world-size` and
`--rank` count nodes and `--multiprocessing-distributed` spawns the processes of
this node; the environment set by `torchrun` is understood as well.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import contextvars
import functools
import logging
import os
import random
import signal
import socket
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from core.errors import InputError, is_write_failure, write_failure
from core.launch_arguments import add_launch_arguments as add_launch_arguments
from core.processes.shared_memory import SharedMemory, connect

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Process:
    """This process among its peers.

    Attributes:
        rank: Index of this process over all nodes.
        world_size: Number of processes over all nodes.
        device: Where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes (rank 0)."""
        return self.rank == 0


def check_launch_arguments(args: argparse.Namespace) -> None:
    """Refuse impossible launches before any work.

    Raises:
        InputError: With the flag to change.
    """
    cuda = torch.cuda.is_available() and not args.cpu
    if args.dist_backend == "nccl" and not cuda:
        raise InputError(
            "--dist-backend nccl needs a CUDA GPU and there is none; use --dist-backend gloo"
        )
    if args.gpu is not None and cuda and not 0 <= args.gpu < torch.cuda.device_count():
        raise InputError(f"--gpu {args.gpu}: this machine has {torch.cuda.device_count()} GPUs")
    if not -(2**63) <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be an integer of 64 bits")
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise InputError("--nproc-per-node must be at least 1")
    if args.world_size < 1 or not 0 <= args.rank < args.world_size:
        raise InputError(f"--rank {args.rank} is not below --world-size {args.world_size}")
    spawns = args.multiprocessing_distributed or "RANK" in os.environ
    if args.world_size > 1 and not spawns:
        raise InputError(
            "--world-size counts nodes and needs --multiprocessing-distributed (or torchrun); "
            "processes on this node are --nproc-per-node"
        )


def launch(work: Callable[[Process, argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run `work(process, args)` on every process that the flags ask for.

    Args:
        work: A module-level function (it is sent to the spawned processes by name).
        args: Parsed arguments that include those of `add_launch_arguments`.

    Returns:
        What `work` returns when it ran in this very process, else None.

    Raises:
        InputError: Raised by any rank; it ends all ranks.
        torch.multiprocessing.ProcessException: A rank failed; the others were ended
            and the message holds that rank's own traceback.
    """
    check_launch_arguments(args)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_under_torchrun(work, args)
    if not args.multiprocessing_distributed:
        process = Process(device=_device(args, 0 if args.gpu is None else args.gpu))
        if args.gpu is not None and process.device.type == "cpu":
            logger.warning("--gpu %d: no CUDA GPU is used; computing on the CPU", args.gpu)
        seed_everything(args.seed)
        return work(process, args)
    _spawn(work, args)
    return None


def _device(args: argparse.Namespace, local_rank: int) -> torch.device:
    if args.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _processes_per_node(args: argparse.Namespace) -> int:
    if args.nproc_per_node is not None:
        return int(args.nproc_per_node)
    return 1 if args.cpu else max(1, torch.cuda.device_count())


def _backend(args: argparse.Namespace, n_local: int) -> str:
    if args.dist_backend is not None:
        return str(args.dist_backend)
    # NCCL refuses two ranks on one GPU.
    enough_gpus = torch.cuda.is_available() and n_local <= torch.cuda.device_count()
    return "nccl" if enough_gpus and not args.cpu else "gloo"


def _spawn(work: Callable[..., Any], args: argparse.Namespace) -> None:
    n_local = _processes_per_node(args)
    url = _resolve_url(args.dist_url)
    context = torch.multiprocessing.get_context("spawn")
    complaints = context.SimpleQueue()
    try:
        torch.multiprocessing.spawn(
            _spawned, args=(work, args, n_local, url, complaints), nprocs=n_local
        )
    except ProcessException:
        if not complaints.empty():
            raise InputError(complaints.get()) from None
        raise


def _resolve_url(url: str) -> str:
    """Replace port 0 by a free port, and complain early about a port in use."""
    if url.startswith(("file://", "env://")):
        return url
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    if not (url.startswith("tcp://") and host and port.isdigit() and int(port) < 2**16):
        raise InputError(f"--dist-url {url}: expected tcp://HOST:PORT")
    if host not in ("127.0.0.1", "localhost"):
        return url
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            raise InputError(f"--dist-url {url}: the port is in use; give another one") from None
        return f"tcp://{host}:{probe.getsockname()[1]}"


def _spawned(
    local_rank: int,
    work: Callable[..., Any],
    args: argparse.Namespace,
    n_local: int,
    url: str,
    complaints: Any,
) -> None:
    # torch sends SIGINT to ranks whose parent died. Started in the background, a
    # command ignores it; waiting in a collective, Python would not get round to it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = args.rank * n_local + local_rank
    world_size = args.world_size * n_local
    report = functools.partial(_report, rank, complaints)
    _run_in_group(work, args, rank, world_size, local_rank, n_local, url, report)


def _report(rank: int, complaints: Any, error: Exception) -> None:
    """Tell the parent of a mistake, and anyone of a failure."""
    if isinstance(error, InputError):
        complaints.put(str(error))
    elif isinstance(error, OSError) and is_write_failure(error):
        complaints.put(write_failure(error))
    elif complaints.empty():  # else a peer's mistake has cut this rank's connection
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(error)


def _run_under_torchrun(work: Callable[..., Any], args: argparse.Namespace) -> Any:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return _run_in_group(work, args, rank, world_size, local_rank, n_local, "env://")


def _run_in_group(
    work: Callable[..., Any],
    args: argparse.Namespace,
    rank: int,
    world_size: int,
    local_rank: int,
    n_local: int,
    url: str,
    report: Callable[[Exception], None] | None = None,
) -> Any:
    device = _device(args, local_rank)
    if device.type == "cpu":
        # Ranks that each take every core spend their time waiting for each other.
        torch.set_num_threads(max(1, _cores() // n_local))
    dist.init_process_group(
        _backend(args, n_local),
        init_method=url,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    ended_well: list[bool] = []
    if world_size > 1:
        atexit.register(_leave, ended_well)
    try:
        seed_everything(args.seed)
        result = work(Process(rank, world_size, device), args)
        barrier()
        ended_well.append(True)
        return result
    except Exception as error:
        # Before the group goes: the peers fail then, and theirs would be the error shown.
        if report is not None:
            report(error)
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leave(ended_well: list[bool]) -> None:
    """End a rank that has done its work without finalising the interpreter.

    gloo's threads may still hold tensors of finished operations; letting go of them while
    Python shuts down aborts the process (https://github.com/pytorch/pytorch/pull/179291),
    and a finished run would count as a failed one.
    """
    if ended_well:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
        _CONNECTED[group] = connect(COLLECTIVE_TIMEOUT.total_seconds())
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
