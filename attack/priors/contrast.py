"""Priors that leave the contrast of images alone where their gradient hardly shows it.

BatchNorm that takes the statistics of a single image divides by its contrast: behind the first such
layer an image of half the contrast looks the same, but for what padding adds at the borders. A
prior that is smaller for faint images (every total variation) then fades them without end, and
nothing of the gradient holds against it. With several images in the batch only what they have in
common is divided out, and their contrast to each other shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from core.models.kinds import BatchNorm

# Against the division by the contrast of images that have none.
SMALLEST = 1e-12


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
