"""A defense's entry on the leaderboard: computed here by all attacks, or from a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack.knowledge.threat_models import find_threat
from benchmarks.compute import Workers, compute
from benchmarks.declare.tables import Table, find_table, load_table
from benchmarks.run.store import Store
from benchmarks.show.leaderboard import FOLDER, check_entry, make_entry
from benchmarks.show.results import DEFAULT_STORE, RowResult, TableResult, collect
from core.errors import InputError
from core.plugins import import_plugin
from core.storage import write_json
from gradients.defenses import parse_defenses

NO_DEFENSE = "none"


@dataclass(frozen=True)
class Defended:
    """A defense that all attacks are to be run on.

    Attributes:
        apply: "NAME:PARAM,..." as `--defense` of stage 2 takes it; "none" for no defense.
        threat: Name of the threat model.
        plugin: Module that registers the defense.
        budget: Gradient evaluations per run; None for the table's own.
        jobs: Cells at a time.
        quiet: Whether no progress is said.
    """

    apply: str
    threat: str = "honest-server"
    plugin: str | None = None
    budget: int | None = None
    jobs: int = 1
    quiet: bool = False


@dataclass(frozen=True)
class Submission:
    """What is to be entered.

    Attributes:
        defense: Name of the defense on the leaderboard.
        source: What all attacks are to be run on, or a table that was computed and holds
            the defense (its name, or a YAML file).
        where: "AXIS=VALUE" of the table's rows that count; all rows if empty.
        description: The defense in one sentence.
        reference: Paper or address.
        utility: Accuracy in percent of a model trained under it; None for the table's.
        preset: Preset of the table.
        data: Data set instead of the preset's.
        store: Folder of the cells.
        entries: Folder of the entries.
    """

    defense: str
    source: Defended | str
    where: tuple[str, ...] = ()
    description: str = ""
    reference: str | None = None
    utility: float | None = None
    preset: str = "embedded"
    data: str | None = None
    store: Path = DEFAULT_STORE
    entries: Path = FOLDER


def submit(submission: Submission) -> Path:
    """Write the entry of a defense.

    Returns:
        The entry's file.

    Raises:
        InputError: The defense, its rows or its name are not what an entry can be made of.
    """
    store = Store(submission.store.resolve())
    rows = _rows(submission, store)
    entry = make_entry(rows, submission.defense, submission.description, submission.reference)
    if submission.utility is not None:
        entry["utility"] = submission.utility
        check_entry(entry, "--utility")
    path = submission.entries / f"{_stem(submission.defense)}.json"
    write_json(path, entry)
    return path


def _rows(submission: Submission, store: Store) -> list[RowResult]:
    source = submission.source
    if isinstance(source, Defended):
        table = ensemble_table(submission.defense, source, submission.preset, submission.data)
        compute(table, store, Workers(jobs=source.jobs), quiet=source.quiet, retry_failed=True)
    else:
        table = load_table(find_table(source), submission.preset, submission.data)
    return _chosen_rows(collect(table, store), submission.where)


def _stem(defense: str) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", defense.lower()).strip("-")
    if not stem:
        raise InputError(f"--defense {defense}: a file name needs a Latin letter or digit")
    return stem


def ensemble_table(
    name: str, defended: Defended, preset: str = "embedded", data: str | None = None
) -> Table:
    """The leaderboard's table with one defense as its only row.

    Args:
        name: Name of the defense on the leaderboard.
        defended: The defense, and what the attacks may do.
        preset: Preset of the table.
        data: Data set instead of the preset's.

    Raises:
        InputError: No such defense, threat model or plugin.
    """
    import_plugin(defended.plugin)
    find_threat(defended.threat)
    words = "" if defended.apply == NO_DEFENSE else defended.apply
    parse_defenses(words)
    attack = {
        "threat": defended.threat,
        "plugin": defended.plugin,
        "epochs": defended.budget,
    }
    flags: dict[str, dict[str, Any]] = {
        "extract": {"defense": words or None, "plugin": defended.plugin},
        "attack": {flag: value for flag, value in attack.items() if value is not None},
    }
    return load_table(find_table("ensemble"), preset, data, axes={"defense": {name: flags}})


def _chosen_rows(result: TableResult, where: Sequence[str]) -> list[RowResult]:
    wanted = {}
    for word in where:
        axis, equals, value = word.partition("=")
        if not equals or axis not in result.table.axes:
            known = ", ".join(result.table.axes)
            raise InputError(f"--where {word}: expected AXIS=VALUE with an axis of {known}")
        wanted[axis] = value
    rows = [row for row in result.rows if wanted.items() <= row.row.labels.items()]
    if not rows:
        raise InputError(f"--where {' '.join(where)}: the table has no such row")
    return rows
