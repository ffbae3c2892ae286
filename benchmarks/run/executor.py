"""Where cells run: here, as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from benchmarks.run.cells import ROOT, Cell
from benchmarks.run.stages import PROCESSES, Stage
from core.processes import warm

LOG_TAIL = 4000
GRACE_SECONDS = 10.0
# One of them is there where Linux knows a GPU that torch can use (NVIDIA, AMD, under Windows).
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))


@dataclass
class Job:
    """A cell on its way.

    Attributes:
        cell: The cell to run.
        stage: The command that runs it.
        inputs: Files of other cells by flag.
        files: Folder that receives the results.
        log: File that receives everything the command prints.
        data: Folders of data sets by name.
        lock: Descriptor of the cell's lock, held while the job runs.
        companions: Jobs of further cells that the same process computes.
        started: Clock at the start.
    """

    cell: Cell
    stage: Stage
    inputs: Mapping[str, Path]
    files: Path
    log: Path
    data: Mapping[str, str]
    lock: int
    started: float = field(default_factory=time.monotonic)
    companions: Sequence[Job] = ()

    def command(self) -> list[str]:
        """The command line, of the companions' cells as well."""
        others = [(each.inputs, each.files) for each in self.companions]
        return self.stage.command(self.cell.config, self.inputs, self.files, self.data, others)

    def all(self) -> list[Job]:
        """This job and its companions."""
        return [self, *self.companions]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: The job.
        error: Why it failed; None when its command succeeded.
        late: Whether it was ended because its time was over; what it had saved can go on.
    """

    job: Job
    error: str | None = None
    late: bool = False


def late(job: Job, limit: float) -> Outcome:
    """A job that was ended after so many seconds per cell."""
    error = f"ended after {limit:g} s (--cell-timeout); --retry-failed goes on from what it saved"
    return Outcome(job, error, late=True)


class Executor(Protocol):
    """Runs jobs; knows nothing of stores and dependencies."""

    def has_room(self) -> bool:
        """Whether another job can start now."""

    def start(self, job: Job) -> None:
        """Start a job and return at once."""

    def poll(self) -> list[Outcome]:
        """The jobs that ended since the last call."""

    def stop(self) -> None:
        """End every running job."""


class Running(Protocol):
    """A command that runs."""

    @property
    def pid(self) -> int:
        """Of the command, which leads a process group."""

    def status(self) -> int | None:
        """Its exit status, minus a signal's number if one ended it; None while it runs."""

    def wait(self, seconds: float | None = None) -> None:
        """Wait for its end, or so long."""


@dataclass(frozen=True)
class FreshCommand:
    """A command in a new interpreter."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """See `Running`."""
        return self.process.pid

    def status(self) -> int | None:
        """See `Running`."""
        return self.process.poll()

    def wait(self, seconds: float | None = None) -> None:
        """See `Running`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


# What multiprocessing says of a process whose server was killed.
_SERVER_LOST = 255


@dataclass(frozen=True)
class WarmCommand:
    """A command in a process that has imported torch before (`core.processes.warm`)."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        """See `Running`."""
        assert self.process.pid is not None
        return self.process.pid

    def status(self) -> int | None:
        """See `Running`."""
        status = self.process.exitcode
        if status == _SERVER_LOST:
            # Nobody tells how the command ends: it must not write beside its next run.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        return status

    def wait(self, seconds: float | None = None) -> None:
        """See `Running`."""
        self.process.join(seconds)


@dataclass(frozen=True)
class _Taken:
    """A job with what it occupies."""

    job: Job
    command: Running
    gpus: tuple[str, ...]
    cores: tuple[int, ...]


class LocalExecutor:
    """Jobs as processes of this machine.

    Args:
        jobs: How many at a time; one of several processes counts as so many.
        gpus: Device numbers to hand out in turn, one per process of a job as far as
            there are as many; empty without GPUs.
        cores: Processor cores to divide among the jobs; None for all of this process'.
        imports: What jobs import: done once, and every job is forked from there. None starts a
            new interpreter for each.
        limit: Seconds that a cell may take; None: no limit.
    """

    def __init__(
        self,
        jobs: int = 1,
        gpus: Sequence[str] = (),
        cores: Sequence[int] | None = None,
        imports: Sequence[str] | None = None,
        limit: float | None = None,
    ) -> None:
        self._jobs, self._limit = jobs, limit
        self._gpus = tuple(gpus)
        self._cores = tuple(cores or usable_cores())
        self._imports = imports if warm.can_be_warm(gpu=bool(gpus)) else None
        self._running: list[_Taken] = []

    def has_room(self) -> bool:
        """Whether fewer than `jobs` processes run."""
        return sum(processes_of(each.job.cell) for each in self._running) < self._jobs

    def start(self, job: Job) -> None:
        """Start the job's command, its output in the job's log."""
        words = job.command()
        gpus, cores = self._least_used_gpus(processes_of(job.cell)), self._free_cores(job.cell)
        environment = command_environment(self._share(job.cell))
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with job.log.open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            fresh = self._imports is None or job.stage.imports is None
            begin = self._fresh if fresh else self._warm
            locks = tuple(each.lock for each in job.all())
            command = begin(words, environment, log.fileno(), locks, cores)
        self._running.append(_Taken(job, command, gpus, cores))

    def _fresh(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: int,
        locks: tuple[int, ...],
        cores: Sequence[int],
    ) -> Running:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # The command keeps its cells locked even if the harness is killed.
            pass_fds=locks,
        )
        _pin(process.pid, cores)
        return FreshCommand(process)

    def _warm(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: int,
        locks: tuple[int, ...],
        cores: Sequence[int],
    ) -> Running:
        process = warm.start_command(
            # Without the interpreter.
            words[1:],
            folder=ROOT,
            environment=environment,
            output=log,
            kept=locks,
            cores=cores,
            imports=self._imports or (),
        )
        return WarmCommand(process)

    def poll(self) -> list[Outcome]:
        """Jobs whose command has ended, with the end of their log as error."""
        found = [(each, each.command.status()) for each in self._running]
        self._running = [each for each, status in found if status is None]
        ended = [
            Outcome(each.job, describe_failure(status, each.job.log))
            for each, status in found
            if status is not None
        ]
        return [*ended, *self._end_late()]

    def _end_late(self) -> list[Outcome]:
        if self._limit is None:
            return []
        now, limit = time.monotonic(), self._limit
        over = [e for e in self._running if now - e.job.started > limit * len(e.job.all())]
        _end(over)
        self._running = [each for each in self._running if each not in over]
        return [late(each.job, limit) for each in over]

    def stop(self) -> None:
        """Interrupt every command, and kill those that do not listen."""
        _end(self._running)
        self._running = []

    def _least_used_gpus(self, count: int) -> tuple[str, ...]:
        used = [gpu for each in self._running for gpu in each.gpus]
        return tuple(sorted(self._gpus, key=used.count)[:count])

    def _free_cores(self, cell: Cell) -> tuple[int, ...]:
        """The cores of a job of one process; several processes move about."""
        if processes_of(cell) > 1 or self._jobs > len(self._cores):
            return ()
        used = [core for each in self._running for core in each.cores]
        return tuple(sorted(self._cores, key=used.count)[: self._share(cell)])

    def _share(self, cell: Cell) -> int:
        """How many cores each process of a cell has for itself."""
        return max(1, len(self._cores) // max(self._jobs, processes_of(cell)))


def usable_cores() -> Sequence[int]:
    """The processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def processes_of(cell: Cell) -> int:
    """How many processes share the cell's work."""
    return int(cell.config.get(PROCESSES, 1))


def command_environment(threads: int) -> dict[str, str]:
    """The environment of a command whose processes have so many threads."""
    # A plugin may lie where the user stands, and commands stand at the checkout.
    places = [str(ROOT), os.environ.get("PYTHONPATH"), os.getcwd()]
    path = os.pathsep.join(filter(None, dict.fromkeys(places)))
    return {**warm.SLEEPING, **os.environ, "PYTHONPATH": path, warm.THREADS: str(threads)}


def visible_gpus() -> list[str]:
    """The GPUs that cells can be given: those of CUDA_VISIBLE_DEVICES, else all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    if sys.platform == "linux" and not any(map(Path.exists, GPU_DEVICES)):
        # torch takes seconds to say the same.
        return []
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def describe_failure(status: int, log: Path) -> str | None:
    """What to say of a command that ended with `status`; None if it succeeded."""
    if status == 0:
        return None
    reason = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{reason}: {last_words(log)}"


def last_words(log: Path) -> str:
    """The last line of a log that says something: mostly the error."""
    with contextlib.suppress(FileNotFoundError):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            tail = file.read().decode(errors="replace")
        lines = [line.strip() for line in tail.replace("\r", "\n").splitlines()]
        return next((line for line in reversed(lines) if line), "")
    return ""


def _end(taken: Sequence[_Taken]) -> None:
    """Interrupt commands, and kill those that do not listen."""
    for each in taken:
        _signal(each.command, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    for each in taken:
        each.command.wait(max(0.0, deadline - time.monotonic()))
        _signal(each.command, signal.SIGKILL)
        each.command.wait()


def _signal(command: Running, number: int) -> None:
    """To a command and what it has started; one that has just begun leads no group yet."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(command.pid, number)
            return


def _pin(pid: int, cores: Sequence[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores)
