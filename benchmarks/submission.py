"""An entry on the leaderboard: measured by the protocol, or, unranked, from a table's rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack.knowledge.threat_models import find_threat
from benchmarks.compute import Workers, compute
from benchmarks.declare.tables import Table, find_table, load_table
from benchmarks.declare.yaml_lines import read_yaml
from benchmarks.leaderboard import estimate, measure
from benchmarks.leaderboard.entry import BoardEntry, read_entry
from benchmarks.leaderboard.measure import About
from benchmarks.leaderboard.plan import Candidate, Plan
from benchmarks.leaderboard.protocol import Protocol, read_protocol
from benchmarks.run.executor import usable_cores
from benchmarks.run.store import Store
from benchmarks.show.leaderboard import FOLDER
from benchmarks.show.results import DEFAULT_STORE, RowResult, TableResult, collect
from benchmarks.show.table_entries import check_entry, make_entry
from core.errors import InputError
from core.plugins import import_plugin
from core.storage import write_json
from gradients.defenses import parse_defenses
from gradients.private_gradient import PrivacySettings

NO_DEFENSE = "none"
OWN_ENTRIES = Path(__file__).resolve().parent / "leaderboard" / "entries.yaml"


@dataclass(frozen=True)
class Measurement:
    """A defense that the protocol is to be run on.

    Attributes:
        about: Its name, and what else an entry says of it in words.
        apply: "NAME:PARAM,..." as `--defense` takes it; "none" for no defense.
        threat: Name or letter of the attacker; None for the protocol's first.
        plugin: Module that registers the defense.
        sigma: Noise multiplier of DP-SGD beside it; None: no DP-SGD.
    """

    about: About
    apply: str
    threat: str | None = None
    plugin: str | None = None
    sigma: float | None = None

    def plan(self, protocol: Protocol) -> Plan:
        """What is computed for it.

        Raises:
            InputError: No such defense, attacker or plugin, or a name that is none.
        """
        import_plugin(self.plugin)
        words = "" if self.apply == NO_DEFENSE else self.apply
        parse_defenses(words)
        file_stem(self.about.defense)
        if self.sigma is not None:
            PrivacySettings(noise_multiplier=self.sigma)
        threat = protocol.chosen_threat(self.threat)
        return Plan(protocol, Candidate(words, threat, self.plugin, self.sigma))


@dataclass(frozen=True)
class Desk:
    """Where entries are computed and kept.

    Attributes:
        store: Folder of the cells.
        entries: Folder of the entries.
        jobs: Cells at a time; None: one per core.
        quiet: Whether only errors are said.
        protocol: By which entries are measured.
        say: Receives what is said before and after.
    """

    store: Path = DEFAULT_STORE
    entries: Path = FOLDER
    jobs: int | None = None
    quiet: bool = False
    protocol: Protocol | None = None
    say: Callable[[str], None] = print

    def chosen(self) -> Protocol:
        """The protocol; that of the repository where none is given."""
        return self.protocol or read_protocol()

    def tell(self, sentence: str) -> None:
        """Say something, unless nothing is to be said."""
        if not self.quiet:
            self.say(sentence)


def submit_measured(measurement: Measurement, desk: Desk) -> Path:
    """Measure a defense by the protocol and write its entry.

    What was computed before, by an interrupted run too, is not computed again.

    Returns:
        The entry's file.

    Raises:
        InputError: The defense cannot be measured.
    """
    plan = measurement.plan(desk.chosen())
    store = Store(desk.store.resolve())
    missing = measure.unfinished(plan, store)
    jobs = desk.jobs or len(usable_cores())
    if missing:
        seconds = estimate.seconds_of(plan, missing)
        desk.tell(
            f"{plan.protocol.name}, {measurement.about.defense}: {len(missing)} parts to compute, "
            f"{estimate.in_words(seconds, jobs)}; interrupted, the same command goes on"
        )
    measure.compute(plan, store, Workers(jobs=jobs), quiet=desk.quiet)
    entry = measure.make_entry(plan, store, measurement.about)
    path = _place(desk.entries, entry, plan.protocol)
    measure.write_entry(entry, path)
    return path


def submit_own(desk: Desk) -> list[Path]:
    """Measure every entry of the project's own list that is missing, one after the other.

    Returns:
        The new files.
    """
    protocol = desk.chosen()
    listed = own_entries()
    for measurement in listed:
        measurement.plan(protocol)
    missing = [m for m in listed if not _is_measured(m, desk, protocol)]
    desk.tell(f"{len(listed) - len(missing)} of {len(listed)} entries are there")
    return [submit_measured(measurement, desk) for measurement in missing]


def own_entries(file: Path = OWN_ENTRIES) -> list[Measurement]:
    """The project's own list of defenses.

    Raises:
        InputError: The file is no such list.
    """
    document = read_yaml(file)
    try:
        return [
            Measurement(
                About(entry["name"], entry["description"], entry.get("reference")),
                entry["apply"],
                sigma=entry.get("sigma"),
            )
            for entry in document.value
        ]
    except (KeyError, TypeError) as error:
        raise document.error(f"no list of entries: {error}") from None


def _is_measured(measurement: Measurement, desk: Desk, protocol: Protocol) -> bool:
    path = desk.entries / f"{file_stem(measurement.about.defense)}.json"
    if not path.exists():
        return False
    try:
        return read_entry(path).fingerprint == protocol.fingerprint
    except InputError:
        # Of an older form.
        return False


def _place(folder: Path, entry: BoardEntry, protocol: Protocol) -> Path:
    """The file of an entry; those of another attacker than the default say so."""
    stem = file_stem(entry.defense)
    default = entry.threat == protocol.threats[0]
    return folder / f"{stem if default else f'{stem}-{entry.threat}'}.json"


@dataclass(frozen=True)
class Defended:
    """A defense that all attacks are to be run on.

    Attributes:
        apply: "NAME:PARAM,..." as `--defense` of stage 2 takes it; "none" for no defense.
        threat: Name of the threat model.
        plugin: Module that registers the defense.
        budget: Gradient evaluations per run; None for the table's own.
        jobs: Cells at a time; None: one per core.
        quiet: Whether no progress is said.
    """

    apply: str
    threat: str = "honest-server"
    plugin: str | None = None
    budget: int | None = None
    jobs: int | None = 1
    quiet: bool = False


@dataclass(frozen=True)
class Submission:
    """What is to be entered without a rank: rows of a table.

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
    """Write the unranked entry of a defense.

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
    path = submission.entries / f"{file_stem(submission.defense)}.json"
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


def file_stem(defense: str) -> str:
    """The name of an entry's file, without its ending.

    Raises:
        InputError: Nothing is left of the defense's name.
    """
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
    chosen = result.table.only(where).rows
    return [row for row in result.rows if row.row in chosen]
