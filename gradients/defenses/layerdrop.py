"""Share a random choice of layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    register_defense,
    require,
    uniform_like,
)


@register_defense("layerdrop")
@dataclass(frozen=True)
class LayerDrop(Defense):
    """Leave layers out of the update at random; which ones, everybody sees.

    Every layer with parameters is shared with probability `share`, with all its parameters;
    where chance leaves none, one is drawn.

    Args:
        share: Probability that a layer is shared.

    Source: sharing a part of the gradient: Shokri and Shmatikov, "Privacy-Preserving Deep
        Learning", CCS 2015, https://doi.org/10.1145/2810103.2813687, who choose parameters. No
        paper for the choice of whole layers is followed; it is assumed to be uniform.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "the share must lie in (0, 1]")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Drop layers; what is dropped is absent."""
        layers = shared_layers(client.model, gradient)
        drawn = uniform_like(torch.zeros(len(layers)), client.generator)
        kept = {layer for layer, u in zip(layers, drawn.tolist(), strict=True) if u < self.share}
        kept = kept or {layers[int(drawn.argmin())]}
        return {n: g for n, g in gradient.items() if n.rpartition(".")[0] in kept}


def shared_layers(model: nn.Module, gradient: Gradient) -> list[str]:
    """The layers that own shared parameters, in the model's order."""
    owners = {name.rpartition(".")[0] for name in gradient}
    return [name for name, _ in model.named_modules() if name in owners]
