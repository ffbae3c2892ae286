"""The record of all cells, and the page that shows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from attack.knowledge.labels.fit import EXPLAINED
from benchmarks.label_rules.measure import BATCHES, STATES, Cell, Setting
from benchmarks.label_rules.networks import BATCH, NETWORKS, ONE_SIGN, STEPS
from benchmarks.show.statistics import bootstrap_interval
from core.storage import write_record

FILE = "label_rules.json"
COMMAND = "python -m benchmarks.label_rules"
DEFAULT = "exact"


class Record:
    """What was measured so far.

    Args:
        path: The file that keeps it.
        cells: Of all settings that are done.
    """

    def __init__(self, path: Path, cells: Sequence[Cell]) -> None:
        self.path, self.cells = path, {cell.setting: cell for cell in cells}

    @staticmethod
    def read(folder: Path) -> Record:
        """The record in a folder; an empty one where there is none."""
        path = folder / FILE
        if not path.is_file():
            return Record(path, [])
        stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells = [Cell(**cell | {"setting": Setting(**cell["setting"])}) for cell in stored]
        return Record(path, cells)

    def holds(self, setting: Setting, batches: int) -> bool:
        """Whether so many batches of a setting were measured."""
        cell = self.cells.get(setting)
        return cell is not None and len(cell.accuracy[DEFAULT]) >= batches

    def add(self, cell: Cell) -> None:
        """Put a cell in, and write the file anew."""
        self.cells[cell.setting] = cell
        cells = [dataclasses.asdict(each) for each in self.cells.values()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_record(self.path, {"command": COMMAND, "cells": cells})

    def page(self) -> str:
        """The page of the documents that shows it, in Markdown."""
        parts = ["# How many labels each rule recovers", _INTRODUCTION]
        for state in STATES:
            cells = [cell for cell in self.cells.values() if cell.setting.state == state]
            if cells:
                parts += [f"## {_TITLES[state]}", _by_rule(cells), _by_network(cells)]
                parts += filter(None, [_misfits(cells)])
        return "\n\n".join(parts) + "\n"


_TITLES = {"initial": "Freshly initialised networks", "trained": "Trained networks"}
_INTRODUCTION = f"""<!-- Written by docs/generate.py from results/label_rules/label_rules.json. -->
Batches of photographs (32 px, ten classes or two) through {len(NETWORKS)} small networks in train
mode, dropout and stochastic depth active. The head of all but the last one reads features of both
signs, which the published sign rules do not assume. Labels count as a multiset; in brackets the
95 % interval of the mean, by bootstrap over batches. K is the number of images; "two" are two
classes with one image of each. Trained networks took {STEPS} steps of Adam on batches of {BATCH}.
`{COMMAND}` measures what is missing."""


def _by_rule(cells: Sequence[Cell]) -> str:
    """All rules, over the networks with signed features."""
    signed = [cell for cell in cells if cell.setting.network != ONE_SIGN]
    names = dict.fromkeys(rule for cell in signed for rule in cell.accuracy)
    rows = [(f"`{rule}`", *(_mean(signed, rule, batch) for batch in BATCHES)) for rule in names]
    n = len({cell.setting.network for cell in signed})
    return f"Over {n} networks with signed features:\n\n" + _table(("Rule", *_heads()), rows)


def _by_network(cells: Sequence[Cell]) -> str:
    """The default rule, by network."""
    rows = []
    for name in NETWORKS:
        own = [cell for cell in cells if cell.setting.network == name]
        if own:
            rows.append((name, *(_mean(own, DEFAULT, batch) for batch in BATCHES)))
    return f"The default rule, `{DEFAULT}`, by network:\n\n" + _table(("Network", *_heads()), rows)


def _heads() -> Iterator[str]:
    for classes, images in BATCHES:
        yield "two" if classes == images else f"K = {images}"


def _mean(cells: Sequence[Cell], rule: str, batch: tuple[int, int]) -> str:
    values = [
        value
        for cell in cells
        if (cell.setting.classes, cell.setting.images) == batch
        for value in cell.accuracy.get(rule, ())
    ]
    if not values:
        return ""
    low, high = bootstrap_interval(np.asarray(values)) if len(values) > 1 else (values[0],) * 2
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}], n = {len(values)}"


def _misfits(cells: Sequence[Cell]) -> str:
    """What right and wrong labels leave of the gradient."""
    right = np.asarray([value for cell in cells for value in cell.right])
    wrong = np.asarray([value for cell in cells for value in cell.wrong])
    if not len(right):
        return ""
    return (
        f"Of the last layer's gradient the true labels left {np.median(right):.1e} unexplained in "
        f"the median of {len(right)} batches ({_below(right)} below {EXPLAINED:g}, where they pass "
        f"for right), labels with one exchanged {np.median(wrong):.1e} ({_below(wrong)} below it)."
    )


def _below(values: np.ndarray) -> str:
    return f"{int((values < EXPLAINED).sum())} of {len(values)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_of(folder: Path) -> str:
    """The page of the documents that shows the record in a folder."""
    return Record.read(folder).page()
