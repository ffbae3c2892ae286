"""LOKI: images of many clients out of the sum of their updates (Zhao et al. 2024)."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import torch
from torch import nn

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.models.building import ModelSpec
from core.models.malicious import Separated, malice_of
from core.target import Target
from gradients.client import ClientSettings
from gradients.malicious_server import sent_to_clients
from gradients.sums import Aggregation, share_sum

# A neuron whose gradient is below this share of the largest has seen no image.
EMPTY = {torch.float64: 1e-10, torch.float32: 1e-5}
BLOCK = "imprint"


@register_attack
class Loki(Attack):
    """Read every client's images out of its own columns of the dense layer's gradient.

    The server put the block there (stage 2: `--malicious loki:BINS:CLIENTS`, with `--aggregate
    CLIENTS`). A neuron's weight gradient in the columns of one client is the sum of that client's
    images whose brightness lies in the neuron's bin; an image that is alone comes out up to a
    factor. The bias gradient gives the factor where no other client has an image in the bin;
    that, and the brightness that the bin stands for, bound each other. It says whose image it is.

    Several local steps are no obstacle: a neuron's parameters move only where its bin holds an
    image, and images that are alone are the same multiple of themselves after any number of steps.

    Source: Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi, "LOKI: Large-scale Data
        Reconstruction Attack against Federated Learning through Model Manipulation", IEEE S&P
        2024, https://arxiv.org/abs/2303.12233; there images are rescaled to 0..1 instead.

    Published: 76 to 86 % of all images of 100 clients under FedAvg on MNIST, CIFAR-100 and Tiny
        ImageNet, in one round.

    Example:
        python training/get_gradients.py --data photo-patches -b 4 --aggregate 4 --model-eval \\
            --malicious loki:64:4
        python main_run.py --attack loki --checkpoint CHECKPOINT --metric
    """

    name = "loki"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random. Images stand in the order of the clients.

        Raises:
            InputError: The model has no such block, or its gradient was not shared.
        """
        began = time.perf_counter()
        if not malice_of(target.model).startswith("loki"):
            raise InputError(
                f"--attack {self.name}: {target.model.name} tells no clients apart; a malicious "
                "server makes it so in stage 2 with --malicious loki:BINS:CLIENTS"
            )
        block = _Block.of(target, device)
        images = torch.zeros(target.batch_size, block.pixels, dtype=torch.float64, device=device)
        solved, size = 0, target.images_per_client
        for place, number in enumerate(target.clients or (0,)):
            found = block.images_of(number, size)
            images[place * size : place * size + len(found)] = found
            solved += len(found)
        return closed_form_reconstruction(
            target,
            images,
            labels,
            device=device,
            began=began,
            objective=_sum_distance(target, images, labels) if target.n_clients > 1 else None,
            iterations=1,
            details={"solved": solved, "bins": len(block.ends)},
        )


def _sum_distance(target: Target, solved: torch.Tensor, labels: torch.Tensor) -> float:
    """Cosine distance of the shared sum to that of candidates, each client's model its own."""
    assert isinstance(target.model, ModelSpec)
    inputs = solved.cpu().nan_to_num().reshape(-1, *target.data.shape)
    images = target.data.clamp(target.data.denormalize(inputs))
    settings = ClientSettings(local=target.local, train_mode=target.train_mode, loss=target.loss)
    found = share_sum(
        sent_to_clients(target.build_model(), target.model),
        target.model,
        target.data,
        images,
        labels.cpu(),
        settings,
        Aggregation(max(target.clients) + 1, target.clients),
    )
    made, shown = (
        torch.cat([value.flatten().double() for value in each.gradient.values()])
        for each in (found, target)
    )
    return 1 - float(torch.cosine_similarity(made, shown, dim=0))


@dataclasses.dataclass(frozen=True)
class _Block:
    """The block and what was shared of it.

    Attributes:
        ends: m, lower ends of the bins of brightness.
        widths: m, of the bins.
        weight: m x (clients d), gradient of the dense layer.
        bias: m, its bias gradient.
        shift: d, of the block's channels against the network's input.
        scale: Factor of the convolution.
        pixels: d, values of an image.
        empty: See `EMPTY`.
    """

    ends: torch.Tensor
    widths: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor
    scale: float
    pixels: int
    empty: float

    @staticmethod
    def of(target: Target, device: torch.device) -> _Block:
        """That of a target's model."""
        model = target.build_model()
        assert isinstance(model, Separated)
        convolution, layer = model.imprint[0], model.imprint[3]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(layer, nn.Linear)
        assert convolution.bias is not None
        names = [f"{BLOCK}.3.weight", f"{BLOCK}.3.bias"]
        if any(name not in target.gradient for name in names):
            raise InputError("--attack loki: the gradient of the block's dense layer is not shared")
        weight, bias = (target.gradient[name].to(device).double() for name in names)
        pixels = layer.in_features * 3 // convolution.out_channels
        scale = float(convolution.weight.detach().max())
        shift = convolution.bias.detach().double().view(-1, 3).max(0).values / scale
        widths = 1 / (layer.weight.detach().double()[:, 0] * scale * pixels)
        return _Block(
            ends=(-layer.bias.detach().double() * widths).to(device),
            widths=widths.to(device),
            weight=weight,
            bias=bias,
            shift=shift.repeat_interleave(pixels // 3).to(device),
            scale=scale,
            pixels=pixels,
            empty=EMPTY.get(target.gradient[names[0]].dtype, 1e-3),
        )

    def images_of(self, number: int, most: int) -> torch.Tensor:
        """k x d network inputs of one client, k at most `most`."""
        own = self.weight[:, number * self.pixels : (number + 1) * self.pixels]
        # Each neuron's gradient holds the inverse of its bin's width.
        size = own.norm(dim=1) * self.widths
        chosen = size.argsort(descending=True)[:most]
        chosen = chosen[size[chosen] > self.empty * (self.weight.norm(dim=1) * self.widths).max()]
        rows, ends, widths = own[chosen], self.ends[chosen], self.widths[chosen]
        mean = rows.mean(1)
        told = (mean / (self.scale * self.bias[chosen])).nan_to_num(0.0)
        brightness = torch.minimum(torch.maximum(told, ends), ends + widths)
        return rows * (brightness / mean)[:, None] - self.shift
