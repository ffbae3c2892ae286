"""What a similarity matrix says of every image, and of a set of images as members.

All are functions of similarities alone, never of who is a member, so that a permutation of
membership is a valid test of each. `python -m benchmarks.decision` compares them on real images;
its record is why `CHOSEN` is the statistic that decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Of the normal distribution: standard deviation over median absolute deviation.
_MAD = 1.4826
# The mixture behind the likelihood ratio: the share of reconstructions that leak, and by how
# many standard deviations their image stands out. A larger shift loses weak leaks of many images
# and gains little with strong ones of few.
_SHARE, _SHIFT = 0.5, 1.0

# From similarities (reconstructions x images) and weights of reconstructions to scores.
Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class MembershipStatistic:
    """A statistic of a set of images.

    Attributes:
        name: In tables.
        scores: One number per image, large where a reconstruction looks like it.
        maximum: Whether the largest score of the members is taken; else their mean.
    """

    name: str
    scores: Scores
    maximum: bool = False

    def of(self, similarity: np.ndarray, weights: np.ndarray) -> Callable[..., np.ndarray]:
        """The statistic of memberships, for `permutations.permutation_p_value`."""
        scores = self.scores(similarity, weights)
        if self.maximum:
            return lambda rows: np.where(rows > 0, scores, -np.inf).max(1)
        return lambda rows: rows @ scores / rows.sum(1)


def best_match(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Similarity of the reconstruction that is nearest to the image."""
    return np.asarray(similarity.max(0))


def standardised(similarity: np.ndarray) -> np.ndarray:
    """Similarities of each reconstruction in units of their spread over images.

    A reconstruction that resembles everything (a mean image) then says no more than another.
    """
    return _units(similarity, 1)


def _units(values: np.ndarray, axis: int) -> np.ndarray:
    middle = np.median(values, axis=axis, keepdims=True)
    spread = _MAD * np.median(np.abs(values - middle), axis=axis, keepdims=True)
    # Half of the values the same: their standard deviation, and nothing for a constant.
    spread = np.where(spread > 0, spread, values.std(axis=axis, keepdims=True))
    return np.asarray((values - middle) / np.where(spread > 0, spread, 1))


def best_standardised(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The best match after each reconstruction was standardised."""
    return np.asarray(standardised(similarity).max(0))


def ranks(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of best matches: their sum is Wilcoxon's statistic. Ties have their mean rank."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(best_match(similarity, weights)))


def likelihood_ratio(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of "it leaks" against "it does not", of the best standardised match."""
    return log_ratio(best_standardised(similarity, weights))


def log_ratio(u: np.ndarray) -> np.ndarray:
    """log((1 - e) + e exp(d u - d^2 / 2)): flat for what is ordinary, linear for what stands out.

    Args:
        u: Similarity in standard deviations of those of other images.
    """
    return np.logaddexp(np.log(1 - _SHARE), np.log(_SHARE) + _SHIFT * u - _SHIFT**2 / 2)


def matched(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each image and the reconstruction that it is assigned, 0 without.

    One image per reconstruction, so that the sum is largest: one that resembles several
    reconstructions is counted once, and no image takes the place of another's leak.
    """
    return weighted_matched(similarity, np.ones(len(similarity)))


def weighted_matched(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same with each reconstruction's standardised similarity times its weight."""
    from scipy.optimize import linear_sum_assignment

    values = log_ratio(weights[:, None] * standardised(similarity))
    rows, columns = linear_sum_assignment(values, maximize=True)
    scores = np.zeros(values.shape[1])
    scores[columns] = values[rows, columns]
    return scores


CHOSEN = MembershipStatistic("matched, weighted", weighted_matched)
STATISTICS = {
    statistic.name: statistic
    for statistic in (
        MembershipStatistic("maximum", best_match, maximum=True),
        MembershipStatistic("mean of best matches", best_match),
        MembershipStatistic("mean, standardised", best_standardised),
        MembershipStatistic("rank sum", ranks),
        MembershipStatistic("likelihood ratio", likelihood_ratio),
        MembershipStatistic("matched", matched),
        CHOSEN,
    )
}
