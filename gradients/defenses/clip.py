"""Gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradients.defenses.base import ClientView, Defense, Gradient, register_defense, require


@register_defense("clip")
@dataclass(frozen=True)
class Clip(Defense):
    """Scale the whole update down to a given L2 norm; a shorter one is left alone.

    g' = g min(1, C / |g|), |g| over all parameters.

    Args:
        max_norm: Clipping norm C, the largest Euclidean norm that is left as it is.

    Source: Wei et al., "A Framework for Evaluating Gradient Leakage Attacks in
        Federated Learning", https://arxiv.org/abs/2004.10397; clipping as in Pascanu
        et al., ICML 2013, https://arxiv.org/abs/1211.5063.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_norm > 0, "the norm must be positive")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Clip to `max_norm`."""
        factor = min(1.0, self.max_norm / max(float(global_norm(gradient)), 1e-30))
        return {name: g * factor for name, g in gradient.items()}

    def largest_norm(self, norm: float) -> float:
        """The clipping norm."""
        return min(norm, self.max_norm)


def global_norm(gradient: Gradient) -> torch.Tensor:
    """L2 norm over all parameters, in float64."""
    return torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()
