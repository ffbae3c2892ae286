"""PRECODE: a variational bottleneck in front of the classification layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from core.models.architecture import Architecture, Description
from core.models.building import last_linear
from core.models.unchanged import modes_held
from gradients.defenses.base import ClientView, Defense, Gradient, register_defense, require

# What the initial bottleneck is drawn from, the same in all processes and for the attacker.
SEED = 0
BOTTLENECK = "bottleneck"


class VariationalBottleneck(nn.Module):
    """Encode features as a normal distribution, draw from it, and decode what was drawn.

    (m, s) = E z + e gives the mean and softplus(s) the deviation of k numbers; the output is
    D b + d of b = m + softplus(s) o noise. No `nn.Linear` is used, so that the classification
    layer stays the last one of the model.

    Args:
        features: Of z, and of the output.
        size: k.

    Attributes:
        pinned: Noise of a batch (N x k) that is known; None: it is drawn, in both modes.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.encoder = nn.Parameter(torch.empty(2 * size, features))
        self.encoder_bias = nn.Parameter(torch.empty(2 * size))
        self.decoder = nn.Parameter(torch.empty(features, size))
        self.decoder_bias = nn.Parameter(torch.empty(features))
        self.pinned: torch.Tensor | None = None
        numbers = torch.Generator().manual_seed(SEED)
        bounds = [features**-0.5] * 2 + [size**-0.5] * 2
        with torch.no_grad():
            for parameter, bound in zip(self.parameters(), bounds, strict=True):
                if not parameter.is_meta:
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=numbers)
                    parameter.copy_(drawn)

    def distribution(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation (N x k each) of features (N x d)."""
        mean, raw = F.linear(features, self.encoder, self.encoder_bias).chunk(2, dim=1)
        return mean, F.softplus(raw)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Of N x d features, as many."""
        mean, deviation = self.distribution(features)
        noise = self.pinned
        if noise is None or len(noise) != len(mean):
            noise = torch.randn_like(mean)
        return F.linear(mean + deviation * noise.to(mean), self.decoder, self.decoder_bias)

    def divergence(self, features: torch.Tensor) -> torch.Tensor:
        """KL divergence from the standard normal distribution in bits, the mean over N samples."""
        mean, deviation = self.distribution(features)
        each = mean.square() + deviation.square() - 1 - 2 * deviation.log()
        return 0.5 * each.sum(1).mean() / math.log(2)


def bottleneck_of(model: nn.Module) -> VariationalBottleneck | None:
    """The bottleneck in a model; None where there is none."""
    found = [m for m in model.modules() if isinstance(m, VariationalBottleneck)]
    return found[0] if found else None


def insert_bottleneck(model: nn.Module, size: int) -> None:
    """Put a bottleneck in front of a model's last fully connected layer, if none is there.

    Raises:
        InputError: The model has no such layer.
    """
    if bottleneck_of(model) is not None:
        return
    _, head = last_linear(model)
    bottleneck = VariationalBottleneck(head.in_features, size)
    if head.weight.is_meta:
        bottleneck = bottleneck.to("meta")
    head.add_module(BOTTLENECK, bottleneck.to(head.weight.dtype))
    bottleneck.to(head.weight.device)
    head.register_forward_pre_hook(_through_bottleneck)


def _through_bottleneck(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (head.get_submodule(BOTTLENECK)(inputs[0]), *inputs[1:])


@register_defense("precode")
@dataclass(frozen=True)
class Precode(Defense):
    """Put a variational bottleneck in front of the last fully connected layer.

    It is a part of the model, which clients train and share, and draws noise in training and
    at prediction. The loss gets `beta` times its KL divergence from the standard normal
    distribution; of several local steps the divergence's gradient at the received model is
    added. The model that a client receives has the bottleneck already; an initial one is drawn
    from a constant seed.

    Args:
        size: Numbers k of the bottleneck.
        beta: Weight of the divergence (in bits).

    Source: Scheliga, Mäder, Seeland, "PRECODE - A Generic Model Extension to Prevent Deep Gradient
        Leakage", WACV 2022, https://arxiv.org/abs/2108.04725; k = 256 and beta = 0.001 as there.

    Published: none of the reconstructions by Inverting Gradients of MNIST and CIFAR-10 images
        shows the image. Balunovic et al. (https://arxiv.org/abs/2111.04706) read the input of a
        fully connected first layer exactly all the same; its authors
        (https://arxiv.org/abs/2208.04767) disable it by leaving its gradients out.
    """

    size: int = 256
    beta: float = 0.001

    def __post_init__(self) -> None:
        require(self.size >= 1, "the bottleneck needs at least one number")
        require(self.beta >= 0, "the weight must not be negative")

    def prepare(self, model: nn.Module) -> None:
        """Insert the bottleneck."""
        insert_bottleneck(model, self.size)

    def architecture(self, given: Architecture) -> Architecture:
        """With the bottleneck."""
        return BottleneckArchitecture(given, self.size)

    def is_in(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether there is a bottleneck in a state."""
        return any(f"{BOTTLENECK}.encoder" in name for name in state)

    def check_state(self, shapes: dict[str, Sequence[int]]) -> None:
        """Refuse a bottleneck far larger than the file's.

        Raises:
            InputError: No parameter has its shape.
        """
        if not any(self.size in shape for shape in shapes.values()):
            raise InputError(f"it states --defense {self.word} but no parameter is that large")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Add the gradient of the divergence."""
        bottleneck = bottleneck_of(client.model)
        if bottleneck is None or self.beta == 0:
            return dict(gradient)
        added = self._divergence_gradient(client, bottleneck, list(gradient))
        return {name: g if added[name] is None else g + added[name] for name, g in gradient.items()}

    def _divergence_gradient(
        self, client: ClientView, bottleneck: VariationalBottleneck, names: list[str]
    ) -> dict[str, torch.Tensor]:
        features: list[torch.Tensor] = []
        hook = bottleneck.register_forward_pre_hook(lambda _, given: features.append(given[0]))
        model = client.model
        state = {n: b.clone() for n, b in model.named_buffers()}
        held = dict(model.named_parameters())
        try:
            with torch.enable_grad(), modes_held(model):
                wanted = {n: held[n].detach().requires_grad_() for n in names}
                torch.func.functional_call(model, {**state, **wanted}, (client.images,))
                values = {n.rpartition(".")[2]: v for n, v in wanted.items() if BOTTLENECK in n}
                loss = self.beta * _divergence_with(bottleneck, values, features[0])
                found = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
        finally:
            hook.remove()
        return dict(zip(names, found, strict=True))


def _divergence_with(
    bottleneck: VariationalBottleneck, values: dict[str, torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    """The divergence under other parameters than the module's own."""
    holder = _Divergence(bottleneck)
    state = {f"bottleneck.{name}": value for name, value in values.items()}
    return torch.func.functional_call(holder, state, (features,))


class _Divergence(nn.Module):
    def __init__(self, bottleneck: VariationalBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.bottleneck.divergence(features)


class BottleneckArchitecture:
    """An architecture with a bottleneck.

    Args:
        inner: The architecture without it.
        size: Numbers of the bottleneck.
        noise: N x size, where the noise of a batch is known.
    """

    def __init__(self, inner: Architecture, size: int, noise: torch.Tensor | None = None) -> None:
        self.inner, self.size, self.noise = inner, size, noise

    @property
    def name(self) -> str:
        """See `Architecture`."""
        return self.inner.name

    def build(self) -> nn.Module:
        """See `Architecture`."""
        return self._with_bottleneck(self.inner.build())

    def skeleton(self) -> nn.Module:
        """See `Architecture`."""
        return self._with_bottleneck(self.inner.skeleton())

    def _with_bottleneck(self, model: nn.Module) -> nn.Module:
        insert_bottleneck(model, self.size)
        found = bottleneck_of(model)
        assert found is not None
        found.pinned = self.noise
        return model

    def describe(self) -> Description:
        """See `Architecture`."""
        return self.inner.describe()
