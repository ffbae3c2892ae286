"""Means with what is known about their uncertainty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """A sample in a few numbers.

    Attributes:
        n: Size of the sample.
        mean: Arithmetic mean of the values.
        std: Standard deviation of the sample (n - 1); None for a single value.
        low: Lower end of the bootstrap 95 % interval of the mean; None for a single value.
        high: Upper end of the interval.
        worst: The value of greatest leakage, where the metric has such a side.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    worst: float | None = None


def summarize(values: Sequence[float], leak: str | None = None, seed: int = 0) -> Summary | None:
    """Summarise a sample.

    Args:
        values: Over images and seeds; those that are not finite are left out.
        leak: "high" or "low": on which side the metric says that more leaked.
        seed: Seed of the bootstrap's resampling.

    Returns:
        None for an empty sample.
    """
    sample = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)
    if not len(sample):
        return None
    low, high = bootstrap_interval(sample, seed) if len(sample) > 1 else (None, None)
    summary = Summary(
        n=len(sample),
        mean=float(sample.mean()),
        std=float(sample.std(ddof=1)) if len(sample) > 1 else None,
        low=low,
        high=high,
        worst=None,
    )
    return with_worst(summary, sample.tolist(), leak)


def with_worst(
    summary: Summary | None, values: Iterable[float], leak: str | None
) -> Summary | None:
    """A summary whose worst value is that of these values.

    Args:
        summary: None stays None.
        values: Those that are not finite are left out.
        leak: As of `summarize`.
    """
    choose = {"high": max, "low": min}.get(leak or "")
    if summary is None or choose is None:
        return summary
    finite = (v for v in values if v is not None and math.isfinite(v))
    return dataclasses.replace(summary, worst=float(choose(finite)))


def bootstrap_interval(
    sample: np.ndarray, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        sample: At least two values.
        seed: Of the resampling; the same seed gives the same interval.
        level: Coverage of the interval, between 0 and 1.
        resamples: Number of bootstrap samples.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    means = rng.choice(sample, size=(resamples, len(sample))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
