"""Tables: a grid of configurations, declared in YAML, expanded into rows of cells.

    title: Defense schemes
    axes:                              # every combination is a row
      scheme:
        pure: {train: {scheme: pure}}
        GH: {train: {scheme: GH}, extract: {processes: 2}}
      batch size: {extract.batch-size: [1, 4]}      # short for one flag
    repeats:                           # runs that a row averages over
      extract.target-idx: [0, 10]
    train: {epochs: 10}                # flags of each command, for every row
    extract: {pretrained: train/model_best.pth.tar}
    attack: {epochs: 1000}
    presets:                           # `embedded` may change any of the above
      embedded: {data: photo-patches, train: {epochs: 2}}
    columns: [validation accuracy, psnr, ssim]

What papers report stands under `published` (entries of `where`, `text` and `source`), of
the table or, where it holds for one setting only, of a preset.

`pivot: {AXIS: [columns]}` shows the values of one axis side by side: its rows become one,
with a column per value for each of these columns; the others are those of the first value.

`plugin: MODULE` is the flag `--plugin` of all stages; what the module registers, a metric as
a column too, is known to the table.

`like: schemes` starts from another table: its flags, its `data` and its repeats, and those of
its presets; what this table gives wins. Of the repeats those are left out that vary a flag
which this table or its axes set, and all of them where it has `repeats` of its own (`{}` for
none). Axes, chain, columns, figures and what is published are each table's own, and a table that
is itself `like` another cannot be named. A value `STAGE/FILE` is a file that an earlier stage's
cell of the same row made.

`order: [AXIS, ...]` is the order in which rows are computed, where a run may end before all are.
`compare: {AXIS: VALUE}` names the rows that "change COLUMN" compares the others with, image by
image; a cell of such a table that beats no better than the guesses do is marked.

`budget: 30m` (of the table or a preset) is how long a run lasts unless `--budget` says otherwise:
no cell begins later, and the next run goes on.

A file has at most 512 KiB, 50,000 values (an alias counts as what it stands for) and 32 levels, and
a table 20,000 cells: rows times runs times stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.declare.checks import at_keys, check_names, check_structure, import_plugins, layers
from benchmarks.declare.flags import complaint, known_flags
from benchmarks.declare.names import unknown
from benchmarks.declare.yaml_lines import Document, read_yaml
from benchmarks.run.cells import Cell, Input, hash_json
from benchmarks.run.stages import STAGES, Stage, make_cell
from core.errors import InputError

TABLES = Path(__file__).resolve().parents[1] / "tables"
PRESETS = ("embedded", "small", "paper")
DEFAULT_DATA = "photo-patches"
# Of a table. The largest of ours has some hundred; the paper's grids have some thousand.
MAX_CELLS = 20_000
# Stages whose commands read the data set.
WITH_DATA = ("train", "extract", "tabular")
# Stages whose commands import a module of the user's.
WITH_PLUGINS = ("train", "extract", "attack")

Flags = dict[str, Any]
Overrides = dict[str, Flags]


@dataclass(frozen=True)
class Published:
    """A number from a paper that stands beside a row.

    Attributes:
        where: Axis values of the rows it belongs to.
        text: The value as the paper reports it.
        source: Paper, as a citation or address.
    """

    where: Mapping[str, str]
    text: str
    source: str


@dataclass(frozen=True)
class Row:
    """One row: the cells of its repeats.

    Attributes:
        labels: Value by axis.
        repeats: For each repeat, the cell of every stage by the stage's name.
        published: Values that papers report for the row.
    """

    labels: Mapping[str, str]
    repeats: tuple[Mapping[str, Cell], ...]
    published: tuple[Published, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table under one preset, expanded.

    Attributes:
        name: File name without ending.
        title: Title of the table, in one line.
        description: What it shows, for the report.
        preset: Name of the preset.
        folders: Folders of data sets by the name that configurations use.
        axes: Axis names in order.
        rows: The rows, in the order they are shown.
        columns: Names of columns (`benchmarks.declare.columns`).
        figures: Names of figures (`benchmarks.declare.figures`).
        chain: Stages in order.
        data: Name of the data set that was asked for instead of the preset's; else empty.
        pivot: For the axis whose values are shown side by side, the columns that are shown
            for each of them; empty without one.
        budget: How long a run lasts unless told otherwise, as `--budget` has it; empty: until
            all is done.
        order: Axes by which rows are computed, the slowest first; those of the same values in
            the order in which they are shown.
        compare: The axis and its value that every row is compared with; empty for none.
    """

    name: str
    title: str
    description: str
    preset: str
    folders: Mapping[str, str]
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    figures: tuple[str, ...]
    chain: tuple[str, ...]
    data: str = ""
    pivot: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    budget: str = ""
    order: tuple[str, ...] = ()
    compare: tuple[str, str] | tuple[()] = ()

    def cells(self) -> list[Cell]:
        """Every cell, with repetitions."""
        return [cell for row in self.rows for run in row.repeats for cell in run.values()]

    def turn(self, row: Row) -> tuple[int, ...]:
        """Where a row stands in the order of computation."""
        values = [list(dict.fromkeys(r.labels[axis] for r in self.rows)) for axis in self.order]
        return tuple(v.index(row.labels[axis]) for v, axis in zip(values, self.order, strict=True))

    def only(self, where: Sequence[str]) -> Table:
        """The table with some of its rows.

        Args:
            where: "AXIS=VALUE" words; of one axis any of its values will do, and every axis
                that is named must agree. Empty: all rows.

        Raises:
            InputError: No such axis or value.
        """
        wanted: dict[str, list[str]] = {}
        for word in where:
            axis, equals, value = word.partition("=")
            if not equals or axis not in self.axes:
                known = ", ".join(self.axes)
                raise InputError(f"--where {word}: expected AXIS=VALUE with an axis of {known}")
            values = list(dict.fromkeys(row.labels[axis] for row in self.rows))
            if value not in values:
                raise InputError(f"--where {word}: values of {axis} are {', '.join(values)}")
            wanted.setdefault(axis, []).append(value)
        rows = tuple(
            row
            for row in self.rows
            if all(row.labels[axis] in values for axis, values in wanted.items())
        )
        if not rows:
            raise InputError(f"--where {' '.join(where)}: the table has no such row")
        return dataclasses.replace(self, rows=rows)

    def labels(self) -> dict[str, str]:
        """A name for people for every cell: its stage and what all rows using it share."""
        users: dict[str, list[Mapping[str, str]]] = {}
        stages: dict[str, str] = {}
        for row in self.rows:
            for cell in itertools.chain(*(run.values() for run in row.repeats)):
                users.setdefault(cell.key, []).append(row.labels)
                stages[cell.key] = cell.stage
        return {key: " ".join([stages[key], *_shared(users[key])]) for key in users}


def _shared(labels: Sequence[Mapping[str, str]]) -> list[str]:
    return [value for axis, value in labels[0].items() if all(row[axis] == value for row in labels)]


def table_files() -> dict[str, Path]:
    """The project's own tables by name."""
    return {path.stem: path for path in sorted(TABLES.glob("*.yaml"))}


def find_table(name: str) -> Path:
    """The file of a table given by name or by path.

    Raises:
        InputError: Neither.
    """
    known = table_files()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    raise InputError(f"{unknown('table', name, known)} (or give the path of a .yaml file)")


@dataclass(frozen=True)
class _Axis:
    """An axis: what every value of it changes."""

    name: str
    values: Mapping[str, Overrides] = field(default_factory=dict)


def load_table(
    file: Path,
    preset: str = "embedded",
    data: str | None = None,
    stages: Mapping[str, Stage] = STAGES,
    axes: Mapping[str, Any] | None = None,
) -> Table:
    """Read, check and expand a table.

    Args:
        file: The YAML file.
        preset: One of the file's presets.
        data: Data set instead of the preset's.
        stages: The commands that a table may run, by stage.
        axes: Instead of those in the file.

    Raises:
        InputError: Names the file and the line of what is wrong.
    """
    document = read_yaml(file)
    model = _model(document)
    check_structure(document, preset, model.value if model else {})
    import_plugins(document, model, preset)
    check_names(document)
    if axes is not None:
        document.value["axes"] = dict(axes)
        document.value.get("presets", {}).get(preset, {}).pop("axes", None)
    return _Expansion(document, model, preset, data, stages).table()


def _model(document: Document) -> Document | None:
    """The table that this one is `like`."""
    name = document.value.get("like") if isinstance(document.value, dict) else None
    if name is None:
        return None
    if name not in table_files():
        raise document.error(unknown("table", str(name), table_files()), "like")
    model = read_yaml(table_files()[name])
    if isinstance(model.value, dict) and "like" in model.value:
        raise document.error(
            f"like: {name} itself is like {model.value['like']}; name a table that stands alone",
            "like",
        )
    return model


class _Expansion:
    """Turns a checked document into a table."""

    def __init__(
        self,
        document: Document,
        model: Document | None,
        preset: str,
        data: str | None,
        stages: Mapping[str, Stage],
    ) -> None:
        self._document = document
        self._preset = preset
        self._raw = document.value
        self._model = _Expansion(model, None, preset, data, stages) if model else None
        self._layers = layers(document, model, preset)
        self._stages = stages
        self._chain = tuple(self._raw.get("chain", ("train", "extract", "attack")))
        self._data = str(data or self._last("data", DEFAULT_DATA))
        self._asked_data = data or ""
        self._folders: dict[str, str] = {}
        self._known: dict[str, dict[str, argparse.Action]] = {}
        # Thousands of cells differ in a few flags: each value is looked at once.
        self._checked: set[tuple[str, str, str]] = set()

    def _last(self, key: str, default: str) -> Any:
        """What the last layer that has a key says of it."""
        return [default, *(layer[key] for layer in self._layers if key in layer)][-1]

    def _own(self, key: str) -> Any:
        """What this table, or its preset, says of a key that no model hands down."""
        place = self._raw.get("presets", {}).get(self._preset, {})
        return place.get(key, self._raw.get(key, ""))

    def table(self) -> Table:
        axes = self._axes("axes")
        raw = self._raw
        rows = tuple(self._rows(axes))
        return Table(
            name=self._document.file.stem,
            title=str(raw.get("title", self._document.file.stem)),
            description=str(raw.get("description", "")).strip(),
            preset=self._preset,
            folders=self._folders,
            axes=tuple(axis.name for axis in axes),
            rows=rows,
            columns=tuple(raw["columns"]),
            figures=tuple(raw.get("figures", ())),
            chain=self._chain,
            data=self._data_name(self._asked_data),
            pivot=self._pivot(),
            budget=str(self._own("budget")),
            order=self._order(),
            compare=self._compare(),
        )

    def _order(self) -> tuple[str, ...]:
        given = tuple(map(str, self._raw.get("order", [])))
        for axis in given:
            if axis not in self._axis_names():
                raise self._document.error(unknown("axis", axis, self._axis_names()), "order")
        return given

    def _compare(self) -> tuple[str, str] | tuple[()]:
        given = self._where(self._raw.get("compare", {}), ("compare",))
        if len(given) > 1:
            raise self._document.error("compare: one axis and one of its values", "compare")
        return next(iter(given.items()), ())

    def _pivot(self) -> dict[str, tuple[str, ...]]:
        given = self._raw.get("pivot", {})
        for axis, columns in given.items():
            if str(axis) not in self._axis_names() or len(self._axis_names()) < 2:
                message = unknown("axis to show side by side,", str(axis), self._axis_names())
                raise self._document.error(message, "pivot", axis)
            shown = [str(name) for name in self._raw["columns"]]
            if not isinstance(columns, list) or not set(map(str, columns)) <= set(shown):
                known = ", ".join(shown)
                raise self._document.error(f"pivot: expected a list of {known}", "pivot", axis)
        if len(given) > 1:
            raise self._document.error("pivot: one axis at a time", "pivot")
        return {str(axis): tuple(map(str, columns)) for axis, columns in given.items()}

    def _rows(self, axes: Sequence[_Axis]) -> Iterator[Row]:
        base = self._base()
        repeated_axes = self._repeats(axes)
        self._check_cells(axes, repeated_axes)
        repeats = list(_combinations(repeated_axes))
        published = self._published()
        for labels, overrides in _combinations(axes):
            runs = tuple(self._cells(_merged(base, overrides, repeated)) for _, repeated in repeats)
            mine = tuple(p for p in published if p.where.items() <= labels.items())
            yield Row(labels, runs, mine)

    def _check_cells(self, axes: Sequence[_Axis], repeats: Sequence[_Axis]) -> None:
        """Refuse a table that nobody could compute, before it is expanded."""
        rows, runs = (math.prod(len(axis.values) for axis in part) for part in (axes, repeats))
        cells = rows * runs * len(self._chain)
        if cells > MAX_CELLS:
            raise self._document.error(
                f"the table has {rows} rows of {runs} runs with {len(self._chain)} stages: {cells} "
                f"cells; at most {MAX_CELLS} are expanded",
                "axes",
            )

    def _base(self) -> Overrides:
        """The flags of every row: the table's, then the preset's."""
        given = [{s: part[s] for s in self._chain if s in part} for part in self._layers]
        data = {s: {"data": self._data} for s in self._chain if s in WITH_DATA}
        plugin = self._last("plugin", "")
        plugins = {s: {"plugin": plugin} for s in self._chain if plugin and s in WITH_PLUGINS}
        return _merged(data, plugins, *given)

    def _axes(self, kind: str) -> list[_Axis]:
        """The table's axes, each replaced where the preset gives it.

        A value of a preset's axis that the table's has too starts from the table's flags.
        """
        axes = {name: self._axis(name, (kind, name)) for name in at_keys(self._raw, (kind,))}
        place = ("presets", self._preset, kind)
        for name in at_keys(self._raw, place):
            before = axes.get(name, _Axis(name)).values
            new = self._axis(name, (*place, name)).values
            merged = {label: _merged(before.get(label, {}), new[label]) for label in new}
            axes[name] = _Axis(name, merged)
        return list(axes.values())

    def _repeats(self, axes: Sequence[_Axis]) -> list[_Axis]:
        """The table's own repeats; those of the table that it is `like` if it has none."""
        if any("repeats" in part for part in self._layers[2:]):
            return self._axes("repeats")
        if self._model is None:
            return []
        values = [flags for axis in axes for flags in axis.values.values()]
        own = _set_flags([*self._layers[2:], *values])
        inherited = (self._in_chain(axis) for axis in self._model._axes("repeats"))
        return [axis for axis in inherited if not own & _set_flags(axis.values.values())]

    def _in_chain(self, axis: _Axis) -> _Axis:
        """Without the stages that the table does not have; values that are then the same, once."""
        kept: dict[str, Overrides] = {}
        for label, flags in axis.values.items():
            change = {stage: flags[stage] for stage in self._chain if stage in flags}
            if change not in kept.values():
                kept[label] = change
        return _Axis(axis.name, kept)

    def _axis(self, name: str, place: tuple[Any, ...]) -> _Axis:
        value = at_keys(self._raw, place)
        if isinstance(value, list):
            return self._flag_axis(name, name, value, place)
        flags = [key for key in value if "." in str(key) and isinstance(value[key], list)]
        if flags and len(value) == 1:
            return self._flag_axis(name, flags[0], value[flags[0]], (*place, flags[0]))
        for label, overrides in value.items():
            self._check_overrides(overrides or {}, (*place, label))
        return _Axis(name, {_text(label): dict(over or {}) for label, over in value.items()})

    def _flag_axis(self, name: str, flag: str, values: list[Any], place: Any) -> _Axis:
        stage, _, option = str(flag).partition(".")
        if not option:
            raise self._document.error(f"axis {name}: write STAGE.FLAG: [values]", *place)
        if not values:
            raise self._document.error(f"axis {name} has no values", *place)
        for index, value in enumerate(values):
            self._check_overrides({stage: {option: value}}, (*place, index))
        return _Axis(name, {_text(value): {stage: {option: value}} for value in values})

    def _check_overrides(self, overrides: Any, place: tuple[Any, ...]) -> None:
        if not isinstance(overrides, dict):
            raise self._document.error("expected STAGE: {flag: value}", *place)
        for stage, flags in overrides.items():
            if stage not in self._chain:
                message = unknown("stage", str(stage), self._chain)
                raise self._document.error(message, *place, stage)
            if not isinstance(flags, dict):
                raise self._document.error(f"{stage}: expected {{flag: value}}", *place, stage)

    def _cells(self, flags: Overrides) -> dict[str, Cell]:
        cells: dict[str, Cell] = {}
        for name in self._chain:
            config, inputs = self._split(flags.get(name, {}), cells)
            self._check_flags(name, config)
            cells[name] = make_cell(self._stages[name], config, inputs)
        return cells

    def _split(self, flags: Flags, made: Mapping[str, Cell]) -> tuple[Flags, dict[str, Input]]:
        """Separate plain values from `STAGE/FILE`."""
        config, inputs = {}, {}
        for flag, value in flags.items():
            stage, _, pattern = str(value).partition("/")
            if pattern and stage in made:
                inputs[flag] = Input(made[stage], pattern)
            elif flag == "data":
                config[flag] = self._data_name(str(value))
            elif value is not None:
                config[flag] = value
        return config, inputs

    def _data_name(self, data: str) -> str:
        """A name for the data set that is the same on every machine."""
        if data and Path(data).is_dir():
            name = fingerprint(Path(data))
            self._folders[name] = str(Path(data).resolve())
            return name
        return data

    def _check_flags(self, stage: str, config: Flags) -> None:
        known = self._known_flags(stage)
        for flag, value in config.items():
            if (stage, flag, repr(value)) in self._checked:
                continue
            if known and flag not in known:
                message = unknown(f"flag of {stage},", flag, known)
                raise self._document.error(message, *self._place_of(stage, flag, value))
            wrong = complaint(known.get(flag), value)
            if wrong:
                message = f"{stage} --{flag} {value}: {wrong}"
                raise self._document.error(message, *self._place_of(stage, flag, value))
            self._checked.add((stage, flag, repr(value)))

    def _known_flags(self, stage: str) -> dict[str, argparse.Action]:
        if stage not in self._known:
            self._known[stage] = known_flags(self._stages[stage])
        return self._known[stage]

    def _place_of(self, stage: str, flag: str, value: Any) -> tuple[Any, ...]:
        """Where the file gives a flag this value; where it gives it any, if nowhere."""
        ends = [p for p in self._document.lines if p[-2:] == (stage, flag)]
        short = [p for p in self._document.lines if f"{stage}.{flag}" in p]
        places = [*ends, *short]
        exact = [p for p in places if _at(self._raw, p) == value]
        return next(iter([*exact, *places]), ())

    def _axis_names(self) -> list[str]:
        names = [
            at_keys(self._raw, place) for place in (("axes",), ("presets", self._preset, "axes"))
        ]
        return list(dict.fromkeys(str(name) for axes in names for name in axes))

    def _published(self) -> list[Published]:
        entries = []
        for place in (("published",), ("presets", self._preset, "published")):
            for index, entry in enumerate(at_keys(self._raw, place) or []):
                if not isinstance(entry, dict) or not {"text", "source"} <= entry.keys():
                    raise self._document.error("expected where, text and source", *place, index)
                where = self._where(entry.get("where", {}), (*place, index))
                entries.append(Published(where, str(entry["text"]), str(entry["source"])))
        return entries

    def _where(self, given: Any, place: tuple[Any, ...]) -> dict[str, str]:
        if not isinstance(given, dict) or not given.keys() <= set(self._axis_names()):
            known = ", ".join(self._axis_names())
            raise self._document.error(f"where: expected values of {known}", *place)
        return {str(k): _text(v) for k, v in given.items()}


def _at(value: Any, path: Sequence[Any]) -> Any:
    """What lies at a path of keys and indices; None where it ends early."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _set_flags(parts: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Stage and name of every flag that some part sets."""
    return {(stage, flag) for part in parts for stage in STAGES for flag in at_keys(part, (stage,))}


def _combinations(axes: Sequence[_Axis]) -> Iterator[tuple[dict[str, str], Overrides]]:
    """Labels and merged changes of every combination of the axes' values."""
    for values in itertools.product(*(axis.values.items() for axis in axes)):
        labels = {axis.name: label for axis, (label, _) in zip(axes, values, strict=True)}
        yield labels, _merged(*(overrides for _, overrides in values))


def _merged(*layers: Mapping[str, Mapping[str, Any]]) -> Overrides:
    """Per stage, later layers over earlier ones."""
    result: Overrides = {}
    for layer in layers:
        for stage, flags in layer.items():
            result[stage] = {**result.get(stage, {}), **flags}
    return result


@functools.cache
def fingerprint(folder: Path) -> str:
    """The folder's name and a hash of the names and sizes of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in files]
    return f"{folder.resolve().name}@{hash_json(sizes, 8)}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
