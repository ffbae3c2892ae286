"""When a score is an alarm: thresholds from honest rounds, at a stated rate of false alarms.

Both rules are conformal. If an honest model's scores are exchangeable with those of the rounds
that are known to be honest, it is an alarm with a probability of at most alpha, whatever the
scores are distributed like.

Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", Springer 2005, chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InputError

# What stands for an infinite score.
_HUGE = 1e200


@dataclass(frozen=True)
class Threshold:
    """The rule of one detector.

    Attributes:
        value: A score above it is an alarm.
        false_alarm: Probability of an alarm on an honest round, at most.
        rounds: Honest rounds that it rests on.
    """

    value: float
    false_alarm: float
    rounds: int

    def alarms(self, score: float) -> bool:
        """Whether a score is an alarm."""
        return score > self.value


def rounds_needed(alpha: float) -> int:
    """Honest rounds with which a threshold at this rate of false alarms exists."""
    return math.ceil(1 / alpha - 1e-9) - 1


def threshold(honest: Sequence[float], alpha: float) -> Threshold:
    """The lowest threshold at this rate of false alarms.

    Args:
        honest: Scores of honest rounds.
        alpha: Rate of false alarms, at most.

    Raises:
        InputError: There are too few rounds.
    """
    n = len(honest)
    allowed = math.floor(alpha * (n + 1) + 1e-9)
    if allowed < 1:
        raise InputError(
            f"{n} honest rounds are too few: at most {alpha:g} false alarms a round need "
            f"{rounds_needed(alpha)}"
        )
    return Threshold(sorted(honest, reverse=True)[allowed - 1], allowed / (n + 1), n)


def joint_p_value(scores: Mapping[str, float], honest: Mapping[str, Sequence[float]]) -> float:
    """How unusual a round is in the detector that it is most unusual in.

    Every detector's scores, that of the round among them, are measured in units of their own
    spread; a round's largest is compared with the honest rounds' largest. So several detectors
    cost no more false alarms than one.

    Args:
        scores: Of the round, by detector.
        honest: Of every honest round, by detector; as many each.

    Returns:
        The p-value under exchangeability, at least 1 / (honest rounds + 1).
    """
    largest = np.max([_standardised(scores[name], honest[name]) for name in scores], axis=0)
    return float((largest >= largest[0]).mean())


def _standardised(score: float, honest: Sequence[float]) -> np.ndarray:
    """The round's score and the honest ones, less their median, over their median deviation."""
    values = np.clip(np.array([score, *honest], dtype=float), -_HUGE, _HUGE)
    middle = np.median(values)
    spread = np.median(np.abs(values - middle))
    return (values - middle) / max(spread, 1e-9 * abs(middle), 1e-12)
