"""Stochastic quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    register_defense,
    require,
    uniform_like,
)


@register_defense("quantize")
@dataclass(frozen=True)
class Quantize(Defense):
    """Round every element at random to one of a few levels, without bias (QSGD).

    With |g| the norm of the tensor and s levels, g_i becomes |g| sign(g_i) l / s or
    |g| sign(g_i) (l + 1) / s, where l = floor(s |g_i| / |g|), so that the mean is g_i.

    Args:
        levels: Number s of levels between zero and the norm.

    Source: Alistarh et al., "QSGD", equation 2, https://arxiv.org/abs/1610.02132.
    """

    levels: int = 16

    def __post_init__(self) -> None:
        require(self.levels >= 1, "there must be at least one level")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Quantise each tensor."""
        return {name: self._quantize(g, client.generator) for name, g in gradient.items()}

    def _quantize(self, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        norm = values.norm()
        if norm == 0:
            return values.clone()
        level = self.levels * values.abs() / norm
        up = uniform_like(values, generator) < level - level.floor()
        return norm * values.sign() * (level.floor() + up) / self.levels
