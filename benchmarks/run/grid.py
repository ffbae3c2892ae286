"""Running a grid: every cell once, in the order of needs, resumable at any moment."""

from __future__ import annotations

import enum
import functools
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.run.cells import Cell, hash_json, in_order
from benchmarks.run.executor import Executor, Job, Outcome
from benchmarks.run.progress import Progress
from benchmarks.run.stages import Stage
from benchmarks.run.store import Store

POLL_SECONDS = 0.1


class Status(enum.Enum):
    """What became of a cell."""

    FINISHED = "finished"
    FOUND = "found"
    FAILED = "failed"
    BLOCKED = "blocked"
    LEFT = "left for a further run"


DONE = (Status.FINISHED, Status.FOUND)


class Grid:
    """Cells, where their results go, and who computes them.

    Args:
        cells: What is wanted; what they need is added.
        store: Store that keeps the results.
        executor: Who runs the commands.
        stages: How, by the cells' stage.
        progress: Who is told.
        data: Folders of data sets by the name that configurations use.
        retry_failed: Run again what failed in an earlier run.
        targets_at_once: Cells of one configuration that one process computes, where their stage
            can take several inputs.
        seconds: After so many no further cell is started; None: until nothing is left to do.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        store: Store,
        executor: Executor,
        stages: Mapping[str, Stage],
        progress: Progress,
        data: Mapping[str, str] | None = None,
        retry_failed: bool = False,
        targets_at_once: int = 1,
        seconds: float | None = None,
    ) -> None:
        self._at_once, self._seconds = targets_at_once, seconds
        self._store = store
        self._executor = executor
        self._stages = stages
        self._progress = progress
        self._data = data or {}
        self._retry = retry_failed
        self._cells = in_order(cells)
        self._status: dict[str, Status] = {}
        self._running: dict[str, Job] = {}

    def run(self) -> dict[str, Status]:
        """Run until nothing is left to do.

        Returns:
            What became of every cell, by key.

        Raises:
            KeyboardInterrupt: After the running commands were ended; what they
                had saved is continued by the next run.
        """
        self._find_finished()
        self._progress.begin(len(self._cells), len(self._status))
        until = math.inf if self._seconds is None else time.monotonic() + self._seconds
        try:
            while len(self._status) < len(self._cells):
                if time.monotonic() < until:
                    self._start_what_can()
                elif not self._running:
                    break
                for outcome in self._executor.poll():
                    self._conclude(outcome)
                self._progress.tick(self._running.values())
                time.sleep(POLL_SECONDS)
        finally:
            self._executor.stop()
            for job in self._running.values():
                os.close(job.lock)
            self._running.clear()
            self._progress.end()
        left = {cell.key: Status.LEFT for cell in self._cells if cell.key not in self._status}
        return {**self._status, **left}

    def _find_finished(self) -> None:
        for cell in self._cells:
            if self._store.is_finished(cell):
                self._status[cell.key] = Status.FOUND

    def _start_what_can(self) -> None:
        for cell in self._cells:
            if cell.key in self._status or cell.key in self._running:
                continue
            needs = [self._status.get(need.key) for need in cell.needs]
            if Status.FAILED in needs or Status.BLOCKED in needs:
                self._settle(cell, Status.BLOCKED, 0.0)
            elif not self._executor.has_room():
                return
            elif all(needs) and not self._waits_for_others(cell):
                self._try_start(cell)

    def _try_start(self, cell: Cell) -> None:
        """Start `cell`, and beside it others that its process can compute as well."""
        job = self._prepared(cell)
        if job is None:
            return
        others = [self._prepared(other) for other in self._companions(cell)]
        job.companions = [other for other in others if other is not None]
        for each in job.all():
            self._progress.started(each.cell)
        self._executor.start(job)

    def _companions(self, cell: Cell) -> list[Cell]:
        """Cells that the process of `cell` can compute as well, all of them ready."""
        alike = [other for other in self._alike(cell) if self._is_ready(other)]
        return alike[: self._at_once - 1]

    def _waits_for_others(self, cell: Cell) -> bool:
        """Whether more cells could go along once what they need is done."""
        alike = self._alike(cell)
        ready = sum(map(self._is_ready, alike))
        return ready < min(len(alike), self._at_once - 1)

    def _alike(self, cell: Cell) -> list[Cell]:
        """Cells to do of the same configuration whose inputs are of the same model."""
        if self._at_once < 2 or self._stages[cell.stage].beside is None:
            return []
        return [
            other
            for other in self._groups[cell.key]
            if other.key != cell.key
            and other.key not in self._status
            and other.key not in self._running
        ]

    @functools.cached_property
    def _groups(self) -> dict[str, list[Cell]]:
        """Of every cell, all that could share its process, whatever has become of them."""
        of_kind: dict[str, list[Cell]] = {}
        groups = {}
        for cell in self._cells:
            group = of_kind.setdefault(_kind(cell), [])
            group.append(cell)
            groups[cell.key] = group
        return groups

    def _is_ready(self, cell: Cell) -> bool:
        return all(self._status.get(need.key) in DONE for need in cell.needs)

    def _prepared(self, cell: Cell) -> Job | None:
        """A job for `cell`, or None where another process has it: that one's result will do."""
        lock = self._store.try_lock(cell)
        if lock is None:
            return None
        if self._already_done(cell):
            os.close(lock)
            return None
        try:
            inputs = self._input_files(cell)
        except FileNotFoundError as error:
            self._store.fail(cell, str(error))
            self._settle(cell, Status.FAILED, 0.0, str(error))
            os.close(lock)
            return None
        self._store.begin(cell)
        self._running[cell.key] = Job(
            cell=cell,
            stage=self._stages[cell.stage],
            inputs=inputs,
            files=self._store.files(cell),
            log=self._store.log(cell),
            data=self._data,
            lock=lock,
        )
        return self._running[cell.key]

    def _already_done(self, cell: Cell) -> bool:
        if self._store.is_finished(cell):
            self._settle(cell, Status.FOUND, 0.0)
            return True
        failure = self._store.failure(cell)
        if failure is not None and not self._retry:
            self._settle(cell, Status.FAILED, 0.0, str(failure["error"]))
            return True
        if failure is not None:
            if failure.get("goes_on") is not True:
                self._store.discard(cell)
            return False
        # An orphan of a killed harness may have come to its end meanwhile.
        record = self._stages[cell.stage].read_record(self._store.files(cell))
        if record is not None:
            self._store.finish(cell, record)
            self._settle(cell, Status.FOUND, 0.0)
        return record is not None

    def _input_files(self, cell: Cell) -> dict[str, Path]:
        return {flag: self._store.input_file(i.cell, i.pattern) for flag, i in cell.inputs.items()}

    def _conclude(self, outcome: Outcome) -> None:
        """Settle the cells of a job: together they took the time since it began."""
        jobs = outcome.job.all()
        seconds = (time.monotonic() - outcome.job.started) / len(jobs)
        for job in jobs:
            # One of several may be done although the command failed at a later one.
            read = outcome.error is None or len(jobs) > 1
            record = job.stage.read_record(job.files) if read else None
            self._conclude_one(job, record, outcome, seconds)

    def _conclude_one(
        self, job: Job, record: dict[str, Any] | None, outcome: Outcome, seconds: float
    ) -> None:
        error = outcome.error
        if error is None and record is None:
            error = f"the command succeeded but wrote no {job.stage.record}"
        if record is not None:
            self._store.finish(job.cell, {**record, "wall_seconds": round(seconds, 2)})
            self._settle(job.cell, Status.FINISHED, seconds)
        else:
            self._store.fail(job.cell, str(error), goes_on=outcome.late)
            self._settle(job.cell, Status.FAILED, seconds, str(error))
        del self._running[job.cell.key]
        os.close(job.lock)

    def _settle(self, cell: Cell, status: Status, seconds: float, error: str = "") -> None:
        self._status[cell.key] = status
        self._progress.finished(cell, status.value, seconds, error)


def _kind(cell: Cell) -> str:
    """What cells have in common that can share a process: stage, configuration and model."""
    models = [(i.cell.key, i.pattern) for given in cell.needs for i in given.inputs.values()]
    return hash_json([cell.stage, dict(cell.config), models])
