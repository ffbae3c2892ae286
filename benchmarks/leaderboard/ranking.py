"""Ranks with their uncertainty: the worst decile of images, by bootstrap over images.

What an image gave away is the SSIM of its reconstruction beyond that of the best guess that needs
no gradient: a flat colour reaches 0.9 on an image with little in it, and would pass for a leak.
Every image is attacked in all settings (network, state, batch size); an entry is ranked by the
mean over the share of all attacked images (a tenth) that gave away most. Images are drawn with
replacement, each with its numbers of all settings, and the same images for every entry: numbers
of one image are not independent, and entries are compared on the same draw.

No such metric stands for what people recognise: both correlate weakly with them (Sun et al.,
Privacy Assessment on Reconstructed Images, NeurIPS 2023, https://arxiv.org/abs/2309.13038).
SSIM ranks, because it looks at structure, of which a flat guess has none; beside it stand PSNR,
how far the two orders agree, and the share of images that were identified, which is no similarity
at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.leaderboard.entry import METRICS, BoardEntry
from benchmarks.show.statistics import LEVEL, RESAMPLES


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval.

    Attributes:
        value: Over all images, or seeds.
        low: Lower end of the interval.
        high: Upper end of it.
    """

    value: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether some number lies in both."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Place:
    """An entry and where it stands.

    Attributes:
        entry: What was entered.
        worst: By metric, the mean of the worst decile, beyond the best guess.
        first: Best rank that its intervals allow.
        last: Worst rank that they allow.
        identified: Share of the attacked images that were told from all others.
        utility: Accuracy in percent, over seeds.
        lost: Settings whose mean SSIM does not exceed that of the best guess.
    """

    entry: BoardEntry
    worst: Mapping[str, Interval]
    first: int
    last: int
    identified: Interval
    utility: Interval
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """All entries of one attacker.

    Attributes:
        places: The entry that leaks least first.
        tau: Kendall's tau-b between the order and that of resampled images; None of one entry.
        tau_metrics: Kendall's tau-b between the orders by SSIM and by PSNR; None of one entry.
    """

    places: tuple[Place, ...]
    tau: Interval | None
    tau_metrics: float | None


def worst_mean(values: np.ndarray, share: float) -> np.ndarray:
    """Mean of the largest values.

    Args:
        values: ... x N; the last axis is reduced.
        share: Of the N values, rounded up.
    """
    n = values.shape[-1]
    kept = min(n, max(1, math.ceil(share * n - 1e-9)))
    largest = np.partition(values, n - kept, axis=-1)[..., n - kept :]
    return np.asarray(largest.mean(axis=-1))


def draws(n_images: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Positions of images, drawn with replacement: resamples x n_images."""
    return np.random.default_rng(seed).integers(n_images, size=(resamples, n_images))


def by_image(entry: BoardEntry, metric: str) -> np.ndarray:
    """A metric of every attacked image: images x settings."""
    columns = [getattr(leak, metric) for leak in entry.leaks.values()]
    return np.asarray(columns, dtype=float).T


def given_away(entry: BoardEntry, metric: str) -> np.ndarray:
    """A metric beyond that of the image's best guess: images x settings."""
    guesses = np.asarray([values[metric] for values in entry.guesses.values()], dtype=float)
    return by_image(entry, metric) - guesses.max(axis=0)[:, None]


def resampled_worst(values: np.ndarray, drawn: np.ndarray, share: float) -> np.ndarray:
    """The mean of the worst decile of every draw.

    Args:
        values: Images x settings.
        drawn: Resamples x images.
        share: Of all attacked images.
    """
    return worst_mean(values[drawn].reshape(len(drawn), -1), share)


def rank(entries: Sequence[BoardEntry], share: float) -> Ranking:
    """Rank entries of one protocol and one attacker.

    Args:
        entries: At least one.
        share: The protocol's share of attacked images that counts.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile
        interval); Kendall, A New Measure of Rank Correlation, Biometrika 1938.
    """
    drawn = draws(len(by_image(entries[0], "ssim")))
    values = {m: [given_away(entry, m) for entry in entries] for m in METRICS}
    points = {m: [float(worst_mean(v.ravel(), share)) for v in values[m]] for m in METRICS}
    samples = {m: [resampled_worst(v, drawn, share) for v in values[m]] for m in METRICS}
    worst = [
        {m: _interval(points[m][i], samples[m][i]) for m in METRICS} for i in range(len(entries))
    ]
    ssim = [each["ssim"] for each in worst]
    places = [
        Place(
            entry=entry,
            worst=worst[i],
            first=1 + sum(other.high < ssim[i].low for other in ssim),
            last=len(entries) - sum(ssim[i].high < other.low for other in ssim),
            identified=_identified(entry, drawn),
            utility=utility_of(entry.accuracies),
            lost=_lost(entry),
        )
        for i, entry in enumerate(entries)
    ]
    places.sort(key=lambda place: (place.worst["ssim"].value, -place.utility.value))
    return Ranking(
        tuple(places),
        tau=_tau_of_draws(points["ssim"], np.stack(samples["ssim"])),
        tau_metrics=_tau(points["ssim"], points["psnr"]),
    )


def utility_of(accuracies: Sequence[float]) -> Interval:
    """Mean over seeds with Student's 95 % interval; without an interval from a single one."""
    from scipy.stats import t

    values = np.asarray(accuracies, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, mean, mean)
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(mean, max(0.0, mean - float(half)), min(100.0, mean + float(half)))


def frontier(places: Sequence[Place]) -> list[Place]:
    """Entries that no other beats in both utility and leakage, the least useful first."""
    kept = [
        place
        for place in places
        if not any(_beats(other, place) for other in places if other is not place)
    ]
    return sorted(kept, key=lambda place: place.utility.value)


def _beats(one: Place, other: Place) -> bool:
    leaks = one.worst["ssim"].value, other.worst["ssim"].value
    worth = one.utility.value, other.utility.value
    return (
        leaks[0] <= leaks[1]
        and worth[0] >= worth[1]
        and (leaks[0], worth[0])
        != (
            leaks[1],
            worth[1],
        )
    )


def _interval(value: float, samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _identified(entry: BoardEntry, drawn: np.ndarray) -> Interval:
    share = by_image(entry, "identified").mean(axis=1)
    return _interval(float(share.mean()), share[drawn].mean(axis=1))


def _lost(entry: BoardEntry) -> tuple[str, ...]:
    """Where an attack shows no more than a guess does: no larger mean SSIM than the best one's."""
    best = max(float(np.mean(values["ssim"])) for values in entry.guesses.values())
    return tuple(name for name, leak in entry.leaks.items() if float(np.mean(leak.ssim)) <= best)


def _tau_of_draws(points: Sequence[float], samples: np.ndarray) -> Interval | None:
    """How well the order survives other images of the same kind."""
    if len(points) < 2:
        return None
    found = [_tau(points, column) for column in samples.T]
    taus = np.array([value for value in found if value is not None])
    return _interval(float(taus.mean()), taus) if len(taus) else None


def _tau(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float | None:
    from scipy.stats import kendalltau

    if len(one) < 2:
        return None
    value = float(kendalltau(one, other).statistic)
    return None if math.isnan(value) else value
