"""What a defense left to chance, found by short attacks: the likeliest is inverted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attack.knowledge.answers.mixup import likeliest_mixture
from attack.loop.inversion import InterruptedInversion, Inversion

if TYPE_CHECKING:
    import torch

    from attack.settings import InversionConfig
    from core.target import Target

# Of the attack's iterations, in every short one.
SHARE = 0.3
# Searches by the name of the defense.
SEARCHES = {"mixup": likeliest_mixture}


def likeliest(
    target: Target,
    labels: torch.Tensor,
    config: InversionConfig,
    *,
    device: torch.device,
    seed: int,
) -> Target:
    """The target with what its defenses drew at random, as far as an attacker can find it.

    Args:
        target: What the client shared.
        labels: N labels.
        config: Settings of the attack, which says whether it is told of defenses.
        device: Device that runs the computation.
        seed: Seed of the start, which all short attacks share.

    Returns:
        The target itself where there is nothing to find.
    """
    if not config.matching.adaptive:
        return target
    few = max(1, int(SHARE * config.optimiser.iterations))
    short = config.changed(
        iterations=few, restarts=1, combine=False, polish=0, warmup=0, time_budget=None
    )

    def objective(candidate: Target) -> float:
        try:
            inversion = Inversion(candidate, labels, short, device=device, seed=seed)
            return inversion.run().objective
        except InterruptedInversion:
            # A short attack is no result.
            raise KeyboardInterrupt from None

    for word in target.defenses:
        search = SEARCHES.get(word.split(":")[0])
        if search is not None:
            target = search(target, labels, objective)
    return target
