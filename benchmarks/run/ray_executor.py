"""Where cells run: on a Ray cluster, which needs to share no files with this machine.

Code, inputs and data travel through Ray's object store, results come back the same
way, and while a cell runs so does what it says and has saved. A cell whose worker or
node is lost is run again elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import ray_worker
from benchmarks.run.cells import ROOT
from benchmarks.run.executor import Job, Outcome, describe_failure, late, processes_of
from benchmarks.run.ray_worker import HERE, Mailbox, pack, run_cell, unpack
from core.errors import InputError

CODE = ("core", "training", "gradients", "attack", "audit", "federated", "main_run.py")
LOST_WORKER_RETRIES = 3


@dataclass
class _Running:
    job: Job
    result: Any
    log_before: int


class RayExecutor:
    """Jobs as tasks of a Ray cluster.

    Args:
        address: "auto", HOST:PORT, or None to start Ray on this machine.
        gpus_per_cell: Fraction or number of GPUs per job; None: one per process of it, as
            far as a node has as many.
        jobs: At most so many at a time; None: as many as the cluster has room for.
        shared_data: Data sets are at the same paths on every node and need not travel.
        code: Names of the checkout's folders and files that are sent to the workers.
        imports: What cells import: done once by a worker, and every cell without a GPU is forked
            from there. None starts a new interpreter for each.
        limit: Seconds that a cell may take; None: no limit.
    """

    def __init__(
        self,
        address: str | None = None,
        gpus_per_cell: float | None = None,
        jobs: int | None = None,
        shared_data: bool = False,
        code: tuple[str, ...] = CODE,
        imports: Sequence[str] | None = None,
        limit: float | None = None,
    ) -> None:
        self._imports, self._limit = imports, limit
        self._ray = _connect(address)
        self._gpus_per_cell = self._checked(gpus_per_cell)
        self._jobs = jobs
        self._shared_data = shared_data
        self._code = self._ray.put(pack(ROOT, [name for name in code if (ROOT / name).exists()]))
        self._data: dict[str, Any] = {}
        self._running: list[_Running] = []
        # The workers have no checkout to import from: send the code itself.
        self._ray.cloudpickle.register_pickle_by_value(ray_worker)
        self._task = self._ray.remote(run_cell)
        self._mailbox = self._ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1).remote()
        self._mail: Any = None

    def _checked(self, asked: float | None) -> float | None:
        available = self._on_one_node("GPU")
        if asked is not None and asked > available:
            raise InputError(
                f"--gpus-per-cell {asked:g}: the cluster has {available:g} GPUs on its largest node"
            )
        return asked

    def _on_one_node(self, resource: str) -> float:
        """The most that one node has: a task never spreads over several."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return max((resources.get(resource, 0.0) for resources in alive), default=0.0)

    def _share(self, job: Job) -> dict[str, float]:
        """Cores and GPUs of a job: one per process, and never more than a node has.

        Ray would wait for ever for a node large enough.
        """
        processes = processes_of(job.cell)
        gpus = self._gpus_per_cell
        if gpus is None:
            gpus = min(processes, self._on_one_node("GPU"))
        return {"num_cpus": min(processes, max(1.0, self._on_one_node("CPU"))), "num_gpus": gpus}

    def has_room(self) -> bool:
        """Whether another job may be handed to the cluster, which queues it."""
        return self._jobs is None or len(self._running) < self._jobs

    def start(self, job: Job) -> None:
        """Hand a job to the cluster."""
        names = {flag: f"inputs/{flag}/{path.name}" for flag, path in job.inputs.items()}
        data = self._data_of(job)
        command = job.stage.command(
            job.cell.config,
            {flag: Path(HERE, name) for flag, name in names.items()},
            Path(HERE, "files"),
            job.data if self._shared_data else {n: f"{HERE}/data/{n}" for n in data},
        )
        share = self._share(job)
        warm = self._imports if job.stage.imports is not None and not share["num_gpus"] else None
        result = self._task.options(**share, max_retries=LOST_WORKER_RETRIES).remote(
            job.cell.key,
            self._mailbox,
            self._code,
            command[1:],
            warm,
            self._limit,
            {names[flag]: path.read_bytes() for flag, path in job.inputs.items()},
            pack(job.files),
            {"OMP_NUM_THREADS": "1"},
            [f"data/{name}" for name in data],
            *data.values(),
        )
        size = job.log.stat().st_size if job.log.exists() else 0
        self._running.append(_Running(job, result, size))

    def _data_of(self, job: Job) -> Mapping[str, Any]:
        """The data sets of a job that must travel, put into the object store once."""
        name = str(job.cell.config.get("data"))
        if self._shared_data or name not in job.data:
            return {}
        if name not in self._data:
            self._data[name] = self._ray.put(pack(Path(job.data[name])))
        return {name: self._data[name]}

    def poll(self) -> list[Outcome]:
        """Jobs whose results have come back."""
        if not self._running:
            return []
        self._read_mail()
        results = [running.result for running in self._running]
        ready, _ = self._ray.wait(results, num_returns=len(results), timeout=0)
        ended = [running for running in self._running if running.result in ready]
        self._running = [running for running in self._running if running.result not in ready]
        return [self._outcome(running) for running in ended]

    def _read_mail(self) -> None:
        """Write what running cells have said and saved to where local ones would."""
        if self._mail is None:
            self._mail = self._mailbox.collect.remote()
        ready, _ = self._ray.wait([self._mail], timeout=0)
        if not ready:
            return
        mail, self._mail = self._mail, None
        # With its node goes what the mailbox held; Ray starts another.
        with contextlib.suppress(self._ray.exceptions.RayError):
            said, files = self._ray.get(mail)
            for job in (running.job for running in self._running):
                if job.cell.key in said:
                    with job.log.open("ab") as log:
                        log.write(said[job.cell.key])
                if job.cell.key in files:
                    unpack(files[job.cell.key], job.files)

    def _outcome(self, running: _Running) -> Outcome:
        job = running.job
        try:
            status, said, files = self._ray.get(running.result)
        except self._ray.exceptions.RayError as error:
            return Outcome(job, f"Ray: {str(error).splitlines()[0]}")
        # In the place of what was heard of it meanwhile, which may be incomplete.
        with job.log.open("ab") as log:
            log.truncate(running.log_before)
            log.write(said)
        unpack(files, job.files)
        if status is None and self._limit is not None:
            return late(job, self._limit)
        return Outcome(job, describe_failure(int(status), job.log))

    def stop(self) -> None:
        """Cancel what runs and leave the cluster."""
        for running in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(running.result, force=True)
        self._running = []
        self._ray.shutdown()


def _connect(address: str | None) -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--executor ray needs Ray: pip install 'gradinvbench[search]'") from None
    try:
        # Without "local" it would join what cluster it finds, or wait for one that is gone.
        ray.init(
            address=address or "local", include_dashboard=None if address else False,
            log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers ({str(error).splitlines()[0]})"
        ) from None
    return ray
