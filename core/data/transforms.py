"""What is done to an image before a network sees it: resize, crop, mirror, normalise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from core.data.specs import DataSpec

# Below this side images are small: they are shifted by a few pixels for training,
# where larger ones are cropped at random scales.
SMALL_SIDE = 96

Transform = Callable[[Any], torch.Tensor]


def evaluation_transform(spec: DataSpec, native_side: int) -> Transform:
    """The fixed transform of validation and of stage 2: resize, crop the centre, normalise.

    Args:
        spec: Size and normalisation.
        native_side: Short side of the images as they are; large ones lose a border.
    """
    from torchvision.transforms import v2

    size = spec.shape[1]
    short_side = size if native_side < SMALL_SIDE else round(size * 256 / 224)
    steps = [*_resize_small(size, native_side, short_side), v2.CenterCrop(size)]
    return v2.Compose([v2.ToImage(), *steps, *_to_input(spec)])


def training_transform(spec: DataSpec, native_side: int, *, flip: bool) -> Transform:
    """The random transform of training.

    Args:
        spec: Size and normalisation.
        native_side: Short side of the images as they are; small ones are padded and
            cropped, large ones cropped at random scales.
        flip: Whether mirroring keeps the label.
    """
    from torchvision.transforms import v2

    size = spec.shape[1]
    if native_side < SMALL_SIDE:
        steps = [
            *_resize_small(size, native_side, size),
            v2.CenterCrop(size),
            v2.RandomCrop(size, padding=size // 8),
        ]
    else:
        steps = [v2.RandomResizedCrop(size, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([v2.ToImage(), *steps, *_to_input(spec)])


def _resize_small(size: int, native_side: int, short_side: int) -> list[Any]:
    from torchvision.transforms import v2

    return [] if native_side == short_side == size else [v2.Resize(short_side, antialias=True)]


def _to_input(spec: DataSpec) -> list[Any]:
    from torchvision.transforms import v2

    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(spec.mean, spec.std),
        v2.ToPureTensor(),
    ]
