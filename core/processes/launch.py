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
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from core.errors import InputError, is_write_failure, write_failure
from core.launch_arguments import LaunchSettings
from core.processes.distributed import COLLECTIVE_TIMEOUT, Process, barrier, seed_everything

logger = logging.getLogger(__name__)

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
    if settings.world_size < 1 or not 0 <= settings.rank < settings.world_size:
        raise InputError(f"--rank {settings.rank} is not below --world-size {settings.world_size}")
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
        torch.multiprocessing.ProcessException: A rank failed; the others were ended
            and the message holds that rank's own traceback.
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
    _spawn(told, settings)
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


def _processes_per_node(settings: LaunchSettings) -> int:
    if settings.nproc_per_node is not None:
        return int(settings.nproc_per_node)
    return 1 if settings.cpu else max(1, torch.cuda.device_count())


def _backend(settings: LaunchSettings, n_local: int) -> str:
    if settings.dist_backend is not None:
        return str(settings.dist_backend)
    # NCCL refuses two ranks on one GPU.
    enough_gpus = torch.cuda.is_available() and n_local <= torch.cuda.device_count()
    return "nccl" if enough_gpus and not settings.cpu else "gloo"


def _spawn(work: Callable[[Process], Any], settings: LaunchSettings) -> None:
    n_local = _processes_per_node(settings)
    url = _resolve_url(settings.dist_url)
    context = torch.multiprocessing.get_context("spawn")
    complaints = context.SimpleQueue()
    try:
        torch.multiprocessing.spawn(
            _spawned, args=(work, settings, n_local, url, complaints), nprocs=n_local
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
    work: Callable[[Process], Any],
    settings: LaunchSettings,
    n_local: int,
    url: str,
    complaints: Any,
) -> None:
    # torch sends SIGINT to ranks whose parent died. Started in the background, a
    # command ignores it; waiting in a collective, Python would not get round to it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = settings.rank * n_local + local_rank
    world_size = settings.world_size * n_local
    report = functools.partial(_report, rank, complaints)
    _run_in_group(work, settings, rank, world_size, local_rank, n_local, url, report)


def _report(rank: int, complaints: Any, error: Exception) -> None:
    """Tell the parent of a mistake, and anyone of a failure."""
    if isinstance(error, InputError):
        complaints.put(str(error))
    elif isinstance(error, OSError) and is_write_failure(error):
        complaints.put(write_failure(error))
    elif complaints.empty():  # else a peer's mistake has cut this rank's connection
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(error)


def _run_under_torchrun(work: Callable[[Process], Any], settings: LaunchSettings) -> Any:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return _run_in_group(work, settings, rank, world_size, local_rank, n_local, "env://")


def _run_in_group(
    work: Callable[[Process], Any],
    settings: LaunchSettings,
    rank: int,
    world_size: int,
    local_rank: int,
    n_local: int,
    url: str,
    report: Callable[[Exception], None] | None = None,
) -> Any:
    device = _device(settings, local_rank)
    if device.type == "cpu":
        # Ranks that each take every core spend their time waiting for each other.
        torch.set_num_threads(max(1, _cores() // n_local))
    dist.init_process_group(
        _backend(settings, n_local),
        init_method=url,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    ended_well: list[bool] = []
    if world_size > 1:
        atexit.register(_leave, ended_well)
    try:
        seed_everything(settings.seed)
        result = work(Process(rank, world_size, device))
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
