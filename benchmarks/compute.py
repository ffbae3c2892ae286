"""Computing what a table declares: its cells, on this machine or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.declare.tables import Table
from benchmarks.run.cells import in_order
from benchmarks.run.executor import Executor, LocalExecutor, usable_cores, visible_gpus
from benchmarks.run.grid import Grid, Status
from benchmarks.run.progress import Progress
from benchmarks.run.stages import STAGES, Stage
from benchmarks.run.store import Store


@dataclass(frozen=True)
class Workers:
    """Who computes cells.

    Attributes:
        ray: Whether a Ray cluster computes them; else this machine.
        jobs: Cells at a time; None for one per GPU, or else per processor core.
        address: Of the cluster: "auto", HOST:PORT, or None to start one here.
        gpus_per_cell: On the cluster; may be a fraction.
        shared_data: Whether every node sees data sets at the same paths.
        fresh: Whether every cell starts a new interpreter.
    """

    ray: bool = False
    jobs: int | None = None
    address: str | None = None
    gpus_per_cell: float | None = None
    shared_data: bool = False
    fresh: bool = False

    def executor(self, stages: Iterable[Stage]) -> Executor:
        """Start them.

        Args:
            stages: What they will run.
        """
        if self.ray:
            from benchmarks.run.ray_executor import RayExecutor

            return RayExecutor(self.address, self.gpus_per_cell, self.jobs, self.shared_data)
        gpus, cores = visible_gpus(), usable_cores()
        imports = None if self.fresh else sorted({name for s in stages for name in s.imports or ()})
        return LocalExecutor(self.jobs or len(gpus) or len(cores), gpus, cores, imports)


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
        executor = workers.executor({STAGES[cell.stage] for cell in in_order(table.cells())})
    progress = Progress(table.labels(), quiet)
    grid = Grid(table.cells(), store, executor, STAGES, progress, table.folders, retry_failed)
    return grid.run()
