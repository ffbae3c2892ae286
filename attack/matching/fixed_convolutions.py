"""Convolutions with weights that stay the same for many calls.

On a CPU, oneDNN computes in a blocked layout of its own. Given plain weights it reorders them
in every call, which for a late layer (512 x 512 x 3 x 3 on 4 x 4 pixels) costs twice the
arithmetic, and PyTorch passes single small images to another, slower kernel. Weights that do
not change are reordered once here.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

Pair = tuple[int, int]


class FixedConv2d:
    """A convolution without bias whose weight does not change.

    Differentiable in its input, once.

    Args:
        weight: M x C x k x k.
        stride: As of `torch.nn.functional.conv2d`, with one group.
        padding: Padding, as in `torch.nn.functional.conv2d`.
        dilation: Dilation, as in `torch.nn.functional.conv2d`.
    """

    def __init__(self, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any) -> None:
        self.weight = weight
        self.stride, self.padding = as_pair(stride), as_pair(padding)
        self.dilation = as_pair(dilation)
        self._packed: dict[tuple[torch.Size, bool], torch.Tensor | None] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of N x C x H x W."""
        # The reordered weight is in float32. Cast to fewer bits in every call it gains nothing, and
        # oneDNN refuses it on processors without instructions for them.
        if torch.is_autocast_enabled("cpu") or self._pack(x.shape, False) is None:
            return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation)
        return _Packed.apply(x, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same by the reordered weight, without autograd."""
        packed = self._pack(x.shape, False)
        return _convolve(x, packed, self.padding, self.stride, self.dilation)

    def backward(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The derivative in the input, given that in the output.

        With stride 1 it is a convolution with the weight mirrored, which is reordered too.
        """
        packed = self._pack(gradient.shape, True) if self.stride == (1, 1) else None
        if packed is None:
            return torch.ops.aten.convolution_backward(
                gradient, x, self.weight, None, self.stride, self.padding, self.dilation,
                False, (0, 0), 1, (True, False, False),
            )[0]  # fmt: skip
        return _convolve(gradient, packed, self._mirrored_padding(), (1, 1), self.dilation)

    def _mirrored_padding(self) -> Pair:
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        return reach[0] - self.padding[0], reach[1] - self.padding[1]

    def _pack(self, shape: torch.Size, mirrored: bool) -> torch.Tensor | None:
        """The reordered weight for inputs of this shape; None where there is none."""
        key = (shape, mirrored)
        if key not in self._packed:
            self._packed[key] = self._make(shape, mirrored)
        return self._packed[key]

    def _make(self, shape: torch.Size, mirrored: bool) -> torch.Tensor | None:
        padding = self._mirrored_padding() if mirrored else self.padding
        fits = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        if not fits or not torch.backends.mkldnn.is_available() or min(padding) < 0:
            return None
        weight = self.weight.flip(2, 3).transpose(0, 1) if mirrored else self.weight
        stride = (1, 1) if mirrored else self.stride
        try:
            packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(), padding, stride, self.dilation, 1, list(shape)
            )
        except (AttributeError, RuntimeError) as error:
            # Not a public operator: without it, plain convolutions do.
            logger.debug("weights are not reordered: %s", error)
            return None
        return packed


def _convolve(
    x: torch.Tensor, packed: torch.Tensor | None, padding: Pair, stride: Pair, dilation: Pair
) -> torch.Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, None, padding, stride, dilation, 1, "none", [], ""
    )


class _Packed(torch.autograd.Function):
    """Puts `FixedConv2d` into the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, conv: FixedConv2d) -> torch.Tensor:
        ctx.conv = conv
        ctx.save_for_backward(x)
        return conv.forward(_dense(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.conv.backward(_dense(gradients[0]), x), None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """In one of the two layouts that need no reordering within a pixel or a plane."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def as_pair(value: Any) -> Pair:
    """A setting of both directions, given for each or for both."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
