"""Against GradDefense: which slices are noise, and how much."""

from __future__ import annotations

import itertools

import torch

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from core.target import Target
from gradients.defenses.base import parse_defenses
from gradients.defenses.graddefense import GradDefense, slice_bounds

# Elements nearer to zero than this many standard deviations of the noise.
NEAR = 0.1
# Of normal noise 8 % are so near; where more are, there was none.
NEAR_SHARE = 0.12


@register_adaptation("graddefense")
def _graddefense(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Cut the slices as the client did, tell the noised ones, and count them by their signal.

    The slices follow from the model and the root set. Noise of known size leaves few elements
    near zero, fewer still where there is signal beside it; a slice without noise has many,
    unless its signal is so strong that the noise does not matter.
    """
    (word,) = [w for w in target.defenses if w.split(":")[0] == "graddefense"]
    (defense,) = parse_defenses(word)
    assert isinstance(defense, GradDefense)
    names = list(target.gradient)
    bounds = slice_bounds(
        target.build_model(), target.data.shape, names, defense.slices, target.loss
    )
    flat = torch.cat([g.flatten() for g in target.gradient.values()])
    weights = torch.ones_like(flat)
    noised = 0
    for start, end in itertools.pairwise(bounds):
        if start < end and is_noised(flat[start:end], defense.scale):
            weights[start:end] = signal_share(flat[start:end], defense.scale)
            noised += 1
    parts = weights.split([g.numel() for g in target.gradient.values()])
    adaptation.weights = [
        w * part.view_as(g)
        for w, part, g in zip(adaptation.weights, parts, target.gradient.values(), strict=True)
    ]
    adaptation.notes.append(
        f"graddefense: {noised} of {defense.slices} slices have the distribution of noise and "
        "count by the share of signal in them"
    )


def is_noised(values: torch.Tensor, scale: float) -> bool:
    """Whether these elements look as if noise had been added."""
    if scale == 0:
        return False
    return float((values.abs() < NEAR * scale).double().mean()) < NEAR_SHARE


def signal_share(values: torch.Tensor, scale: float) -> float:
    """The share of the squared elements that is not noise, as an amplitude."""
    energy = float(values.double().square().mean())
    return max(0.0, 1 - scale**2 / max(energy, 1e-300)) ** 0.5
