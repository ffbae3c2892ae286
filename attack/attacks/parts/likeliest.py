"""What a defense left to chance, found by further attacks: the likeliest is inverted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attack.knowledge.answers.ats import likeliest_transformations
from attack.knowledge.answers.dcs2 import with_concealing_images
from attack.knowledge.answers.instahide import likeliest_encoding
from attack.knowledge.answers.mixup import likeliest_mixture
from attack.knowledge.answers.precode import likeliest_noise
from attack.knowledge.answers.refiner import likeliest_refinement
from attack.knowledge.answers.shadow import likeliest_noise_map
from attack.knowledge.likely import SHORT, Attempt, Likely
from core.settings import Value

if TYPE_CHECKING:
    import torch

    from attack.reconstruction import Reconstruction
    from attack.settings import InversionConfig
    from core.target import Target


def _mixture(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    def objective(candidate: Target) -> float:
        return attempt(candidate, SHORT).objective

    return Likely(likeliest_mixture(target, labels, objective))


# Searches by the name of the defense.
SEARCHES: dict[str, Callable[[Target, torch.Tensor, Attempt], Likely]] = {
    "ats": likeliest_transformations,
    "dcs2": with_concealing_images,
    "instahide": likeliest_encoding,
    "mixup": _mixture,
    "precode": likeliest_noise,
    "refiner": likeliest_refinement,
    "shadow": likeliest_noise_map,
}


def likeliest(
    target: Target,
    labels: torch.Tensor,
    config: InversionConfig,
    attempt: Callable[[Target, InversionConfig], Reconstruction],
) -> Likely:
    """The target with what its defenses drew at random, as far as an attacker can find it.

    Args:
        target: What the client shared.
        labels: N labels.
        config: Settings of the attack, which says whether it is told of defenses.
        attempt: Runs an attack on a candidate.

    Returns:
        The target itself where there is nothing to find.
    """
    found = Likely(target)
    if not config.matching.adaptive:
        return found

    def shortened(target: Target, share: float, **changes: Value) -> Reconstruction:
        few = max(1, int(share * config.optimiser.iterations))
        short = config.changed(
            iterations=few, restarts=1, combine=False, polish=0, warmup=0, time_budget=None
        )
        return attempt(target, short.changed(**changes))

    for word in target.defenses:
        search = SEARCHES.get(word.split(":")[0])
        if search is not None:
            found = search(found.target, labels, shortened)
    return found
