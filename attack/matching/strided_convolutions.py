"""Strided convolutions of few channels, computed as denser ones.

The first layer of an image classifier reads three channels through a large kernel in strides:
7 x 7 in steps of 2 (ResNet), 11 x 11 of 4 (AlexNet), 16 x 16 of 16 (ViT). Its derivative in the
images has three channels, where a CPU's kernels compute sixteen at a time. Folding each
stride x stride block of pixels into channels gives the same numbers by a convolution in steps of
1, of stride^2 times as many channels and a kernel that many times smaller.

Source: the rearrangement is that of Shi et al., Real-Time Single Image and Video
Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network, CVPR 2016,
https://arxiv.org/abs/1609.05158.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attack.matching.fixed_convolutions import as_pair

FEW_CHANNELS = 4
# Smaller ones lose more by the padding of the kernel than they gain.
LARGE_KERNEL = 5


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d`, on a CPU by folding where that is faster.

    Differentiable as often as that is.
    """
    if isinstance(padding, str) or as_pair(dilation) != (1, 1) or not _gains(x, weight, stride):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    step, (top, left) = as_pair(stride)[0], as_pair(padding)
    size = -(-weight.shape[-1] // step) * step
    bottom = _missing(x.shape[-2], top, weight.shape[-2], step, size)
    right = _missing(x.shape[-1], left, weight.shape[-1], step, size)
    pixels = F.pixel_unshuffle(F.pad(x, (left, right, top, bottom)), step)
    wider = F.pad(weight, (0, size - weight.shape[-1], 0, size - weight.shape[-2]))
    return F.conv2d(pixels, F.pixel_unshuffle(wider, step), bias)


def _gains(x: torch.Tensor, weight: torch.Tensor, stride: Any) -> bool:
    rows, columns = weight.shape[-2:]
    down, across = as_pair(stride)
    few = x.dim() == 4 and x.shape[1] == weight.shape[1] <= FEW_CHANNELS
    strided = 1 < down == across
    return few and strided and x.device.type == "cpu" and rows == columns >= LARGE_KERNEL


def _missing(length: int, before: int, kernel: int, step: int, size: int) -> int:
    """Padding behind, so that a kernel of `size` stands where the smaller one stood.

    Negative where pixels behind are read by no kernel.
    """
    last = (length + 2 * before - kernel) // step
    return step * last + size - length - before
