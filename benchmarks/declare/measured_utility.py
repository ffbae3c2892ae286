"""What was measured of the price of defenses: the record of `python -m benchmarks.utility`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError
from core.reading import read_json_object
from gradients.defenses import parse_defenses

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "utility"
RECORD = "utility.json"
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Entry:
    """What is trained under.

    Attributes:
        defense: Words as `--defense` takes them; empty for no defense.
        error_feedback: As `--error-feedback`; None: none.
        sigma: Noise multiplier of the clients' DP-SGD; None: no DP-SGD.
        norm: Normalisation layers; DP-SGD cannot have those of the batch.
    """

    defense: str = ""
    error_feedback: str | None = None
    sigma: float | None = None
    norm: str = "batch"


@dataclass
class Row:
    """The accuracies of one entry.

    Attributes:
        entry: See `Entry`.
        seeds: Of the trainings so far.
        accuracy: On the validation images after the last round, in percent, per seed.
        epsilon: Told by the defense or by DP-SGD's accountant; None: nothing is promised.
        delta: Of that promise.
        seconds: Of all trainings.
    """

    entry: Entry
    seeds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    epsilon: float | None = None
    delta: float = 1e-5
    seconds: float = 0.0


@dataclass(frozen=True)
class Utility:
    """Accuracy in percent: the mean over `n` seeds and its 95 % interval; NaN of one seed."""

    mean: float
    low: float
    high: float
    n: int


def utility_of(
    defense: str,
    error_feedback: str | None = None,
    sigma: float | None = None,
    folder: Path = RESULTS,
) -> Utility | None:
    """The accuracy that was measured under a defense.

    Args:
        defense: Words as `--defense` takes them, in any spelling of their parameters; empty
            for no defense.
        error_feedback: As `--error-feedback`.
        sigma: Noise multiplier of DP-SGD.
        folder: Of the record.

    Returns:
        None where it was not measured.

    Raises:
        InputError: No such defense, or no such record.
    """
    wanted = _spelling(defense), error_feedback, sigma
    for row in read_rows(folder / RECORD):
        entry = row.entry
        if (_spelling(entry.defense), entry.error_feedback, entry.sigma) == wanted:
            return summary(row)
    return None


def summary(row: Row) -> Utility:
    """A row's mean and interval."""
    values, n = np.asarray(row.accuracy), len(row.accuracy)
    mean = float(values.mean())
    if n == 1:
        return Utility(mean, math.nan, math.nan, n)
    spread = STUDENT_T[n - 1] * float(values.std(ddof=1)) / math.sqrt(n)
    return Utility(mean, max(0.0, mean - spread), min(100.0, mean + spread), n)


def _spelling(words: str) -> str:
    return ",".join(defense.word for defense in parse_defenses(words))


def read_rows(path: Path) -> list[Row]:
    """The rows of a record.

    Raises:
        InputError: It is damaged, or there is none.
    """
    return [_row(values) for values in read_json_object(path, what="record of utility")["rows"]]


def _row(values: Mapping[str, Any]) -> Row:
    return Row(**{**values, "entry": Entry(**values["entry"])})


@functools.cache
def committed_utility(words: tuple[str, ...]) -> float | None:
    """The mean accuracy under defenses, as the project's own record has it; None: not measured.

    Args:
        words: As an update states them.
    """
    if not (RESULTS / RECORD).exists():
        return None
    try:
        found = utility_of(",".join(words))
    except InputError:  # A plugin's defense, which is not known here.
        return None
    return None if found is None else found.mean
