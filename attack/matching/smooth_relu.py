"""Graduated optimisation through networks with ReLU.

The gradient of such a network jumps wherever a pixel flips a unit, and its derivative in
the images does not see the jumps: an image one grey value off the true one has a cosine
distance of 0.1. Softened units turn the steps into slopes; the softening is taken back in
the course of the attack, so that the end of it compares the network as it is.

Source: Blake and Zisserman, Visual Reconstruction, 1987, chapter 3 (graduated
non-convexity).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}


class SmoothReLU(TorchFunctionMode):
    """Within this context every ReLU is w log(1 + exp(x / w)).

    Args:
        width: w, in units of the activations; 0 leaves ReLUs as they are.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.width > 0 and func in _RELUS:
            return F.softplus(args[0], beta=1 / self.width)
        return func(*args, **(kwargs or {}))


def width_at(progress: float, start: float, end: float) -> float:
    """The width in the course of an attack: geometric from `start` to `end`.

    Args:
        progress: 0 to 1.
        start: The first width; 0 for none at all.
        end: The last width.
    """
    return 0.0 if start == 0 else start * (end / start) ** progress
