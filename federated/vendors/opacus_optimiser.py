"""Opacus' optimiser as a defense: a client's local steps again, with its clipping and noise."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from core.processes.distributed import alone
from gradients.defenses import ClientView, Defense, Gradient, register_defense
from gradients.defenses.base import require
from gradients.local_update import images_of_steps
from training.privacy import PerSampleClipping


@register_defense("opacus")
@dataclass(frozen=True)
class OpacusDp(Defense):
    """Opacus' `DPOptimizer`: every image's gradient is clipped, and their mean gets noise.

    The local steps are taken again, by plain SGD, with the gradients that Opacus makes. A model
    with BatchNorm is refused, as Opacus refuses it.

    Args:
        noise_multiplier: Deviation of the noise on the sum, in clipping norms.
        max_norm: Clipping norm of one image's gradient.

    Source: Opacus, `opacus.optimizers.optimizer`; Abadi et al.,
        https://arxiv.org/abs/1607.00133. `get_noise_multiplier` of Opacus gives the multiplier of
        an epsilon.
    """

    noise_multiplier: float = 1.0
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.noise_multiplier >= 0, "the noise multiplier must not be negative")
        require(self.max_norm > 0, "the norm must be positive")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """The update of the same images under DP-SGD."""
        model = copy.deepcopy(client.model)
        parameters = dict(model.named_parameters())
        total = {name: torch.zeros_like(g) for name, g in gradient.items()}
        steps = images_of_steps(len(client.images), client.local)
        noise = torch.Generator(client.images.device)
        noise.manual_seed(int(torch.randint(2**31, (1,), generator=client.generator)))
        for (chosen,) in steps:
            images, labels = client.images[chosen], client.labels[chosen]
            optimiser = PerSampleClipping(
                model,
                max_norm=self.max_norm,
                noise_multiplier=self.noise_multiplier,
                expected_batch_size=len(images),
                client_loss=client.loss,
            )
            with alone():
                optimiser.backward(images, labels, noise)
            with torch.no_grad():
                for name, summed in total.items():
                    found = parameters[name].grad
                    assert found is not None
                    summed += found
                    parameters[name].sub_(client.local.lr * found)
        return {name: summed / len(steps) for name, summed in total.items()}
