"""What is said of a row: from the numbers where they can say it, else as the row declares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.fidelity.declare import Row
from benchmarks.show.statistics import bootstrap_interval


@dataclass(frozen=True)
class Measured:
    """The trials of a row in three numbers.

    Attributes:
        n: Trials.
        mean: Of their values.
        low: Lower end of the mean's 95 % interval, by bootstrap over trials.
        high: Upper end.
    """

    n: int
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Measured | None:
        """None where there is no value."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        sample = np.asarray(finite)
        low, high = bootstrap_interval(sample) if len(sample) > 1 else (sample[0], sample[0])
        return Measured(len(sample), float(sample.mean()), float(low), float(high))


def verdict(row: Row, ours: Measured | None, stands_in: bool = False) -> str:
    """In words: reproduced, above, below, not comparable, needs a GPU, or what is missing.

    Args:
        row: What was compared.
        ours: What was measured; None: nothing yet.
        stands_in: Whether other images than the published ones were attacked.
    """
    if ours is None:
        if row.gpu_hours:
            return f"needs a GPU (about {row.gpu_hours:g} hours)"
        return "not computed yet"
    if ours.n < row.trials:
        return f"{ours.n} of {row.trials} computed so far"
    if row.incomparable:
        return f"not comparable: {row.incomparable}"
    if stands_in:
        return "not comparable: other data"
    if ours.high < row.published.value - tolerance(row):
        return f"below: {row.below or 'not explained yet'}"
    return "above" if ours.low > row.published.value + tolerance(row) else "reproduced"


def tolerance(row: Row) -> float:
    """What the published value was rounded to: half of its last digit."""
    return 0.005 if row.published.unit == "dB" else 0.0005
