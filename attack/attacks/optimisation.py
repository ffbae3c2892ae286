"""Attacks that minimise a gradient loss, and what flags make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from attack.attacks.base import Attack, get_attack
from attack.attacks.parts.likeliest import likeliest
from attack.loop.inversion import InterruptedInversion, Inversion
from attack.settings import InversionConfig

if TYPE_CHECKING:
    import torch

    from attack.knowledge.requirements import Knowledge
    from attack.reconstruction import Reconstruction
    from core.target import Target


class OptimizationAttack(Attack):
    """An attack that minimises a gradient loss; a subclass is its published setting.

    Attributes:
        published: The paper's hyper-parameters.

    Args:
        config: Hyper-parameters; the published ones if None.
    """

    published: ClassVar[InversionConfig]
    shares_a_batch: ClassVar[bool] = True

    def __init__(self, config: InversionConfig | None = None) -> None:
        self.config = config or self.published

    @property
    def iterations(self) -> int:
        """See `Attack.iterations`."""
        return self.config.optimiser.iterations

    def plain_settings(self) -> dict[str, Any]:
        """See `Attack.plain_settings`; all settings side by side, whatever their topic."""
        return self.config.to_flat()

    def begin(self, target: Target, **start: Any) -> Inversion | None:
        """See `Attack.begin`."""
        plain = type(self).reconstruct is OptimizationAttack.reconstruct
        return self.inversion(target, **start) if plain else None

    def inversion(
        self,
        target: Target,
        *,
        labels: torch.Tensor,
        device: torch.device,
        seed: int,
        prior: torch.Tensor | None = None,
        first_restart: int = 0,
    ) -> Inversion:
        """The inversion of one target, not yet begun; arguments as of `Inversion`."""

        def attempt(candidate: Target, short: InversionConfig) -> Reconstruction:
            try:
                return Inversion(candidate, labels, short, device=device, seed=seed).run()
            except InterruptedInversion:
                # A short attack is no result.
                raise KeyboardInterrupt from None

        found = likeliest(target, labels, self.config, attempt)
        return Inversion(
            found.target,
            labels if found.labels is None else found.labels,
            self.config,
            device=device,
            seed=seed,
            prior=found.start if prior is None else prior,
            first_restart=first_restart,
            kept=found.kept,
        )

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor,
        device: torch.device,
        seed: int,
        prior: torch.Tensor | None = None,
        first_restart: int = 0,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; `prior` and `first_restart` are those of `Inversion`."""
        begun = self.inversion(
            target,
            labels=labels,
            device=device,
            seed=seed,
            prior=prior,
            first_restart=first_restart,
        )
        return begun.run(**run)


class SeedAttack(OptimizationAttack):
    """The attack that settings alone describe, without a published name."""

    name = "seed"
    published = InversionConfig()


def make_attack(name: str | None, settings: Mapping[str, Any], knowledge: Knowledge) -> Attack:
    """The attack of that name under settings on top of its published ones.

    Args:
        name: What `--attack` calls it; None: the settings alone.
        settings: Settings by name.
        knowledge: What the attacker knows, for attacks that choose by it.

    Raises:
        InputError: There is no such attack, or no such setting.
        SettingError: A value that cannot be used.
    """
    found = SeedAttack if name is None else get_attack(name)
    if not issubclass(found, OptimizationAttack):
        granted = {"granted": knowledge.granted, "adaptive": knowledge.adapts}
        return found.configured({**settings, **granted})
    config = found.published.changed(**settings)
    config.validate()
    return found(config)
