"""A table's results: what the store knows about every row, summarised."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.declare.columns import Column, View, find_view
from benchmarks.declare.records import Run
from benchmarks.declare.tables import Row, Table
from benchmarks.run.cells import ROOT, Cell
from benchmarks.run.store import Store
from benchmarks.show.statistics import Summary, summarize, with_worst

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_STORE = ROOT / "results" / "store"


@dataclass(frozen=True)
class RowResult:
    """One row with its numbers.

    Attributes:
        row: Declaration of the row.
        runs: Records of the finished stages, by repeat.
        summaries: By column name; None where there is no value.
        notes: By column name, why there is none.
        errors: What failed, one sentence per cell.
        texts: By column name, what a column of words says.
        changes: By column name, the paired difference from the row of the same attack that the
            table compares with; None where there is no pair.
        beaten_by: By column name, the guess that leaked no less; absent where the row beats all.
    """

    row: Row
    runs: tuple[Run, ...]
    summaries: Mapping[str, Summary | None]
    notes: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Summary | None] = field(default_factory=dict)
    beaten_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """Whether the last stage of some repeat is finished, or something has failed."""
        ends = zip(self.row.repeats, self.runs, strict=True)
        return bool(self.errors) or any([*cells][-1] in run.records for cells, run in ends)


@dataclass(frozen=True)
class ShownColumn:
    """A column as a reader sees it.

    Attributes:
        view: The column that the value belongs to.
        value: Of the axis that is shown side by side; None for columns that are shown once.
    """

    view: View
    value: str | None = None

    @property
    def header(self) -> str:
        """What readers see."""
        return self.view.header if self.value is None else f"{self.view.header} ({self.value})"


@dataclass(frozen=True)
class Line:
    """A row as a reader sees it: one row, or those of an axis shown side by side.

    Attributes:
        labels: Value by axis that is shown at the left.
        rows: By value of the axis that is shown side by side.
    """

    labels: Mapping[str, str]
    rows: Mapping[str | None, RowResult]

    @property
    def first(self) -> RowResult:
        """The row whose numbers stand in columns that are shown once."""
        return next(iter(self.rows.values()))

    @property
    def errors(self) -> tuple[str, ...]:
        """What failed in any of its rows, each once."""
        return tuple(dict.fromkeys(error for row in self.rows.values() for error in row.errors))

    def row(self, column: ShownColumn) -> RowResult:
        """Whose numbers stand in a column."""
        return self.first if column.value is None else self.rows[column.value]


@dataclass(frozen=True)
class TableResult:
    """A table with its numbers.

    Attributes:
        table: Declaration of the table.
        views: Columns of the table.
        rows: The rows, in the order they are shown.
        baselines: For guesses that know nothing of the gradient: by name, by metric.
    """

    table: Table
    views: tuple[View, ...]
    rows: tuple[RowResult, ...]
    baselines: Mapping[str, Mapping[str, Summary]]

    @property
    def shown_axes(self) -> tuple[str, ...]:
        """The axes whose values stand at the left."""
        return tuple(axis for axis in self.table.axes if axis not in self.table.pivot)

    def shown_columns(self) -> list[ShownColumn]:
        """The columns, those of the pivot once per value of its axis."""
        axis, split = next(iter(self.table.pivot.items()), (None, ()))
        values = [] if axis is None else dict.fromkeys(row.row.labels[axis] for row in self.rows)
        columns: list[ShownColumn] = []
        for name, view in zip(self.table.columns, self.views, strict=True):
            sides = [*values] if name in split else [None]
            columns += [ShownColumn(view, side) for side in sides]
        return columns

    def lines(self) -> list[Line]:
        """The rows, those that differ in the axis of the pivot alone as one."""
        axis = next(iter(self.table.pivot), None)
        lines: dict[tuple[str, ...], Line] = {}
        for row in self.rows:
            labels = {name: row.row.labels[name] for name in self.shown_axes}
            line = lines.setdefault(tuple(labels.values()), Line(labels, {}))
            side = None if axis is None else row.row.labels[axis]
            lines[tuple(labels.values())] = Line(labels, {**line.rows, side: row})
        return list(lines.values())

    def shown_lines(self) -> list[Line]:
        """All of them; of a table with a budget, which may end before all rows, those begun."""
        lines = self.lines()
        if not self.table.budget:
            return lines
        return [line for line in lines if any(row.has_begun for row in line.rows.values())]


def collect(table: Table, store: Store) -> TableResult:
    """Read a table's results from the store; cells that are missing leave gaps."""
    views = tuple(find_view(str(name)) for name in table.columns)
    rows = tuple(_row(row, views, store) for row in table.rows)
    if table.compare:
        rows = tuple(_compared(row, rows, views, *table.compare) for row in rows)
    return TableResult(table, views, rows, _baselines(rows))


def _row(row: Row, views: Iterable[View], store: Store) -> RowResult:
    runs = tuple(_run(cells, store) for cells in row.repeats)
    summaries, notes = {}, {}
    for column in (view.column for view in views):
        summaries[column.name] = summary_of(row, runs, column)
        if summaries[column.name] is None:
            notes[column.name] = _why_missing(column, runs)
    errors = dict.fromkeys(e for cells in row.repeats for e in _errors(cells, store))
    return RowResult(row, runs, summaries, notes, tuple(errors), _texts(runs, views))


def summary_of(row: Row, runs: Sequence[Run], column: Column) -> Summary | None:
    """A column's values over a row's repeats; None where there are none.

    Args:
        row: Whose repeats they are.
        runs: What is known of each.
        column: What is summarised.
    """
    values = [column.values(run) for run in runs]
    summary = summarize(_per_target(row, values))
    # The worst is that of any attack, not of a mean over several.
    return with_worst(summary, itertools.chain(*values), column.leak)


def _compared(
    row: RowResult, rows: Iterable[RowResult], views: Iterable[View], axis: str, value: str
) -> RowResult:
    """The row with its changes from its like that has another value of an axis."""
    wanted = {**row.row.labels, axis: value}
    like = next((other for other in rows if other.row.labels == wanted), None)
    columns = {view.column.name: view.column for view in views if view.column.text is None}
    changes = {
        name: None if like is None or like is row else _change(column, row, like)
        for name, column in columns.items()
    }
    guessed = {name: _better_guess(column, row) for name, column in columns.items()}
    beaten = {name: guess for name, guess in guessed.items() if guess is not None}
    return dataclasses.replace(row, changes=changes, beaten_by=beaten)


def _change(column: Column, row: RowResult, like: RowResult) -> Summary | None:
    """Differences between two rows, image by image, over the repeats that both have."""
    differences: list[list[float]] = []
    for mine, other in zip(row.runs, like.runs, strict=True):
        pair = column.values(mine), column.values(other)
        same = len(pair[0]) == len(pair[1])
        differences.append([a - b for a, b in zip(*pair, strict=True)] if same else [])
    return summarize(_per_target(row.row, differences))


def _per_target(row: Row, values: Sequence[Sequence[float]]) -> list[float]:
    """The values of all repeats, of several attacks on one target their mean per image.

    Attacks from several starts on the same images are not as many images: an interval over all
    of them would be too narrow.

    Args:
        row: Whose repeats they are.
        values: Of each repeat; empty where there are none.
    """
    targets: dict[tuple[str, ...], list[Sequence[float]]] = {}
    for cells, found in zip(row.repeats, values, strict=True):
        before = tuple(cell.key for stage, cell in cells.items() if stage != "attack")
        if found:
            targets.setdefault(before or tuple(c.key for c in cells.values()), []).append(found)
    means: list[float] = []
    for attacks in targets.values():
        if len({len(found) for found in attacks}) == 1:
            means += [sum(image) / len(image) for image in zip(*attacks, strict=True)]
        else:
            means += itertools.chain(*attacks)
    return means


def _better_guess(column: Column, row: RowResult) -> str | None:
    """The best of the guesses that know nothing of the gradient, if the row does not beat it."""
    mine = row.summaries[column.name]
    guesses = _baselines([row])
    known = {name: m[column.name].mean for name, m in guesses.items() if column.name in m}
    if mine is None or column.leak is None or not known:
        return None
    sign = 1 if column.leak == "high" else -1
    best = max(known, key=lambda name: sign * known[name])
    return best if sign * known[best] >= sign * mine.mean else None


def _texts(runs: Iterable[Run], views: Iterable[View]) -> dict[str, str]:
    """What columns of words say, each word once."""
    runs = list(runs)
    texts = {}
    for column in (view.column for view in views):
        words = [column.text(run) for run in runs] if column.text is not None else []
        found = dict.fromkeys(word for word in words if word)
        if found:
            texts[column.name] = "; ".join(found)
    return texts


def _run(cells: Mapping[str, Cell], store: Store) -> Run:
    results = {stage: store.result(cell) for stage, cell in cells.items()}
    return Run({stage: result for stage, result in results.items() if result is not None})


def _why_missing(column: Column, runs: Iterable[Run]) -> str:
    return next(filter(None, (column.note(run) for run in runs)), column.missing)


def _errors(cells: Mapping[str, Cell], store: Store) -> list[str]:
    """The first stage that failed; the later ones could not run."""
    for stage, cell in cells.items():
        failure = store.failure(cell)
        if failure is not None:
            return [f"{stage} failed: {failure['error']}"]
    return []


def _baselines(rows: Iterable[RowResult]) -> dict[str, dict[str, Summary]]:
    """Every baseline's metrics, over the runs of all rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in (run for row in rows for run in row.runs):
        for name, metrics in run.baselines.items():
            for metric, value in metrics.items():
                if value.get("mean") is not None:
                    found.setdefault(name, {}).setdefault(metric, []).append(value["mean"])
    return {
        name: {m: s for m, values in metrics.items() if (s := summarize(values)) is not None}
        for name, metrics in found.items()
    }


def load_results(store: str | Path = DEFAULT_STORE) -> pd.DataFrame:
    """Every finished cell of a store as one row.

    Args:
        store: Folder of the store.

    Returns:
        Columns `key`, `stage`, `folder`, then `config.FLAG`, and the numbers and
        texts of the result (`result.seconds`, `result.evaluation.summary.psnr.mean`, ...).
    """
    import pandas as pd

    return pd.json_normalize(list(Store(Path(store)).records()))
