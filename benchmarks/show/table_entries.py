"""Entries from the rows of a table: unranked, because tables differ in what they measured.

    python -m benchmarks submit mine.yaml --defense "My defense" --where defense=mine

Such an entry is shown with what the worst image of the worst row gave away to the worst attack,
among the entries of the same threat model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attack.knowledge.threat_models import find_threat
from benchmarks.declare.records import Entry
from benchmarks.run.cells import Cell
from benchmarks.show.results import RowResult
from benchmarks.show.statistics import Summary, summarize
from core.errors import InputError

SCHEMA_VERSION = 1
# A whole number of JSON may have any number of digits.
MAX_NUMBER = 1e12
METRICS = {"ssim": "high", "psnr": "high", "mse": "low"}

# Every field of an entry: its type, and whether it may be null.
_SCHEMA: dict[str, tuple[type | tuple[type, ...], bool]] = {
    "schema": (int, False),
    "defense": (str, False),
    "description": (str, False),
    "reference": (str, True),
    "threat_model": (str, False),
    "attack": (str, False),
    "data": (str, False),
    "utility": ((int, float), True),
    "epsilon": ((int, float), True),
    "leakage": (dict, False),
    "configuration": (list, False),
    "provenance": (dict, False),
}


def check_entry(entry: Mapping[str, Any], name: str) -> None:
    """Refuse an entry that does not follow the schema.

    Raises:
        InputError: With the field.
    """
    for field, (kind, nullable) in _SCHEMA.items():
        if field not in entry:
            raise InputError(f"{name}: the field {field} is missing")
        value = entry[field]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right and not (value is None and nullable):
            raise InputError(f"{name}: the field {field} has the wrong type")
    unknown = sorted(entry.keys() - _SCHEMA.keys())
    if unknown:
        raise InputError(f"{name}: unknown field {unknown[0]}")
    if entry["schema"] != SCHEMA_VERSION:
        raise InputError(f"{name}: schema {entry['schema']} instead of {SCHEMA_VERSION}")
    _check_leakage(entry["leakage"], name)
    _check_cost(entry, name)


def _check_cost(entry: Mapping[str, Any], name: str) -> None:
    """Utility is a percentage, and epsilon a distance; both may be unknown."""
    utility, epsilon = entry["utility"], entry["epsilon"]
    if utility is not None and not 0 <= utility <= 100:
        raise InputError(f"{name}: utility {utility} is not a percentage")
    if epsilon is not None and not (0 <= epsilon < math.inf):
        raise InputError(f"{name}: epsilon {epsilon} is not a finite number from 0 on")


def _check_leakage(leakage: Mapping[str, Any], name: str) -> None:
    for metric in METRICS:
        numbers = leakage.get(metric)
        for part in ("n", "mean", "worst"):
            value = numbers.get(part) if isinstance(numbers, dict) else None
            # JSON's NaN would stand anywhere in the ranking.
            if not _is_number(value):
                raise InputError(f"{name}: leakage.{metric}.{part} is not a number")
        assert isinstance(numbers, dict)
        _check_metric(metric, numbers, f"{name}: leakage.{metric}")


# The values that a metric can have. The SSIM of images that have nothing in common scatters
# around 0; one far below is an error of sign.
_LIMITS = {"ssim": (-0.1, 1.0), "psnr": (-math.inf, math.inf), "mse": (0.0, math.inf)}
# Means of the same numbers in another order differ by rounding.
_ROUNDING = 1e-6


def _check_metric(metric: str, numbers: Mapping[str, Any], name: str) -> None:
    """Refuse what no set of images can have."""
    n, mean, worst = numbers["n"], numbers["mean"], numbers["worst"]
    if n != int(n) or n < 1:
        raise InputError(f"{name}.n is {n}: images are counted by whole numbers from 1 on")
    low, high = _LIMITS[metric]
    for part, value in (("mean", mean), ("worst", worst)):
        if not low - _ROUNDING <= value <= high + _ROUNDING:
            raise InputError(f"{name}.{part} is {value}: must lie between {low:g} and {high:g}")
    # The worst image is the one that gave most away.
    above = worst - mean if METRICS[metric] == "high" else mean - worst
    if above < -_ROUNDING * max(1.0, abs(mean)):
        raise InputError(f"{name}: the worst image, {worst}, gives away less than the mean, {mean}")


def _is_number(value: object) -> bool:
    # NaN fails the comparison.
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and -MAX_NUMBER <= value <= MAX_NUMBER  # type: ignore[operator]


def make_entry(
    rows: Sequence[RowResult], defense: str, description: str = "", reference: str | None = None
) -> dict[str, Any]:
    """The entry of a defense from the rows that measured it.

    The leakage is that of the row of largest mean SSIM: a defense is as good as on its
    worst model against its worst attack.

    Raises:
        InputError: A row is not finished, or rows grant the attacker different things.
    """
    for row in rows:
        if row.errors or not all(run.has("attack") for run in row.runs):
            labels = " ".join(row.row.labels.values())
            raise InputError(f"the row {labels} is not finished; compute the table first")
    models = {threat_model(run["attack"].config) for row in rows for run in row.row.repeats}
    if len(models) > 1:
        raise InputError(f"the rows differ in their threat model ({'; '.join(sorted(models))})")
    worst = max(rows, key=_mean_ssim)
    entry = {
        "schema": SCHEMA_VERSION,
        "defense": defense,
        "description": description,
        "reference": reference,
        "threat_model": models.pop(),
        "attack": _attack_name(worst),
        "data": _data_name(worst.row.repeats[0]),
        "utility": None if _alters_update(rows) else _first(rows, "train.best_val_acc1"),
        "epsilon": _first(rows, "train.privacy.epsilon"),
        "leakage": {metric: _leakage(worst, metric) for metric in METRICS},
        "configuration": [_configuration(run) for run in worst.row.repeats],
        "provenance": dict(worst.runs[0].value("attack.provenance") or {}),
    }
    check_entry(entry, defense)
    return entry


def _attack_name(row: RowResult) -> str:
    """The attack, an ensemble with its version: entries of different ones do not compare."""
    version = row.runs[0].value("attack.details.ensemble")
    return str(version or row.row.repeats[0]["attack"].config.get("attack", "default"))


def threat_model(config: Mapping[str, Any]) -> str:
    """What the attacker is given, from the flags of the attack."""
    if config.get("threat", "custom") != "custom":
        named = find_threat(str(config["threat"]))
        return str(config["threat"]) if named is None else named.name
    labels = "known" if config.get("pseudo-label-init") == "known" else "unknown"
    statistics = "known" if config.get("exact-bn") else "unknown"
    if config.get("bn-from-update"):
        statistics = "recovered from shared running statistics"
    return f"honest-but-curious server; labels {labels}; batch statistics {statistics}"


def _alters_update(rows: Iterable[RowResult]) -> bool:
    """Whether the defense acts after training, so that training says nothing of its cost."""
    cells = (run["extract"] for row in rows for run in row.row.repeats if "extract" in run)
    return any(cell.config.get("defense") for cell in cells)


def _data_name(run: Mapping[str, Cell]) -> str:
    return str(next((c.config["data"] for c in run.values() if "data" in c.config), "unknown"))


def _first(rows: Iterable[RowResult], path: str) -> float | None:
    found = (value for row in rows for run in row.runs for value in run.numbers(path))
    return next(found, None)


def _values(row: RowResult, metric: str) -> list[float]:
    """Of every image: under the worst attack of an ensemble, or the only one."""
    images: list[Entry] = [image for run in row.runs for image in run.worst_images or run.images]
    return [image[metric] for image in images if image.get(metric) is not None]


def _mean_ssim(row: RowResult) -> float:
    summary = summarize(_values(row, "ssim"))
    return summary.mean if summary else float("-inf")


def _leakage(row: RowResult, metric: str) -> dict[str, Any]:
    summary = summarize(_values(row, metric), METRICS[metric])
    return vars(summary or Summary(0, 0.0, None, None, None))


def _configuration(run: Mapping[str, Cell]) -> dict[str, Any]:
    return {stage: {"key": cell.key, **cell.config} for stage, cell in run.items()}
