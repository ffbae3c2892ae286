"""How near the gradient in the images comes to plain double backward in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import main_output
from core.models.architecture import GivenModel
from core.models.unchanged import in_mode
from core.target import Target
from gradients.client import ClientSettings, share_update

# Below this a table says why.
ENOUGH = 0.9999
BATCH = 4
CPU = torch.device("cpu")
MODES = ("eval", "train")
# Of the candidate images, and of dropout masks.
SEED = 5


@dataclass(frozen=True)
class Agreement:
    """What one model gave in one mode.

    Attributes:
        model: Name in the table.
        mode: "eval" or "train".
        shape: Of one input.
        parameters: Their number, in all shared tensors.
        exact: Cosine of two backward passes in float64 to the reference; None where the model
            is refused.
        difference: Likewise, of the difference of two passes.
        automatic: Cosine of what the automatic choice gives in float32, the default.
        chosen: What that choice took: "difference" or "exact".
        plain: Cosine of plain double backward in float32, measured where `automatic` is below
            `ENOUGH`: what is rounding of float32 and not of the attack's way.
        distance: The objective there, in float64: how far the candidate's gradient is.
        refusal: The sentence with which the model is refused; else empty.
    """

    model: str
    mode: str
    shape: tuple[int, ...]
    parameters: int = 0
    exact: float | None = None
    difference: float | None = None
    automatic: float | None = None
    chosen: str = ""
    plain: float | None = None
    distance: float | None = None
    refusal: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both ways give the reference's direction."""
        found = (self.exact, self.difference)
        return all(cosine is not None and cosine >= ENOUGH for cosine in found)

    @property
    def avoids_the_difference(self) -> bool:
        """Whether the difference alone falls short, and an attack's own choice leaves it."""
        if self.exact is None or self.difference is None:
            return False
        falls_short = self.exact >= ENOUGH > self.difference
        return falls_short and self.chosen == "exact" and self.plain is not None


def agreements(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], n_classes: int
) -> Iterator[Agreement]:
    """Share and match a batch in both modes, see `agreement`."""
    for mode in MODES:
        yield agreement(name, build, shape, n_classes, mode)


def agreement(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    n_classes: int,
    mode: str,
) -> Agreement:
    """Share and match a batch.

    Args:
        name: Of the model, in the table.
        build: Builds it from torch's random numbers.
        shape: Of one input.
        n_classes: Number of outputs.
        mode: One of `MODES`.
    """
    torch.manual_seed(0)
    blank = Agreement(name, mode, shape)
    images = torch.rand(BATCH, *shape)
    labels = torch.arange(BATCH) % n_classes
    try:
        target = _shared(in_mode(build(), mode == "train"), images, labels, n_classes)
        return _measured(blank, target, labels)
    except InputError as error:
        return dataclasses.replace(blank, refusal=str(error))


def _shared(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Target:
    """The gradient that a client would share; half precision is computed in float32."""
    channels, *sides = images.shape[1:]
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    data = DataSpec("random images", (channels, *sides), zeros, ones, n_classes)
    architecture = GivenModel(model, shape=data.shape)
    received = architecture.build().float()
    settings = ClientSettings(train_mode=received.training)
    target = share_update(received, architecture, data, images, labels, settings)
    assert target is not None
    return target


def _measured(blank: Agreement, target: Target, labels: torch.Tensor) -> Agreement:
    generator = torch.Generator().manual_seed(SEED)
    candidate = torch.rand(BATCH, *target.data.shape, generator=generator, dtype=torch.float64)
    layout = Replica(target, CPU).layout
    distance, reference = double_backward(target, candidate, labels, layout)
    ways = (("exact", torch.float64), ("difference", torch.float64), ("auto", torch.float32))
    cosines, chosen = [], ""
    for hvp, dtype in ways:
        found, chosen = _matched(target, candidate.to(dtype), labels, layout, hvp)
        cosines.append(_cosine(found, reference))
    row = dataclasses.replace(
        blank,
        parameters=sum(g.numel() for g in target.gradient.values()),
        exact=cosines[0],
        difference=cosines[1],
        automatic=cosines[2],
        chosen=chosen,
    )
    if cosines[2] >= ENOUGH:
        return row
    _, single = double_backward(target, candidate.float(), labels, layout)
    return dataclasses.replace(row, plain=_cosine(single, reference), distance=distance)


def _matched(
    target: Target,
    candidate: torch.Tensor,
    labels: torch.Tensor,
    layout: torch.memory_format,
    hvp: str,
) -> tuple[torch.Tensor, str]:
    """The attack's gradient in the images, in their precision, and the way that it took."""
    replica = Replica(target, CPU, candidate.dtype)
    # Random masks are drawn in the order of memory.
    replica.lay_out(layout)
    matcher = GradientMatcher(replica, Cosine(), hvp)
    torch.manual_seed(SEED)
    found = matcher(candidate, labels).input_gradient
    return found, "exact" if matcher.step is None else "difference"


def double_backward(
    target: Target, inputs: torch.Tensor, labels: torch.Tensor, layout: torch.memory_format
) -> tuple[float, torch.Tensor]:
    """The cosine distance and its gradient in the images by one graph of plain autograd.

    All of it in the precision of the images.
    """
    model = _composed(target.build_model().to(inputs.dtype))
    model.to(memory_format=layout)  # type: ignore[call-overload]
    named = dict(model.named_parameters())
    parameters = [named[name] for name in target.gradient]
    inputs = _laid_out(inputs, layout).requires_grad_()
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(main_output(model(inputs)), labels)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    goals = [g.to(inputs.dtype) for g in target.gradient.values()]
    pairs = list(zip(gradient, goals, strict=True))
    # By parameter: large networks' gradients fit into memory once, not three times.
    dot = sum(torch.sum(g * t) for g, t in pairs)
    lengths = [
        sum(each.square().sum() for each in both).sqrt() for both in zip(*pairs, strict=True)
    ]
    distance = 1 - dot / (lengths[0] * lengths[1])
    return float(distance.detach()), torch.autograd.grad(distance, inputs)[0]


class _Hard(nn.Module):
    """Hardswish or hardsigmoid from parts, since torch's own kernels have one derivative."""

    def __init__(self, swish: bool) -> None:
        super().__init__()
        self.swish = swish

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        gate = (x + 3).clamp(0, 6) / 6
        return x * gate if self.swish else gate


def _composed(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        hard = isinstance(child, nn.Hardswish | nn.Hardsigmoid)
        setattr(model, name, _Hard(isinstance(child, nn.Hardswish)) if hard else _composed(child))
    return model


def _laid_out(inputs: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    return inputs.clone().contiguous(memory_format=layout)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    # Not torch's cosine similarity, which takes lengths below 1e-8 for 1e-8.
    a, b = (t.double().flatten() / t.double().abs().max() for t in (a, b))
    return float(a @ b / (a.norm() * b.norm()))
