"""What every attack is: something that turns a target into a reconstruction; and their names."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from attack.knowledge.threat_models import Capability
from core.losses import Targets
from core.registry import Registry

if TYPE_CHECKING:
    import torch

    from attack.loop.inversion import Inversion
    from attack.reconstruction import Reconstruction
    from attack.settings import InversionConfig
    from core.target import Target


class Attack(abc.ABC):
    """An attack on shared gradients.

    Attributes:
        name: What `--attack` and tables call it.
        requires: What the threat model must grant to the attack.
        fits: Kinds of targets of the clients that it can be used on.
        reads_tokens: Whether it is made for clients whose inputs are token ids.
        reads_anything: Whether it is made for clients of all inputs.
        label_rule: How its paper gets the labels, see `attack.knowledge.labels`; "exact" where
            it says nothing of it.
        recovers_labels: Whether it recovers the labels itself where no rule is asked for.
        shares_a_batch: Whether several processes can share its images out.
        adapts_by_default: Whether it takes a known defense into account unasked.
        published: The paper's hyper-parameters; None for an attack without an optimisation loop.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Capability]] = frozenset()
    fits: ClassVar[frozenset[Targets]] = frozenset(Targets)
    reads_tokens: ClassVar[bool] = False
    reads_anything: ClassVar[bool] = False
    label_rule: ClassVar[str] = "exact"
    recovers_labels: ClassVar[bool] = False
    shares_a_batch: ClassVar[bool] = False
    adapts_by_default: ClassVar[bool] = False
    published: ClassVar[InversionConfig | None] = None

    @classmethod
    def configured(cls, given: dict[str, Any]) -> Attack:
        """An instance under the flags that were really given.

        Args:
            given: Fields of `InversionConfig` and their values; an attack without an
                optimisation loop uses what has a meaning for it. The command adds
                `granted`, the capabilities of the run, and `adaptive`.
        """
        return cls()

    @property
    def iterations(self) -> int | None:
        """Iterations of its loop, or of all its loops; None where it has none."""
        iterations: int | None = getattr(getattr(self, "config", None), "iterations", None)
        return iterations

    def plain_settings(self) -> dict[str, Any] | None:
        """Its settings as plain values, for a record; None where it has none."""
        config = getattr(self, "config", None)
        return None if config is None else dataclasses.asdict(config)

    def begin(self, target: Target, **start: Any) -> Inversion | None:
        """The inversion, not yet begun, whose result `reconstruct` gives as it is.

        Args:
            target: What the client shared.
            start: Arguments of `attack.loop.inversion.Inversion`.

        Returns:
            None where `reconstruct` does more than that, or has no such loop.
        """
        return None

    @abc.abstractmethod
    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """Invert one target.

        Args:
            target: What was shared; never the truth.
            labels: N class indices, recovered or granted, or what else the client's loss takes.
            device: Device that runs the computation.
            seed: Seed of every random number of the attack.
            run: Passed on to `Inversion.run` (progress, snapshots, state file).
        """


_ATTACKS = Registry[type[Attack]]("attack")
A = TypeVar("A", bound=type[Attack])


def register_attack(attack: A) -> A:
    """Class decorator: make an attack known by its name.

    Raises:
        ValueError: The name is taken.
    """
    _ATTACKS.add(attack.name, attack)
    return attack


def attack_names() -> list[str]:
    """Names of all registered attacks."""
    return _ATTACKS.names()


def get_attack(name: str) -> type[Attack]:
    """The attack of that name.

    Raises:
        InputError: There is none.
    """
    return _ATTACKS.find(name, f"--attack {name}: unknown")
