"""GradDefense: noise on some slices of the gradient that are equally sensitive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss, Targets, main_output
from core.models.unchanged import modes_held
from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    normal_like,
    register_defense,
    require,
)

# Seed and size of the noise images in whose place the paper has a set of public images.
ROOT_SEED, ROOT_IMAGES = 0, 8


@register_defense("graddefense")
@dataclass(frozen=True)
class GradDefense(Defense):
    """Add N(0, scale^2) to some slices of the flattened gradient, drawn at random.

    A tensor's sensitivity is |d(sum of its gradient) / dx|, the mean over a root set of public
    images, in evaluation mode. The gradient of all tensors, one after the other, is cut into
    `slices` pieces of the same summed sensitivity, to which every element of a tensor
    contributes the same. Which pieces are perturbed is the client's secret.

    Not followed: the root set, for which both sides here draw the same noise images; and the
    server's compensation, a filter of eigenvalues by the law of Marchenko and Pastur, which is
    something the attacker may do. Clipping per sample is optional in the published code.

    Args:
        slices: Number of slices.
        perturbed: How many of them get noise.
        scale: Standard deviation of the noise.

    Source: Wang et al., "Protect Privacy from Gradient Leakage Attack in Federated Learning",
        INFOCOM 2022, https://doi.org/10.1109/INFOCOM48880.2022.9796841; 5 of 10 slices at 0.1
        as in `dlg_defense.py` of https://github.com/wangjunxiao/GradDefense.

    Published: in the code's example DLG on a LeNet finds no image of CIFAR-10.
    """

    slices: int = 10
    perturbed: int = 5
    scale: float = 0.1

    def __post_init__(self) -> None:
        require(self.slices >= 1, "there must be at least one slice")
        require(0 <= self.perturbed <= self.slices, "no more slices than there are get noise")
        require(self.scale >= 0, "the scale must not be negative")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Perturb some slices.

        Raises:
            InputError: The client's model is no classifier of images or numbers.
        """
        if client.loss.targets is not Targets.CLASSES or not client.images.is_floating_point():
            raise InputError(
                f"--defense {self.word}: is for classifiers of inputs that are numbers"
            )
        shape = tuple(client.images.shape[1:])
        cuts = slice_bounds(client.model, shape, list(gradient), self.slices, client.loss)
        order = torch.randperm(self.slices, generator=client.generator)
        flat = torch.cat([g.flatten() for g in gradient.values()])
        for index in sorted(order[: self.perturbed].tolist()):
            part = flat[cuts[index] : cuts[index + 1]]
            part += self.scale * normal_like(part, client.generator)
        parts = flat.split([g.numel() for g in gradient.values()])
        return {n: p.view_as(g) for (n, g), p in zip(gradient.items(), parts, strict=True)}


def slice_bounds(
    model: nn.Module,
    shape: Sequence[int],
    names: Sequence[str],
    slices: int,
    loss: Loss = DEFAULT_LOSS,
) -> list[int]:
    """Where slices of equal sensitivity begin and end in the flattened gradient.

    Client and attacker compute the same, from what both know.

    Args:
        model: theta_0.
        shape: Of one input.
        names: Parameters whose gradients are shared, in their order.
        slices: Number of slices.
        loss: What the client minimises.

    Returns:
        slices + 1 positions, from 0 to the number of elements.
    """
    held = dict(model.named_parameters())
    sizes = torch.tensor([held[name].numel() for name in names], dtype=torch.float64)
    ends = torch.cat([torch.zeros(1).double(), tensor_sensitivity(model, shape, names, loss)])
    ends = ends.cumsum(0)
    places = torch.cat([torch.zeros(1).double(), sizes]).cumsum(0)
    total = float(ends[-1])
    bounds = [0]
    for index in range(1, slices):
        wanted = total * index / slices
        at = int((ends[1:] >= wanted).nonzero()[0])
        share = (wanted - float(ends[at])) / max(float(ends[at + 1] - ends[at]), 1e-300)
        bounds.append(max(bounds[-1], round(float(places[at]) + share * float(sizes[at]))))
    return [*bounds, int(places[-1])]


def tensor_sensitivity(
    model: nn.Module, shape: Sequence[int], names: Sequence[str], loss: Loss = DEFAULT_LOSS
) -> torch.Tensor:
    """|d(sum of a tensor's gradient) / dx|, the mean over the root set, per tensor (float64)."""
    held = dict(model.named_parameters())
    first = held[names[0]]
    numbers = torch.Generator().manual_seed(ROOT_SEED)
    images = torch.randn((ROOT_IMAGES, *shape), generator=numbers).to(first)
    images.requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with modes_held(model), torch.enable_grad():
        wanted = {n: held[n].detach().requires_grad_() for n in names}
        state = {**buffers, **{n: p.detach() for n, p in held.items()}, **wanted}
        outputs = torch.func.functional_call(model.eval(), state, (images,))
        labels = torch.arange(ROOT_IMAGES, device=first.device) % main_output(outputs).shape[-1]
        value = loss(outputs, labels)
        gradient = torch.autograd.grad(value, list(wanted.values()), create_graph=True)
        rows = [_norm_of_rows(g.sum(), images) for g in gradient]
    # One part in a million of the mean, so that no tensor is in no slice.
    found = torch.stack(rows)
    return found + 1e-6 * found.mean().clamp_min(1e-30)


def _norm_of_rows(value: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    if not value.requires_grad:
        return torch.zeros(()).double()
    (found,) = torch.autograd.grad(value, images, retain_graph=True, allow_unused=True)
    if found is None:
        return torch.zeros(()).double()
    return found.flatten(1).norm(dim=1).mean().double().cpu()
