"""Cells of the toy command: what grids are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.run.cells import Cell, Input
from benchmarks.run.executor import LocalExecutor
from benchmarks.run.grid import Grid
from benchmarks.run.progress import Progress
from benchmarks.run.stages import Stage
from benchmarks.run.store import Store

COMMAND = str(Path(__file__).with_name("toy_command.py"))
TOY = Stage(
    name="toy",
    script=(COMMAND,),
    rooms=(),
    outputs=lambda folder: {"out": str(folder)},
    record="record.json",
    imports=("json",),
)
STAGES = {"toy": TOY}


def toy(add: Cell | None = None, **config: Any) -> Cell:
    """A cell whose result is `value`, plus that of `add`."""
    flags = {name.replace("_", "-"): value for name, value in config.items()}
    inputs = {} if add is None else {"add": Input(add, "number.json")}
    return Cell("toy", flags, inputs)


def grid(cells: list[Cell], store: Store, **options: Any) -> Grid:
    """A quiet grid of toy cells on this machine."""
    imports = options.pop("imports", None)
    executor = options.pop("executor", None) or LocalExecutor(2, imports=imports)
    stages = options.pop("stages", STAGES)
    return Grid(cells, store, executor, stages, Progress(quiet=True), **options)
