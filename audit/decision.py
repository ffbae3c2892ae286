"""The test that decides: do reconstructions look like members more than like non-members?

Reconstructions that know nothing of the members resemble held-out images of the same site as
well. So membership is permuted, and one statistic, fixed here before any result is seen, is
compared with what it is under other memberships: looking at many images and taking the best is
paid for.

The statistic is `membership_statistics.CHOSEN`. Each reconstruction's similarities are put in
units of their spread over all images and times the weight that the attack's own objective gives
it; images and reconstructions are matched one to one; the log-likelihood ratios of the members'
matches are averaged. In `results/decision/decision.json` (photographs and phantoms, seven
statistics) it finds two leaking images of eight in 81 and 88 of 100 trials, where the mean of best
matches finds 46 and 51, the rank sum 29 and 31 and the plain likelihood ratio 42 and 49. Where all
eight leak weakly (quality 0.4) it finds 93 and 76, and the mean 96 and 89; without weights it finds
54 and 68 of the former and as many of the latter. The maximum over members cannot reach 5 % with
four members among 44 images, whatever leaks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from audit.membership_statistics import CHOSEN, likelihood_ratio
from audit.permutations import (
    holm,
    non_members_needed,
    non_members_needed_per_image,
    p_values_per_image,
    permutation_p_value,
    smallest_p_value,
)
from core.errors import InputError

# A leak would have been found where it was in at least this share of the plants, and in more of
# them than the test says "leaks" of by chance.
_FOUND = 0.5
_ROUNDING = 1e-9


class Verdict(enum.Enum):
    """What an audit says."""

    LEAKS = "leaks"
    NO_LEAK_FOUND = "no leak found"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Power:
    """How often the same attack finds a known image that was planted in an update.

    Attributes:
        setting: Of the plants, in words such as "batch 8, one step".
        found: Plants that were found.
        of: How many plants there were.
    """

    setting: str
    found: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.found <= self.of or not self.of:
            raise InputError(f"power of {self.setting}: {self.found} of {self.of} is no count")

    def __str__(self) -> str:
        return f"{self.found} of {self.of} at {self.setting}"


@dataclass(frozen=True)
class Decision:
    """What the test says of one set of reconstructions.

    Attributes:
        verdict: See `Verdict`.
        statement: The verdict with its numbers, in a sentence.
        p_value: Of the one test that decides.
        smallest: The smallest p-value that it could have given.
        memberships: How many memberships it rests on.
        n_members: Members that were compared.
        n_non_members: Images held against them.
        per_image: Uncorrected p-value of each member, in order.
        per_image_corrected: The same with Holm's correction; says which images stand out and
            does not decide.
        power: What the verdict was told of plants.
        alpha: Level of the test.
    """

    verdict: Verdict
    statement: str
    p_value: float
    smallest: float
    memberships: int
    n_members: int
    n_non_members: int
    per_image: tuple[float, ...]
    per_image_corrected: tuple[float, ...]
    power: tuple[Power, ...]
    alpha: float

    @property
    def images_that_leak(self) -> tuple[int, ...]:
        """Numbers of the members that stand out by themselves after Holm's correction."""
        values = enumerate(self.per_image_corrected)
        return tuple(number for number, p in values if p <= self.alpha)


def decide(
    similarity: np.ndarray,
    members: Sequence[bool] | np.ndarray,
    *,
    classes: Sequence[int] | np.ndarray | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    power: Sequence[Power] = (),
    alpha: float = 0.05,
    permutations: int = 9999,
    seed: int = 0,
) -> Decision:
    """Decide whether reconstructions leak members.

    Args:
        similarity: Reconstructions x images, larger for more alike.
        members: Per image, whether it was in the training.
        classes: Per image; membership is permuted within classes. Needed where the attack knew
            the members' classes; default: one class.
        weights: Per reconstruction, not negative: how right the attack itself thinks it is, by
            its own objective and by nothing that knows the members; default: all the same.
        power: What the attack found of planted images; without it nothing found says nothing.
        alpha: At most this share of audits without a leak says "leaks".
        permutations: More memberships than these are not gone through but drawn.
        seed: Of drawing them.

    Raises:
        InputError: Similarities that are not finite, lengths that do not belong together, no
            member, no non-member, or a level that is none.
    """
    similarity, is_member = np.asarray(similarity, dtype=float), np.asarray(members, dtype=bool)
    groups = np.zeros(is_member.shape, int) if classes is None else np.asarray(classes)
    given = np.ones(len(similarity)) if weights is None else np.asarray(weights, dtype=float)
    _check(similarity, is_member, groups, given, alpha, permutations)
    given = given / given.max()
    statistic = CHOSEN.of(similarity, given)
    p, memberships = permutation_p_value(statistic, is_member, groups, permutations, seed)
    smallest = smallest_p_value(is_member, groups, permutations)
    each = p_values_per_image(likelihood_ratio(similarity, given), is_member, groups)
    n, others = int(is_member.sum()), int((~is_member).sum())
    verdict = _verdict(p, smallest, power, alpha)
    return Decision(
        verdict=verdict,
        statement=_statement(verdict, p, smallest, n, others, power, alpha),
        p_value=p,
        smallest=smallest,
        memberships=memberships,
        n_members=n,
        n_non_members=others,
        per_image=tuple(each.tolist()),
        per_image_corrected=tuple(holm(each).tolist()),
        power=tuple(power),
        alpha=alpha,
    )


def _check(
    similarity: np.ndarray,
    members: np.ndarray,
    classes: np.ndarray,
    weights: np.ndarray,
    alpha: float,
    permutations: int,
) -> None:
    if similarity.ndim != 2 or not len(similarity):
        raise InputError("similarity: give reconstructions x images, at least one reconstruction")
    if members.shape != (similarity.shape[1],) or classes.shape != members.shape:
        raise InputError(
            f"members and classes: give one value for each of the {similarity.shape[1]} images"
        )
    if not np.isfinite(similarity).all():
        raise InputError("similarity: not finite; what cannot be measured cannot be decided")
    if not members.any() or members.all():
        raise InputError("members: the test needs members and non-members")
    if weights.shape != (len(similarity),) or not (weights >= 0).all() or not weights.max() > 0:
        raise InputError("weights: give one per reconstruction, none negative and not all zero")
    if not 0 < alpha < 1 or permutations < 1:
        raise InputError(f"alpha {alpha} must lie in (0, 1), permutations {permutations} above 0")


def _verdict(p: float, smallest: float, power: Sequence[Power], alpha: float) -> Verdict:
    if p <= alpha:
        return Verdict.LEAKS
    can_find = any(_finds(plant, alpha) for plant in power)
    return Verdict.NO_LEAK_FOUND if can_find and smallest <= alpha else Verdict.CANNOT_TELL


def _finds(plant: Power, alpha: float) -> bool:
    """Whether the attack finds what is planted: mostly, and not as a test of that level may."""
    chance = float(binom.sf(plant.found - 1, plant.of, alpha))
    return plant.found / plant.of >= _FOUND and chance <= alpha + _ROUNDING


def _statement(
    verdict: Verdict,
    p: float,
    smallest: float,
    n_members: int,
    n_non_members: int,
    power: Sequence[Power],
    alpha: float,
) -> str:
    compared = f"{_count(n_members, 'member')} against {_count(n_non_members, 'non-member')}"
    if verdict is Verdict.LEAKS:
        return f"leaks: p = {p:.4f} for {compared}"
    if smallest > alpha:
        return (
            f"cannot tell: {compared} (permuted within classes, where they are given) can give "
            f"p = {smallest:.3f} at best; {alpha:g} takes {_needed(n_members, alpha)} of one class"
        )
    plants = ", ".join(map(str, power)) or "no image was planted"
    if verdict is Verdict.CANNOT_TELL:
        return (
            f"cannot tell: p = {p:.3f} for {compared}, and it is not shown that the attack would "
            f"have found a leak ({plants})"
        )
    return f"no leak found: p = {p:.3f} for {compared}; the attack finds planted images: {plants}"


def _needed(n_members: int, alpha: float) -> str:
    together = _count(non_members_needed(n_members, alpha), "non-member")
    each = non_members_needed_per_image(n_members, alpha)
    return together if n_members == 1 else f"{together} ({each} to single one image out)"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
