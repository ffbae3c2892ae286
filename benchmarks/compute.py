"""Computing what a table declares: its cells, on this machine or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.declare.tables import Table
from benchmarks.run.cells import ROOT, Cell, in_order
from benchmarks.run.committed import Committed
from benchmarks.run.costs import Costs, in_words
from benchmarks.run.executor import Executor, LocalExecutor, usable_cores, visible_gpus
from benchmarks.run.grid import Grid, Status
from benchmarks.run.progress import Progress
from benchmarks.run.stages import STAGES, Stage
from benchmarks.run.store import Store

REFERENCE = ROOT / "results" / "reference"


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
        targets_at_once: Targets of one model that one process attacks at once; 1: each alone.
        cell_seconds: After which a cell is ended; None: no limit.
    """

    ray: bool = False
    jobs: int | None = None
    address: str | None = None
    gpus_per_cell: float | None = None
    shared_data: bool = False
    fresh: bool = False
    targets_at_once: int = 1
    cell_seconds: float | None = None

    def executor(self, stages: Iterable[Stage]) -> Executor:
        """Start them.

        Args:
            stages: What they will run.
        """
        imports = None if self.fresh else sorted({name for s in stages for name in s.imports or ()})
        if self.ray:
            from benchmarks.run.ray_executor import RayExecutor

            return RayExecutor(
                self.address,
                self.gpus_per_cell,
                self.jobs,
                self.shared_data,
                imports=imports,
                limit=self.cell_seconds,
            )
        gpus, cores = visible_gpus(), usable_cores()
        jobs = self.jobs or len(gpus) or len(cores)
        return LocalExecutor(jobs, gpus, cores, imports, self.cell_seconds)


def compute(
    table: Table,
    store: Store,
    workers: Workers,
    *,
    quiet: bool = False,
    retry_failed: bool = False,
    seconds: float | None = None,
) -> dict[str, Status]:
    """Run every cell of a table that is not finished.

    Args:
        table: The table whose cells are computed.
        store: Store that keeps the results.
        workers: Who computes them.
        quiet: Whether only errors are said.
        retry_failed: Whether cells that failed before are run again.
        seconds: After so many no further cell is started; None: no limit.

    Returns:
        What became of every cell, by key.
    """
    cells = wanted_cells(table, store)
    if all(store.is_finished(cell) for cell in cells):
        # Looking for GPUs takes seconds that a finished table does not need.
        executor: Executor = LocalExecutor()
    else:
        executor = workers.executor({STAGES[cell.stage] for cell in in_order(cells)})
    grid = Grid(
        cells,
        store,
        executor,
        STAGES,
        Progress(table.labels(), quiet),
        table.folders,
        retry_failed,
        1 if workers.ray else workers.targets_at_once,
        seconds,
    )
    return grid.run()


def wanted_cells(table: Table, store: Store) -> list[Cell]:
    """A table's cells without those whose results are committed and what only these need."""
    rows = sorted(table.rows, key=table.turn)
    chains = (list(run.values()) for row in rows for run in row.repeats)
    return store.still_wanted(chains)


def say_costs(table: Table, store: Store, workers: Workers, seconds: float | None) -> str:
    """One sentence on how long a table takes, from what cells like its own have cost.

    Args:
        table: The table.
        store: Has the records.
        workers: How many cells run at a time.
        seconds: After which no further cell is started.
    """
    to_do = [c for c in in_order(wanted_cells(table, store)) if not store.is_finished(c)]
    if not to_do:
        return "every cell is finished"
    total, unknown = Costs(store, table.cells(), _reference(table)).total(to_do)
    jobs = workers.jobs or len(visible_gpus()) or len(usable_cores())
    parts = []
    if unknown < len(to_do):
        by = f"{jobs} processes" if jobs > 1 else "one process"
        parts.append(f"about {in_words(total / jobs)} on {by} by recorded costs")
    if unknown:
        parts.append(f"nobody has recorded what {unknown} of them cost")
    limit = "" if seconds is None else f"; no cell begins after {in_words(seconds)} (--budget)"
    return f"{len(to_do)} cells to compute: {', and '.join(parts)}{limit}"


def _reference(table: Table) -> Committed:
    """The committed cells of one of the project's tables, from which a fresh checkout estimates."""
    file = REFERENCE / table.name / f"{table.name}.json"
    return Committed.read(file) if file.is_file() else Committed()
