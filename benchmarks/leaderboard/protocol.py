"""A protocol: everything that decides an entry's numbers beside the defense and the attacker.

A protocol is data. `GradInvBench-v1` is the file beside this one; a test passes a small one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.declare.yaml_lines import read_yaml
from benchmarks.run.cells import hash_json
from core.errors import InputError
from core.records import check_types

CURRENT = "GradInvBench-v1"
FILE = Path(__file__).resolve().parent / "gradinvbench-v1.yaml"
INITIAL, TRAINED = "initial", "trained"
FINGERPRINT_LENGTH = 12


@dataclass(frozen=True)
class Victim:
    """A network that is attacked, and how it is trained without any defense.

    Attributes:
        arch: Name of the architecture.
        width: Channels of its first stage.
        epochs: Passes over the data.
        batch_size: Images per step.
        lr: Initial learning rate; it falls to 0 by a cosine.
    """

    arch: str
    width: int
    epochs: int
    batch_size: int
    lr: float


@dataclass(frozen=True)
class UtilityRules:
    """How the accuracy under a defense is measured.

    Attributes:
        arch: Name of the architecture.
        width: Channels of its first stage.
        clients: How many share the training images evenly.
        epochs: Steps of the learning rate's schedule.
        rounds: In each of them.
        batch_size: Images of all clients together in a round.
        lr: Initial learning rate; it falls to 0 by a cosine.
        seeds: A training for each.
    """

    arch: str
    width: int
    clients: int
    epochs: int
    rounds: int
    batch_size: int
    lr: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """One of the settings that all images are attacked in.

    Attributes:
        victim: The network.
        state: "initial" or "trained".
        batch_size: Images that the client shares an update of.
    """

    victim: Victim
    state: str
    batch_size: int

    @property
    def name(self) -> str:
        """For people and for entries."""
        return f"{self.victim.arch}, {self.state}, batch {self.batch_size}"


@dataclass(frozen=True)
class Protocol:
    """See the comments of `gradinvbench-v1.yaml`.

    Attributes:
        name: With its version.
        threats: Attackers that entries may be measured under, the default first.
        data: Name of a built-in data set.
        images: How many of its training images are attacked.
        batch_sizes: Divisors of that number.
        seed: Of the choice of images, of defenses, of starts and of the victims' parameters.
        victims: Networks that are attacked.
        states: "initial", "trained" or both.
        members: Attacks of the ensemble.
        evaluations: Of a gradient, for every attacked batch.
        utility: How the accuracy is measured.
        worst_share: Share of the attacked images whose mean ranks an entry.
    """

    name: str
    threats: tuple[str, ...]
    data: str
    images: int
    batch_sizes: tuple[int, ...]
    seed: int
    victims: tuple[Victim, ...]
    states: tuple[str, ...]
    members: tuple[str, ...]
    evaluations: int
    utility: UtilityRules
    worst_share: float

    @functools.cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Every combination of network, state and batch size."""
        return tuple(
            Setting(*parts)
            for parts in itertools.product(self.victims, self.states, self.batch_sizes)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all its values: entries say by which protocol they were measured."""
        return hash_json(dataclasses.asdict(self), FINGERPRINT_LENGTH)

    def check(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            InputError: Names the field.
        """
        check_types(self)
        if any(size < 1 or self.images % size for size in self.batch_sizes):
            raise InputError(f"batch_sizes: every one must divide {self.images} images")
        if not set(self.states) <= {INITIAL, TRAINED}:
            raise InputError(f"states: expected {INITIAL} and {TRAINED}")
        if not 0 < self.worst_share <= 1:
            raise InputError("worst_share must lie above 0 and not above 1")
        for name in ("threats", "batch_sizes", "victims", "states", "members"):
            if not getattr(self, name):
                raise InputError(f"{name}: is empty")

    def chosen_threat(self, name: str | None) -> str:
        """The attacker of an entry; the default where none is named.

        Raises:
            InputError: The protocol has no such attacker.
        """
        from attack.knowledge.threat_models import find_threat

        threat = find_threat(name)
        found = self.threats[0] if threat is None else threat.name
        if found not in self.threats:
            known = ", ".join(self.threats)
            raise InputError(f"--threat {name}: {self.name} has {known}")
        return found


def read_protocol(file: Path = FILE) -> Protocol:
    """The protocol that a file declares.

    Raises:
        InputError: Names the file and the field.
    """
    document = read_yaml(file)
    try:
        protocol = _protocol(document.value)
        protocol.check()
    except (KeyError, TypeError) as error:
        raise document.error(f"no protocol: {error}") from None
    except InputError as error:
        raise document.error(str(error)) from None
    return protocol


def _protocol(values: Mapping[str, Any]) -> Protocol:
    utility = dict(values["utility"])
    seeds = tuple(utility.pop("seeds"))
    victims = tuple(Victim(**victim) for victim in values["victims"])
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    given |= {"victims": victims, "utility": UtilityRules(**utility, seeds=seeds)}
    return Protocol(**given)
