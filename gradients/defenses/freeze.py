"""Layer freezing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from core.errors import InputError
from gradients.defenses.base import ClientView, Defense, Gradient, register_defense


@register_defense("freeze")
@dataclass(frozen=True)
class Freeze(Defense):
    """Train and share only some layers; the others' gradients never exist.

    Args:
        free: Layers that stay free, joined by `+`: module names such as
            `layer4+fc`, or the number of last layers with parameters (`1`).

    Source: `free_last_layers_list` of the gradient-heterogeneity tools; frozen
        layers against inversion: Yin et al., "See through Gradients",
        https://arxiv.org/abs/2104.07586.
    """

    free: str = "1"

    def prepare(self, model: nn.Module) -> None:
        """Freeze all other parameters.

        Raises:
            InputError: The model has no layer of that name.
        """
        free = self._free_layers(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(_inside(name, layer) for layer in free))

    def _free_layers(self, model: nn.Module) -> list[str]:
        layers = [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
        if self.free.isdigit():
            if not 1 <= int(self.free) <= len(layers):
                raise InputError(f"--defense {self.word}: the model has {len(layers)} layers")
            return layers[-int(self.free) :]
        named = self.free.split("+")
        for name in named:
            if not any(_inside(layer, name) for layer in layers):
                raise InputError(f"--defense {self.word}: the model has no layer {name}")
        return named

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Drop what is frozen (nothing, where `prepare` ran before training)."""
        free = self._free_layers(client.model)
        return {n: g for n, g in gradient.items() if any(_inside(n, layer) for layer in free)}


def _inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")
