"""What a gate keeps in mind: which update this is, when to measure, and what was decided."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from core.errors import InputError
from federated.gate.allowed import NotAllowedError, is_round

# Characters of a reason; an exception's text may be an array's.
MAX_REASON = 2000


class WithheldError(Exception):
    """The update must not leave the site; the message says why."""


def reason_of(error: Exception) -> str:
    """Why an update is withheld, for people, of a length that a line of the log holds."""
    told = isinstance(error, (WithheldError, NotAllowedError))
    return (str(error) if told else f"the check failed: {error!r}")[:MAX_REASON]


@dataclass
class Passage:
    """One result on its way through a gate.

    Attributes:
        number: The round that the result states; None where it states none that can be.
        count: How many updates this gate has seen before, whatever rounds they state.
        verdict: What the log says of it.
        reason: Why, in a few words.
    """

    number: int | None = None
    count: int = 0
    verdict: str = "passed"
    reason: str = ""

    @property
    def name(self) -> int:
        """The number that the site's records of this update are called by."""
        return self.count if self.number is None else self.number


@dataclass
class Rounds:
    """The updates that a site has counted; what they state of their round is checked.

    Attributes:
        count: How many there were.
        last: The largest round that one of them stated.
    """

    count: int = 0
    last: int = -1

    def take(self, stated: Any) -> None:
        """Count an update.

        Args:
            stated: The number of its round, as somebody else says; None where nobody does.

        Raises:
            WithheldError: It is no number of a round, or does not come after the last one.
        """
        self.count += 1
        if stated is None:
            return
        if not is_round(stated):
            raise WithheldError(f"the round {stated!r} is no number of a round")
        if int(stated) <= self.last:
            raise WithheldError(
                f"round {int(stated)} comes after round {self.last}: rounds do not repeat"
            )
        self.last = int(stated)


@dataclass(frozen=True)
class Schedule:
    """Which of a site's updates are measured; the site counts them, whatever a server states.

    Attributes:
        frequency: Every that many updates.
        start_round: The first update to measure, from 0.
        random_rounds: Measure each update with probability 1 / frequency instead, which the
            server cannot foresee.

    Raises:
        InputError: Values with which nothing would ever be measured, or no numbers.
    """

    frequency: int = 1
    start_round: int = 0
    random_rounds: bool = False

    def __post_init__(self) -> None:
        for name, least in (("frequency", 1), ("start_round", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} {value!r}: must be a whole number of at least {least}")
        if not isinstance(self.random_rounds, bool):
            raise InputError(f"random_rounds {self.random_rounds!r}: must be true or false")

    def __str__(self) -> str:
        at_random = ", at random" if self.random_rounds else ""
        return f"start_round {self.start_round} and frequency {self.frequency}{at_random}"

    def due(self, count: int) -> bool:
        """Whether the update after so many others is measured."""
        if count < self.start_round:
            return False
        if self.random_rounds:
            return secrets.randbelow(self.frequency) == 0
        return count % self.frequency == 0
