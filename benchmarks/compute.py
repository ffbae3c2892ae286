"""Computing what a table declares: its cells, on this machine or on a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass

from benchmarks.declare.tables import Table
from benchmarks.run.executor import Executor, LocalExecutor, visible_gpus
from benchmarks.run.grid import Grid, Status
from benchmarks.run.progress import Progress
from benchmarks.run.stages import STAGES
from benchmarks.run.store import Store


@dataclass(frozen=True)
class Workers:
    """Who computes cells.

    Attributes:
        ray: Whether a Ray cluster computes them; else this machine.
        jobs: Cells at a time; None for one per GPU, or one.
        address: Of the cluster: "auto", HOST:PORT, or None to start one here.
        gpus_per_cell: On the cluster; may be a fraction.
        shared_data: Whether every node sees data sets at the same paths.
    """

    ray: bool = False
    jobs: int | None = None
    address: str | None = None
    gpus_per_cell: float | None = None
    shared_data: bool = False

    def executor(self) -> Executor:
        """Start them."""
        if self.ray:
            from benchmarks.run.ray_executor import RayExecutor

            return RayExecutor(self.address, self.gpus_per_cell, self.jobs, self.shared_data)
        gpus = visible_gpus()
        return LocalExecutor(self.jobs or max(1, len(gpus)), gpus, os.cpu_count())


def compute(
    table: Table,
    store: Store,
    workers: Workers,
    *,
    quiet: bool = False,
    retry_failed: bool = False,
) -> dict[str, Status]:
    """Run every cell of a table that is not finished.

    Args:
        table: The table whose cells are computed.
        store: Store that keeps the results.
        workers: Who computes them.
        quiet: Whether only errors are said.
        retry_failed: Whether cells that failed before are run again.

    Returns:
        What became of every cell, by key.
    """
    if all(store.is_finished(cell) for cell in table.cells()):
        # Looking for GPUs takes seconds that a finished table does not need.
        executor: Executor = LocalExecutor()
    else:
        executor = workers.executor()
    progress = Progress(table.labels(), quiet)
    grid = Grid(table.cells(), store, executor, STAGES, progress, table.folders, retry_failed)
    return grid.run()
