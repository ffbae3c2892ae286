"""SVDefense: share the gradient's largest singular directions only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradients.defenses.base import ClientView, Defense, Gradient, register_defense, require


@register_defense("svdefense")
@dataclass(frozen=True)
class SVDefense(Defense):
    """Truncate the singular value decomposition of every layer's gradient.

    A tensor is a matrix of its outputs x all else; the fewest largest singular values are kept
    whose squares sum to at least `energy` of the total. Vectors are shared as they are. Of one
    image a fully connected layer's gradient has rank 1, and nothing is hidden.

    The paper adapts the threshold to the balance of a client's classes, weighs channels in the
    approximation and layers in the aggregation. Its code is not public and these weights were
    not at hand: assumed are the same threshold for every layer and client, and no weights.

    Args:
        energy: Share of the squared norm that is kept at least.

    Source: Luo, Yau, Song, "SVDefense: Effective Defense against Gradient Inversion Attacks via
        Singular Value Decomposition", NDSS 2026, https://arxiv.org/abs/2510.03319.

    Published: hides more than the other defenses at little cost in accuracy, on images,
        activities and keywords, and resists attackers who know it.
    """

    energy: float = 0.9

    def __post_init__(self) -> None:
        require(0 < self.energy <= 1, "the energy must lie in (0, 1]")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Truncate each tensor."""
        return {name: self._truncated(g) for name, g in gradient.items()}

    def _truncated(self, values: torch.Tensor) -> torch.Tensor:
        if values.dim() < 2 or not values.any():
            return values.clone()
        left, singular, right = torch.linalg.svd(values.flatten(1).double(), full_matrices=False)
        rank = rank_of_energy(singular, self.energy)
        kept = (left[:, :rank] * singular[:rank]) @ right[:rank]
        return kept.view_as(values).to(values.dtype)


def rank_of_energy(singular: torch.Tensor, energy: float) -> int:
    """The fewest leading singular values whose squares sum to this share of all.

    Args:
        singular: Singular values, descending, not all zero.
        energy: In (0, 1].
    """
    shares = singular.square().cumsum(0) / singular.square().sum()
    # Rounding may leave the sum of all a little below 1.
    enough = shares >= min(energy, float(shares[-1]))
    return int(enough.nonzero()[0]) + 1
