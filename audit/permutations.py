"""Permutation tests of membership, and p-values per image.

A test is valid where members and non-members are exchangeable under no leak: chosen from the same
images by chance, of the same classes in the same shares, prepared in the same way, no patient on
both sides. Where an attack knows labels, membership is permuted within classes.

Source: Phipson and Smyth, Permutation P-values Should Never Be Zero, 2010, for (1 + b) / (1 + B),
    https://arxiv.org/abs/1603.05766; Holm, A Simple Sequentially Rejective Multiple Test
    Procedure, 1979, https://www.jstor.org/stable/4615733.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Statistics of that many memberships at once, each of all images.
_AT_ONCE = 1000
# Sums of the same numbers in another order differ by rounding; they count as ties.
_TIE = 1e-9

# From memberships (P x images, 0 or 1) to P values, large ones speaking for a leak.
Statistic = Callable[[np.ndarray], np.ndarray]


def permutation_p_value(
    statistic: Statistic,
    members: np.ndarray,
    classes: np.ndarray,
    permutations: int,
    seed: int,
) -> tuple[float, int]:
    """The share of memberships whose statistic is at least that of the true one.

    All memberships are gone through where there are at most `permutations`, else that many are
    drawn and the true one is counted in, (1 + count) / (1 + permutations). Ties count against
    a leak.

    Args:
        statistic: Computes the statistic of each of N memberships.
        members: Per image, whether it is one.
        classes: Per image; each class keeps its number of members.
        permutations: How many are drawn.
        seed: Of drawing them.

    Returns:
        The p-value, and how many memberships it rests on.
    """
    observed = float(statistic(members[None].astype(float))[0])
    exact = n_memberships(members, classes) <= permutations
    made = _all(members, classes) if exact else _drawn(members, classes, permutations, seed)
    # The true membership is one of all, and is added to those drawn.
    count, total = (0, 0) if exact else (1, 1)
    least = observed - _TIE * max(1.0, abs(observed))
    for block in made:
        count += int((statistic(block) >= least).sum())
        total += len(block)
    return count / total, total


def n_memberships(members: np.ndarray, classes: np.ndarray) -> int:
    """In how many ways the members can be chosen, so many of each class."""
    sizes = [members[classes == c] for c in np.unique(classes)]
    return math.prod(math.comb(len(inside), int(inside.sum())) for inside in sizes)


def _all(members: np.ndarray, classes: np.ndarray) -> Iterator[np.ndarray]:
    places = [np.flatnonzero(classes == c) for c in np.unique(classes)]
    choices = [itertools.combinations(p, int(members[p].sum())) for p in places]
    chosen = itertools.product(*choices)
    while block := list(itertools.islice(chosen, _AT_ONCE)):
        rows = np.zeros((len(block), len(members)))
        for row, parts in zip(rows, block, strict=True):
            row[[place for part in parts for place in part]] = 1
        yield rows


def _drawn(
    members: np.ndarray, classes: np.ndarray, permutations: int, seed: int
) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for start in range(0, permutations, _AT_ONCE):
        rows = np.zeros((min(_AT_ONCE, permutations - start), len(members)))
        for c in np.unique(classes):
            places = np.flatnonzero(classes == c)
            inside = np.tile(members[places].astype(float), (len(rows), 1))
            rows[:, places] = rng.permuted(inside, axis=1)
        yield rows


def smallest_p_value(members: np.ndarray, classes: np.ndarray, permutations: int) -> float:
    """The smallest p-value that the test can give, whatever leaks."""
    return 1 / min(n_memberships(members, classes), permutations + 1)


def non_members_needed(n_members: int, alpha: float) -> int:
    """How many non-members it takes so that a test of all members can reach a level.

    19 for one member at 5 %: 1 / C(members + non-members, members) must not be above it.
    """
    needed = 1
    while math.comb(n_members + needed, n_members) * alpha < 1 - 1e-12:
        needed += 1
    return needed


def non_members_needed_per_image(n_members: int, alpha: float) -> int:
    """How many it takes so that Holm's correction can single out one image of all members."""
    return math.ceil(n_members / alpha - 1e-9) - 1


def p_values_per_image(scores: np.ndarray, members: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Each member's share of non-members of its class that score as high, itself counted in.

    Args:
        scores: How much speaks for each image, the higher the more.
        members: Per image, whether it is one.
        classes: The class of each image.

    Returns:
        One per member, in order, uncorrected.
    """

    def share(place: int) -> float:
        others = scores[~members & (classes == classes[place])]
        least = scores[place] - _TIE * max(1.0, abs(scores[place]))
        return float((1 + (others >= least).sum()) / (1 + len(others)))

    return np.array([share(place) for place in np.flatnonzero(members).tolist()])


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values: the smallest times their number, the next times one less, ..."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * factors))
    return adjusted
