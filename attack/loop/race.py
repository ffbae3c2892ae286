"""Several starts that compete for the iterations of one.

Which image an inversion ends at depends on its start: by 3 dB and more from seed to seed with a
ResNet-18. Most of that is decided early: of eight starts, the one with the smallest objective
after 60 iterations is nearly always among the best in the end. So they race, and the worse half
is dropped a few times. The truth is never asked.

Every other start is faint: close to the mean colour. From noise of full amplitude, colours of
whole regions may end far off, most of all on trained networks without shortcuts; from nothing at
all an untrained network's inversion fails. Racing, neither has to be chosen.

The idea is successive halving: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and
Hyperparameter Optimization, 2016, https://arxiv.org/abs/1502.07943.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attack.loop.restarts import Restart, by_objective

# Iterations between two halvings, and the largest share of all iterations that may be spent on
# starts that are dropped.
LAP = 20
LARGEST_SHARE = 0.2
# The same where restarts are halved as well: eight of them, with a race each, then evaluate the
# objective less than three times as often as one.
SHARE_BESIDE_HALVING = 0.08
# Fewer iterations tell nothing about a start.
SHORTEST_LAP = 15
# Of the starts of a race, in turn.
AMPLITUDES = (1.0, 0.1)


@dataclass(frozen=True)
class Race:
    """Which starts of one restart run for how long.

    Attributes:
        starts: Number of starts.
        halvings: Iteration of each halving, and how many go on from there.
        iterations: Number of iterations that the winner takes.
    """

    starts: int
    halvings: tuple[tuple[int, int], ...]
    iterations: int

    def amplitude(self, number: int) -> float:
        """How strong the noise is that this start begins with."""
        return AMPLITUDES[number % self.starts % len(AMPLITUDES)]

    def thin_out(self, restarts: list[Restart], iteration: int) -> list[Restart]:
        """The starts that go on from this iteration, the best first.

        Args:
            restarts: Starts of one race or several: those of race r are numbered from
                r times `starts` on.
            iteration: From 0.
        """
        count = dict(self.halvings).get(iteration)
        if count is None:
            return restarts
        races: dict[int, list[Restart]] = {}
        for restart in sorted(restarts, key=by_objective):
            races.setdefault(restart.index // self.starts, []).append(restart)
        return [restart for race in races.values() for restart in race[:count]]


def plan_race(iterations: int, starts: int, share: float = LARGEST_SHARE) -> Race:
    """A race that evaluates the objective as often as one start without a race.

    Args:
        iterations: Number of iterations of one start without a race.
        starts: As many as possible up to this number; fewer where laps would be too short.
        share: Of all iterations, that may at most be spent on starts that are dropped.

    Returns:
        One start without halvings where there is nothing to drop, or no time for it.
    """
    while starts > 1:
        left = _field(starts)
        dropped = [before - after for before, after in zip([starts, *left], left, strict=False)]
        laps = sum(count * (i + 1) for i, count in enumerate(dropped))
        lap = min(LAP, int(share * iterations / laps))
        if lap >= SHORTEST_LAP:
            halvings = tuple((lap * (i + 1), count) for i, count in enumerate(left))
            return Race(starts, halvings, iterations - lap * laps)
        starts //= 2
    return Race(1, (), iterations)


def _field(starts: int) -> list[int]:
    """How many are left after each halving."""
    left = []
    while starts > 1:
        starts = math.ceil(starts / 2)
        left.append(starts)
    return left
