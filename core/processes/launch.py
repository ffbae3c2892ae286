"""Start the processes of a command and end them together.

Launching follows the published commands: `--world-size` and `--rank` count nodes and
`--multiprocessing-distributed` spawns the processes of this node; the environment set by
`torchrun` is understood as well.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from core.errors import InputError, RankError
from core.launch_arguments import LaunchSettings
from core.processes.distributed import Process, barrier, join_group, seed_everything
from core.processes.meeting import (
    Address,
    Meeting,
    Watch,
    from_environment,
    host_store,
    join_store,
    told_value,
)
from core.processes.ranks import Ranks, complaint_about, cut_off, is_cut_off
from core.processes.warm import can_be_warm

logger = logging.getLogger(__name__)

# Seconds that sums wait longer than the watch, which can say for whom.
_AFTER_THE_WATCH = 10.0
# A year: longer ones do not fit into torch's clock.
MOST_SECONDS = 3.2e7

Payload = ParamSpec("Payload")
Result = TypeVar("Result")


def check_launch(settings: LaunchSettings) -> None:
    """Refuse impossible launches before any work.

    Args:
        settings: How processes are to be started.

    Raises:
        InputError: With the flag to change.
    """
    cuda = torch.cuda.is_available() and not settings.cpu
    if settings.dist_backend == "nccl" and not cuda:
        raise InputError(
            "--dist-backend nccl needs a CUDA GPU and there is none; use --dist-backend gloo"
        )
    if settings.gpu is not None and cuda and not 0 <= settings.gpu < torch.cuda.device_count():
        raise InputError(f"--gpu {settings.gpu}: this machine has {torch.cuda.device_count()} GPUs")
    if not -(2**63) <= settings.seed < 2**63:
        raise InputError(f"--seed {settings.seed}: must be an integer of 64 bits")
    if settings.nproc_per_node is not None and settings.nproc_per_node < 1:
        raise InputError("--nproc-per-node must be at least 1")
    if not 0 < settings.timeout < MOST_SECONDS:
        raise InputError(f"--timeout {settings.timeout:g}: must be a positive number of seconds")
    if settings.world_size < 1 or not 0 <= settings.rank < settings.world_size:
        raise InputError(f"--rank {settings.rank} is not below --world-size {settings.world_size}")
    if (settings.nproc_per_node or 1) > 1 and not settings.multiprocessing_distributed:
        raise InputError(
            f"--nproc-per-node {settings.nproc_per_node} needs --multiprocessing-distributed"
        )
    spawns = settings.multiprocessing_distributed or "RANK" in os.environ
    if settings.world_size > 1 and not spawns:
        raise InputError(
            "--world-size counts nodes and needs --multiprocessing-distributed (or torchrun); "
            "processes on this node are --nproc-per-node"
        )


def launch(
    work: Callable[Concatenate[Process, Payload], Result],
    settings: LaunchSettings,
    *payload: Payload.args,
    **named: Payload.kwargs,
) -> Result | None:
    """Run `work(process, *payload)` on every process that the settings ask for.

    Args:
        work: A module-level function (it is sent to the spawned processes by name).
        settings: How many processes, and how they find each other.
        payload: What the work is told besides its process; spawned processes get a
            pickled copy.
        named: The same, by name.

    Returns:
        What `work` returns when it ran in this very process, else None.

    Raises:
        InputError: Raised by any rank; it ends all ranks.
        RankError: A rank failed, was killed or does not answer; the others were ended.
        KeyboardInterrupt: This process got SIGINT; the ranks were ended.
        SystemExit: The same with SIGTERM.
    """
    check_launch(settings)
    told = functools.partial(_told, work, payload, named)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_under_torchrun(told, settings)
    if not settings.multiprocessing_distributed:
        process = Process(device=_device(settings, settings.gpu or 0))
        if settings.gpu is not None and process.device.type == "cpu":
            logger.warning("--gpu %d: no CUDA GPU is used; computing on the CPU", settings.gpu)
        seed_everything(settings.seed)
        return told(process)
    # What takes long to import, if the ranks will need it as well.
    heavy = [name for name in ("torchvision", "opacus") if name in sys.modules]
    _spawn(told, settings, imports=[*heavy, work.__module__])
    return None


def _told(
    work: Callable[..., Result], payload: Sequence[Any], named: Mapping[str, Any], process: Process
) -> Result:
    return work(process, *payload, **named)


def _device(settings: LaunchSettings, local_rank: int) -> torch.device:
    if settings.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def processes_of(settings: LaunchSettings) -> int:
    """Number of processes over all nodes that `launch` computes with."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if not settings.multiprocessing_distributed:
        return 1
    return settings.world_size * processes_per_node(settings)


def processes_per_node(settings: LaunchSettings) -> int:
    """Number of processes of this node that the settings ask for."""
    if settings.nproc_per_node is not None:
        return int(settings.nproc_per_node)
    return 1 if settings.cpu else max(1, torch.cuda.device_count())


def _backend(settings: LaunchSettings, n_local: int) -> str:
    if settings.dist_backend is not None:
        return str(settings.dist_backend)
    # NCCL refuses two ranks on one GPU.
    enough_gpus = torch.cuda.is_available() and n_local <= torch.cuda.device_count()
    return "nccl" if enough_gpus and not settings.cpu else "gloo"


def _spawn(
    work: Callable[[Process], Any], settings: LaunchSettings, imports: Sequence[str]
) -> None:
    n_local = processes_per_node(settings)
    address = Address(settings.dist_url)
    address.check()
    # Held by this process: it outlives its ranks.
    store = None
    if settings.rank == 0 and address.is_tcp:
        store, address = host_store(address)
    group = _Group(settings, settings.world_size * n_local, n_local, address)
    first = settings.rank * n_local
    is_warm = can_be_warm(gpu=not settings.cpu and torch.cuda.is_available())
    Ranks(functools.partial(_spawned, work, group, first), first, n_local, imports, is_warm).run()
    del store


@dataclass(frozen=True)
class _Group:
    """What every rank of this node is told of its group.

    Attributes:
        settings: How processes are started.
        world_size: Number of ranks.
        n_local: Of which so many are on this node.
        address: Where they meet.
        prefix: Of the keys in a store that others use as well.
    """

    settings: LaunchSettings
    world_size: int
    n_local: int
    address: Address
    prefix: str = ""

    def join(self, rank: int) -> dist.Store:
        """A connection to the store of the run."""
        store = join_store(self.address, self.world_size, self.settings.timeout, rank)
        return dist.PrefixStore(self.prefix, store) if self.prefix else store


def _spawned(
    work: Callable[[Process], Any], group: _Group, first: int, local_rank: int, tell: Connection
) -> None:
    rank = first + local_rank

    def report(error: BaseException) -> None:
        tell.send(complaint_about(error, rank))

    try:
        _run_in_group(work, group, rank, local_rank, report)
    except Exception:
        # The parent has been told.
        raise SystemExit(1) from None


def _run_under_torchrun(work: Callable[[Process], Any], settings: LaunchSettings) -> Any:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, hosted = from_environment()
    store = None
    if rank == 0 and not hosted:
        store, address = host_store(address)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    group = _Group(settings, world_size, n_local, address, f"gradinvbench/{attempt}")
    result = _run_in_group(work, group, rank, local_rank, _said_at_once(rank))
    del store
    return result


def _said_at_once(rank: int) -> Callable[[BaseException], None]:
    """How a rank without a parent of ours tells that a peer is gone."""

    def report(error: BaseException) -> None:
        if is_cut_off(error):
            raise RankError(cut_off(error, rank)) from None

    return report


def _run_in_group(
    work: Callable[[Process], Any],
    group: _Group,
    rank: int,
    local_rank: int,
    report: Callable[[BaseException], None],
) -> Any:
    settings, world_size = group.settings, group.world_size
    device = _device(settings, local_rank)
    if device.type == "cpu":
        # Ranks that each take every core spend their time waiting for each other.
        torch.set_num_threads(max(1, _cores() // group.n_local))
    ended_well: list[bool] = []
    try:
        with _together(group, rank, report):
            if world_size > 1:
                atexit.register(_leave, ended_well)
            seed_everything(settings.seed)
            result = work(Process(rank, world_size, device))
        ended_well.append(True)
        return result
    except Exception as error:
        # Before the group goes: the peers fail then, and theirs would be the error shown.
        report(error)
        raise
    finally:
        with contextlib.suppress(RuntimeError, AssertionError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _together(group: _Group, rank: int, report: Callable[[BaseException], None]) -> Iterator[None]:
    """Within the block the ranks form a group, were told the same, and watch each other."""
    settings, world_size = group.settings, group.world_size
    store = group.join(rank)
    if world_size > 1:
        told = {flag: told_value(value) for flag, value in settings.shared.items()}
        compared = {flag: value for flag, value in told.items() if value is not None}
        Meeting(store, rank, world_size, settings.timeout).agree(compared)
    backend, patience = _backend(settings, group.n_local), settings.timeout + _AFTER_THE_WATCH
    join_group(backend, store, rank, world_size, patience)
    if world_size == 1:
        yield
        return

    def lost(sentence: str) -> None:
        # This rank waits in a sum that will not end: only so it can be left.
        with contextlib.suppress(Exception):
            report(RankError(sentence))
        print(f"rank {rank}: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    watch = Watch(Meeting(group.join(rank), rank, world_size, settings.timeout), lost)
    watch.start()
    try:
        yield
        barrier()
    finally:
        watch.end()


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
