"""Keep the first layers in a trusted execution environment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from core.errors import InputError
from gradients.defenses.base import ClientView, Defense, Gradient, register_defense, require
from gradients.defenses.layerdrop import shared_layers


@register_defense("enclave")
@dataclass(frozen=True)
class Enclave(Defense):
    """Train the first layers inside an enclave, whose gradients nobody sees.

    The layers are the first ones with parameters, in the order in which the model defines
    them. They are trained: enclaves of clients and server aggregate them. The attacker sees the
    gradients of the others, and knows all parameters of the received model, as it does in the
    first round or where the server deploys the model; a server that never learns the hidden
    layers' parameters (PPFL) is weaker.

    Args:
        layers: Number of hidden layers.

    Source: Mo et al., "PPFL: Privacy-preserving Federated Learning with Trusted Execution
        Environments", MobiSys 2021, https://arxiv.org/abs/2104.14380.

    Published: defends against data reconstruction, property inference and membership inference
        at comparable accuracy.
    """

    layers: int = 1

    def __post_init__(self) -> None:
        require(self.layers >= 1, "at least one layer must be hidden")

    def prepare(self, model: nn.Module) -> None:
        """Refuse to hide everything.

        Raises:
            InputError: No layer would be left.
        """
        names = [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
        self._check(len(names))

    def _check(self, layers: int) -> None:
        if self.layers >= layers:
            raise InputError(
                f"--defense {self.word}: the model has {layers} layers, and one must be left"
            )

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Leave out the hidden layers' tensors."""
        layers = shared_layers(client.model, gradient)
        self._check(len(layers))
        hidden = set(layers[: self.layers])
        return {n: g for n, g in gradient.items() if n.rpartition(".")[0] not in hidden}
