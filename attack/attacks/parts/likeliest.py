"""What a defense left to chance, found by short attacks: the likeliest is inverted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attack.knowledge.answers.mixup import likeliest_mixture

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
    attempt: Callable[[Target, InversionConfig], float],
) -> Target:
    """The target with what its defenses drew at random, as far as an attacker can find it.

    Args:
        target: What the client shared.
        labels: N labels.
        config: Settings of the attack, which says whether it is told of defenses.
        attempt: Runs a short attack on a candidate: the objective that it ends at.

    Returns:
        The target itself where there is nothing to find.
    """
    if not config.matching.adaptive:
        return target
    few = max(1, int(SHARE * config.optimiser.iterations))
    short = config.changed(
        iterations=few, restarts=1, combine=False, polish=0, warmup=0, time_budget=None
    )
    for word in target.defenses:
        search = SEARCHES.get(word.split(":")[0])
        if search is not None:
            target = search(target, labels, lambda candidate: attempt(candidate, short))
    return target
