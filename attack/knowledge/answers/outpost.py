"""Against Outpost: zeros tell which places got noise."""

from __future__ import annotations

import math

import torch

from attack.knowledge.answers.graddefense import signal_share
from attack.knowledge.known_defenses import Adaptation, ThroughPruning, register_adaptation
from core.target import Target
from gradients.defenses.base import parse_defenses
from gradients.defenses.outpost import Outpost, parameter_risk


@register_adaptation("outpost")
def _outpost(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Compare kept elements, bound pruned ones, and count noised places by their signal.

    A place that got noise is not zero in any output of its tensor; one that did not is zero
    where it was pruned. The size of the noise follows from the received parameters.
    """
    (word,) = [w for w in target.defenses if w.split(":")[0] == "outpost"]
    (defense,) = parse_defenses(word)
    assert isinstance(defense, Outpost)
    risks = parameter_risk(target.build_model())
    kept, bounds, weights, places = [], [], [], 0
    for name, shared in target.gradient.items():
        scale = defense.noise * risks[name]
        noised = noised_places(shared) if scale > 0 else torch.zeros_like(shared, dtype=torch.bool)
        places += int(noised.sum()) // max(1, shared.numel() // places_of(shared))
        clean = shared[~noised & (shared != 0)].abs()
        kept.append(noised | (shared != 0))
        bounds.append(float(clean.min()) if clean.numel() else math.inf)
        share = signal_share(shared[noised], scale) if noised.any() else 1.0
        weights.append(torch.where(noised, share, 1.0).to(shared.dtype))
    adaptation.through = ThroughPruning(kept, bounds)
    adaptation.weights = [w * own for w, own in zip(adaptation.weights, weights, strict=True)]
    total = sum(map(places_of, target.gradient.values()))
    adaptation.notes.append(
        f"outpost: {places} of {total} places are noised and count by the share of signal in "
        "them; elsewhere kept elements are compared and pruned ones bounded"
    )


def places_of(shared: torch.Tensor) -> int:
    """Elements of one output: those that have a Fisher information of their own."""
    return shared[0].numel() if shared.dim() else 1


def noised_places(shared: torch.Tensor) -> torch.Tensor:
    """Which elements belong to a place that is nonzero in all outputs (the first dimension)."""
    nonzero = shared != 0
    return nonzero.all(0).expand_as(shared) if shared.dim() else nonzero
