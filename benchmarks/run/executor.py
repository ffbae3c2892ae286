"""Where cells run: here, as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.run.cells import ROOT, Cell
from benchmarks.run.stages import PROCESSES, Stage

LOG_TAIL = 4000
GRACE_SECONDS = 10.0


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


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `error` is None when its command succeeded."""

    job: Job
    error: str | None = None


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


class LocalExecutor:
    """Jobs as processes of this machine.

    Args:
        jobs: How many at a time; one that takes several GPUs counts as so many.
        gpus: Device numbers to hand out in turn, one per process of a job as far as
            there are as many; empty without GPUs.
        cores: Processor cores to divide among the jobs.
    """

    def __init__(self, jobs: int = 1, gpus: Sequence[str] = (), cores: int | None = None) -> None:
        self._jobs = jobs
        self._gpus = tuple(gpus)
        self._cores = cores or len(os.sched_getaffinity(0))
        self._running: list[tuple[Job, subprocess.Popen[bytes], tuple[str, ...]]] = []

    def has_room(self) -> bool:
        """Whether fewer than `jobs` jobs run."""
        return sum(max(1, len(gpus)) for *_, gpus in self._running) < self._jobs

    def start(self, job: Job) -> None:
        """Start the job's command, its output in the job's log."""
        gpus = self._least_used_gpus(processes_of(job.cell))
        command = job.stage.command(job.cell.config, job.inputs, job.files, job.data)
        with job.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(job, gpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # The command keeps the cell locked even if the harness is killed.
                pass_fds=(job.lock,),
            )
        self._running.append((job, process, gpus))

    def poll(self) -> list[Outcome]:
        """Jobs whose command has ended, with the end of their log as error."""
        ended = [(job, p) for job, p, _ in self._running if p.poll() is not None]
        self._running = [r for r in self._running if r[1].returncode is None]
        return [Outcome(job, describe_failure(p.returncode, job.log)) for job, p in ended]

    def stop(self) -> None:
        """Interrupt every command, and kill those that do not listen."""
        for _, process, _ in self._running:
            _signal_group(process, signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        for _, process, _ in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(process, signal.SIGKILL)
            process.wait()
        self._running = []

    def _least_used_gpus(self, count: int) -> tuple[str, ...]:
        used = [gpu for *_, gpus in self._running for gpu in gpus]
        return tuple(sorted(self._gpus, key=used.count)[:count])

    def _environment(self, job: Job, gpus: Sequence[str]) -> dict[str, str]:
        environment = command_environment(self._cores // self._jobs, job.cell)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return environment


def processes_of(cell: Cell) -> int:
    """How many processes share the cell's work."""
    return int(cell.config.get(PROCESSES, 1))


def command_environment(cores: int, cell: Cell) -> dict[str, str]:
    """The environment of a cell's command that may use `cores` cores."""
    threads = max(1, cores // processes_of(cell))
    # A plugin may lie where the user stands, and commands stand at the checkout.
    places = [str(ROOT), os.environ.get("PYTHONPATH"), os.getcwd()]
    path = os.pathsep.join(filter(None, dict.fromkeys(places)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def visible_gpus() -> list[str]:
    """The GPUs that cells can be given: those of CUDA_VISIBLE_DEVICES, else all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
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


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
