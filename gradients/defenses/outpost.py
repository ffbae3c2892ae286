"""Outpost: prune, and add noise where the gradient says most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    normal_like,
    register_defense,
    require,
)


@register_defense("outpost")
@dataclass(frozen=True)
class Outpost(Defense):
    """Prune every tensor, then add noise where the empirical Fisher information is largest.

    - Risk of a tensor: the variance of its parameters, at most 1.
    - Fisher information of an element: the mean of g^2 over the tensor's first dimension, so
      that all outputs of a place have the same.
    - In every tensor, the `prune` percent of smallest magnitude become zero; then the places
      whose information is among the largest `phi` percent of the whole update get
      N(0, (risk * noise)^2) in all outputs.

    The published defense does so in iteration t of local training with probability
    1 / (1 + beta t), beta = 0.125. Here one update is defended, which is t = 0: always. Its
    public code seeds the noise with a constant of the configuration; here it is a secret.

    Args:
        noise: Standard deviation of the noise relative to the risk.
        prune: Percentage of every tensor that is set to zero.
        phi: Percentage of places that get noise.

    Source: Wang, Hugh, Li, "More than Enough is Too Much: Adaptive Defenses against Gradient
        Leakage in Production Federated Learning", INFOCOM 2023,
        https://doi.org/10.1109/INFOCOM53939.2023.10228919; its code, with these values:
        https://github.com/TL-System/plato.

    Published: a better balance of accuracy, time and protection than noise, compression,
        Soteria and GradDefense.
    """

    noise: float = 0.8
    prune: float = 80.0
    phi: float = 40.0

    def __post_init__(self) -> None:
        require(self.noise >= 0, "the noise must not be negative")
        require(0 <= self.prune < 100, "the percentage of pruning must lie in [0, 100)")
        require(0 <= self.phi <= 100, "the percentage of places must lie in [0, 100]")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Prune and perturb each tensor."""
        risks = parameter_risk(client.model)
        information = {name: g.square().mean(0) for name, g in gradient.items()}
        flat = np.concatenate([i.flatten().cpu().numpy() for i in information.values()])
        least = float(np.percentile(flat, 100 - self.phi))
        shared = {}
        for name, g in gradient.items():
            drawn = normal_like(g, client.generator)
            noise = self.noise * risks[name] * (information[name] >= least) * drawn
            shared[name] = self._pruned(g) + noise
        return shared

    def _pruned(self, values: torch.Tensor) -> torch.Tensor:
        magnitudes = values.abs()
        least = float(np.percentile(magnitudes.flatten().cpu().numpy(), self.prune))
        return torch.where(magnitudes < least, 0, values)


def parameter_risk(model: nn.Module) -> dict[str, float]:
    """The variance of every parameter tensor, at most 1; 0 of a single number."""
    return {
        name: min(1.0, float(p.detach().double().var())) if p.numel() > 1 else 0.0
        for name, p in model.named_parameters()
    }
