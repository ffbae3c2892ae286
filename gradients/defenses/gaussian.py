"""Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    normal_like,
    register_defense,
    require,
)
from gradients.private_gradient import gaussian_epsilon


@register_defense("gaussian")
@dataclass(frozen=True)
class Gaussian(Defense):
    """Add N(0, std^2) to every element. Without clipping this bounds no privacy loss.

    Args:
        std: Standard deviation of the noise.

    Source: Zhu et al., "Deep Leakage from Gradients", section 5.1,
        https://arxiv.org/abs/1906.08935.
    """

    std: float = 1e-2

    def __post_init__(self) -> None:
        require(self.std >= 0, "the standard deviation must not be negative")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Add the noise."""
        rng = client.generator
        return {name: g + self.std * normal_like(g, rng) for name, g in gradient.items()}

    def epsilon(self, norm: float, rounds: int, delta: float) -> float | None:
        """That of the Gaussian mechanism: two updates lie at most twice the norm apart."""
        if math.isinf(norm) or self.std == 0:
            return None
        return gaussian_epsilon(self.std / (2 * norm), delta, rounds)
