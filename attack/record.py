"""What stage 3 hands to whoever reads its results: typed records with a version.

One writer (`to_json`) and one reader (`read_record`). A record without a version was written
before there was one; what it lacks takes the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from core.errors import InputError
from core.reading import read_json
from core.records import check_types

SCHEMA_VERSION = 1
# Plain values, as JSON has them.
Plain = dict[str, Any]
R = TypeVar("R", bound="RunRecord")


@dataclass(kw_only=True)
class RunRecord:
    """What every run of stage 3 states.

    Attributes:
        key: Identifies the run: the same key, the same numbers.
        status: "finished", or why the attack ended early.
        threat: Threat model: name, what it grants, whether the attack adapts to a defense.
        arguments: The command line.
        target: What was inverted, see `gradients.record.describe`.
        provenance: Versions, device, threads, seed, processes.
        seconds: Wall-clock time.
        tables: The tables that were printed.
        schema_version: Of this layout; 0 for records written before there was one.
    """

    key: str
    status: str = "finished"
    threat: Plain = field(default_factory=dict)
    arguments: Plain = field(default_factory=dict)
    target: Plain = field(default_factory=dict)
    provenance: Plain = field(default_factory=dict)
    seconds: float = 0.0
    tables: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> Plain:
        """The record as plain values; measurements that were not asked for are absent."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            name: value for name, value in values.items() if value is not None or name == "config"
        }


@dataclass(kw_only=True)
class AttackRecord(RunRecord):
    """One attack on one target.

    Attributes:
        attack: Its name.
        config: Its settings by name; None where it has none.
        iterations: Number of finished iterations.
        objective: The gradient loss of the result.
        labels: The N labels of the result; what else the client's loss takes as lists.
        details: Further plain values of the attack.
        trace: One dictionary per printed iteration.
        psnr_curve: Mean PSNR (dB) by iteration, under `--metric`.
        pictures: Names of the pictures beside the record.
        label_accuracy: Share of right labels, under `--metric`.
        evaluation: See `attack.metrics.Evaluation.to_record`, under `--metric`.
        worst_case: See `attack.metrics.worst_case`, of an ensemble under `--metric`.
        GInfoR: Gradient information ratio, under `--GInfoR`.
        recovered: Some sentences or records beside the true ones, under `--metric`; see
            `attack.recovered`.
    """

    attack: str
    config: Plain | None = None
    iterations: int = 0
    objective: float | None = None
    labels: list[Any] = field(default_factory=list)
    details: Plain = field(default_factory=dict)
    trace: list[Plain] = field(default_factory=list)
    psnr_curve: list[dict[str, float]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    label_accuracy: float | None = None
    evaluation: Plain | None = None
    worst_case: Plain | None = None
    GInfoR: Plain | None = None
    recovered: Plain | None = None


@dataclass(kw_only=True)
class LabelRecord(RunRecord):
    """The labels of one target by every rule, from a run with `--labels-only`.

    Attributes:
        label_rules: By rule: accuracy, or the reason why there is none.
    """

    label_rules: Plain


def from_json(values: Mapping[str, Any], source: str = "the record") -> AttackRecord | LabelRecord:
    """The record that plain values hold, of this version or an older one.

    Args:
        values: What `to_json` wrote.
        source: What to call it in an error.

    Raises:
        InputError: It is no record of stage 3, or a newer version wrote it.
    """
    version = _version(values, source)
    kind: type[AttackRecord] | type[LabelRecord] = AttackRecord
    if "label_rules" in values:
        kind = LabelRecord
    known = {each.name for each in dataclasses.fields(kind)}
    given = {name: value for name, value in values.items() if name in known}
    try:
        record = kind(**{**given, "schema_version": version})
        check_types(record)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except TypeError:
        raise InputError(f"{source}: is not a record of an attack") from None
    return record


def _version(values: Mapping[str, Any], source: str) -> int:
    version = values.get("schema_version", 0)
    if type(version) is not int or not 0 <= version <= SCHEMA_VERSION:
        raise InputError(
            f"{source}: written by a newer version (schema {version!r:.40}; this one reads up to "
            f"{SCHEMA_VERSION})"
        )
    return version


def read_record(path: str | Path) -> AttackRecord | LabelRecord:
    """Read `record.json`.

    Raises:
        InputError: It cannot be read, or is no record of stage 3.
    """
    try:
        values = read_json(path, what="record of an attack")
    except InputError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a record of an attack")
    return from_json(values, str(path))
