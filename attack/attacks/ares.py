"""ARES: a hidden layer's activations come apart, images are found behind them (Gong et al.)."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.bins import read_bins
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.attacks.parts.generalized_lasso import solve
from attack.attacks.robbing_the_fed import EMPTY
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.models.malicious import malice_of, parse_malice
from core.target import Target
from gradients.servers.ares import hidden_layer, inputs_at

# Of the differences of neighbouring pixels, against activations of the size of one.
WEIGHT = 1e-3
ITERATIONS = 600


@register_attack
class Ares(Attack):
    """Read activations out of a hidden layer's bins, and solve for the images that cause them.

    The server set the layer's weights (stage 2: `--malicious ares:BINS`); the architecture is as it
    was. Neighbouring neurons' gradients differ by the activations of the images whose mean
    activation lies between their thresholds: of an image that is alone in its bin they come out
    exactly. The image is what explains them through the layers in front, whose weights are known,
    with few differences between neighbouring pixels: a generalized Lasso. Of a network whose first
    layer is dense, activations are the image.

    After several local steps, the update stands for the gradient; that is exact where the steps
    are short.

    Only the abstract and the introduction of the paper could be read; what they leave open, the
    penalty and the algorithm, are ours.

    Source: Gong, Zhang, Zhang, Vo, Zhu, Pan, Wang, "ARES: Scalable and Practical Gradient Inversion
        Attack in Federated Learning through Activation Recovery", 2026,
        https://arxiv.org/abs/2603.17623.

    Published: no value in the part that could be read.

    Example:
        python training/get_gradients.py --data photo-patches -a fedavg_cnn --malicious ares:128
        python main_run.py --attack ares --checkpoint CHECKPOINT --metric

    Args:
        weight: Of the differences between neighbouring pixels.
        rounds: Iterations of the Lasso.
    """

    name = "ares"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})

    def __init__(self, weight: float = WEIGHT, rounds: int = ITERATIONS) -> None:
        self.weight, self.rounds = weight, rounds

    @classmethod
    def configured(cls, given: dict[str, Any]) -> Attack:
        """See `Attack.configured`; --epochs are iterations of the Lasso."""
        return cls(rounds=int(given.get("iterations") or ITERATIONS))

    @property
    def iterations(self) -> int:
        """See `Attack.iterations`."""
        return self.rounds

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random.

        Raises:
            InputError: The model was not tampered with, or the layer's gradient was not shared.
        """
        began = time.perf_counter()
        found = self._activations(target, device)
        inputs = self._images(target, found, device)
        return closed_form_reconstruction(
            target,
            inputs.flatten(1),
            labels,
            device=device,
            began=began,
            iterations=self.rounds,
            details={"activations": found.shape[1]},
        )

    def _activations(self, target: Target, device: torch.device) -> torch.Tensor:
        """k x d inputs of the hidden layer, each of the images of one bin."""
        if not malice_of(target.model).startswith("ares"):
            raise InputError(
                f"--attack {self.name}: the hidden layers of {target.model.name} are honest; a "
                "malicious server sets one in stage 2 with --malicious ares:BINS"
            )
        name, layer, _ = hidden_layer(target.build_model())
        names = (f"{name}.weight", f"{name}.bias")
        if any(each not in target.gradient for each in names):
            raise InputError(f"--attack {self.name}: the gradient of {name} was not shared")
        bins = parse_malice(malice_of(target.model), target.data.n_classes).number
        dtype = target.gradient[names[0]].dtype
        weight, bias = (target.gradient[each][:bins].to(device).double() for each in names)
        return read_bins(
            -layer.bias.detach()[:bins].to(device).double(),
            weight,
            bias,
            target.batch_size,
            EMPTY.get(dtype, 1e-3),
        )

    def _images(self, target: Target, found: torch.Tensor, device: torch.device) -> torch.Tensor:
        """k x C x H x W network inputs that explain the activations."""
        model = target.build_model().float().to(device)
        name, _, _ = hidden_layer(model)
        model.requires_grad_(False)
        shape = target.data.shape
        black, white = torch.zeros(1, *shape, device=device), torch.ones(1, *shape, device=device)
        bounds = target.data.normalize(black), target.data.normalize(white)
        if torch.equal(inputs_at(model, name, bounds[1]), bounds[1].flatten(1)):
            return found.reshape(-1, *shape)
        # A flat image of middle brightness.
        start = ((bounds[0] + bounds[1]) / 2).expand(len(found), *shape)
        return solve(
            lambda x: inputs_at(model, name, x),
            found.float(),
            start,
            bounds,
            weight=self.weight,
            iterations=self.rounds,
        ).double()
