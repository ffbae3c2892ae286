"""Noise in proportion to the update: adaptive Gaussian privacy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    normal_like,
    register_defense,
    require,
)


@register_defense("percentile-noise", "percentile")
@dataclass(frozen=True)
class Percentile(Defense):
    """Add Gaussian noise scaled by a percentile of the update's own magnitudes.

    sigma = sigma0 x (percentile of the nonzero |g_i| over the whole update). It is what the
    published federation's `GaussianPrivacy` does. NVFlare's `PercentilePrivacy` is another
    filter, which drops and truncates values and adds no noise.

    Args:
        sigma0: Noise relative to that percentile.
        percentile: In (0, 100].

    Source: Hatamizadeh et al., "Do Gradient Inversion Attacks Make Federated Learning
        Unsafe?", section VI, https://arxiv.org/abs/2202.06924.
    """

    sigma0: float = 0.1
    percentile: float = 95.0

    def __post_init__(self) -> None:
        require(self.sigma0 >= 0, "sigma0 must not be negative")
        require(0 < self.percentile <= 100, "the percentile must lie in (0, 100]")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Add the noise."""
        std = self.noise_std(gradient)
        return {n: g + std * normal_like(g, client.generator) for n, g in gradient.items()}

    def noise_std(self, gradient: Gradient) -> float:
        """Standard deviation of the noise for this update."""
        # numpy: torch.quantile refuses more than 2^24 elements.
        flat = np.concatenate([g.abs().flatten().cpu().numpy() for g in gradient.values()])
        nonzero = flat[flat > 0]
        return self.sigma0 * float(np.percentile(nonzero, self.percentile)) if nonzero.size else 0.0
