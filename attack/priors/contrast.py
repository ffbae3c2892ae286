"""The contrast of images where their gradient hardly shows it.

BatchNorm that takes the statistics of a single image divides by its scale. Behind a convolution and
such a layer an image and half of it, as the network takes them, are the same, and so are their
gradients: a convolution of half is half, padding with zeros included, and the mean is taken off. A
prior that is smaller for faint images (every total variation) then fades them without end, and
nothing of the gradient holds against it. With several images in the batch only what they have in
common is divided out, and their contrast to each other shows. Layers that normalise every image by
itself, GroupNorm say, hide the scale of all.

Two answers: the prior's step may leave the contrast alone (`without_contrast`), or the image is
scaled in the end to what photographs have (`with_length`), brightness and colours included, which
fade together with the contrast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from core.models.kinds import BatchNorm

if TYPE_CHECKING:
    from core.data.specs import DataSpec

_OF_EACH = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Against the division by the contrast of images that have none.
SMALLEST = 1e-12
# Mean and deviation of photographs' values in [0, 1], about those of ImageNet and CIFAR-10.
PHOTOGRAPHS = (0.45, 0.25)
# An estimate of unknown length is best shorter than the length: the squared error of one that is
# too long grows faster, and part of what is found is wrong.
SHORTER = 0.8


def hidden_contrast(
    model: nn.Module, batch: int, groups: Sequence[int] | None
) -> list[bool] | None:
    """Which images of a batch BatchNorm normalises by themselves; None: none of them.

    Args:
        model: The client's, in the mode it is in.
        batch: Images that are normalised together where there are no groups.
        groups: Images per group with statistics of its own, in their order.
    """
    if not any(isinstance(module, BatchNorm) and module.training for module in model.modules()):
        return None
    sizes = [batch] if groups is None else groups
    alone = [size == 1 for size in sizes for _ in range(size)]
    return alone if any(alone) else None


def normalises_each(model: nn.Module) -> bool:
    """Whether layers normalise every image by itself, in any mode and any batch: GroupNorm, say.

    Behind a convolution without bias they hide the scale as BatchNorm over one image does.
    """
    return any(isinstance(module, _OF_EACH) for module in model.modules())


def without_contrast(gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A gradient less its component along the contrast of every image.

    The contrast's direction is the image less the mean of each of its channels.

    Args:
        gradient: N x C x space, in the images.
        inputs: Those images.
    """
    slope, flat = gradient.flatten(2), inputs.flatten(2)
    contrast = flat - flat.mean(2, keepdim=True)
    square = contrast.square().sum((1, 2), keepdim=True).clamp_min(SMALLEST)
    share = (slope * contrast).sum((1, 2), keepdim=True) / square
    return (slope - share * contrast).view_as(gradient)


def natural_length(data: DataSpec) -> float:
    """Root mean square of a photograph's values as the network takes them, a little shortened.

    Args:
        data: Says how they are normalised.
    """
    mean, deviation = PHOTOGRAPHS
    normal = list(zip(data.mean, data.std, strict=True))
    squares = [((mean - middle) ** 2 + deviation**2) / scale**2 for middle, scale in normal]
    return SHORTER * math.sqrt(sum(squares) / len(squares))


def with_length(inputs: torch.Tensor, length: float, which: Sequence[bool]) -> torch.Tensor:
    """Images of which some are scaled to a length.

    Args:
        inputs: N x C x space, as the network takes them.
        length: Root mean square of each one's values.
        which: Those that are scaled.
    """
    present = inputs.flatten(1).square().mean(1).sqrt().clamp_min(SMALLEST)
    chosen = torch.tensor(which, device=inputs.device)
    factors = torch.where(chosen, length / present, torch.ones_like(present))
    return inputs * factors.view(-1, *[1] * (inputs.dim() - 1))
