"""What a search among the random choices of a defense gives and takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from core.target import Target

if TYPE_CHECKING:
    from attack.reconstruction import Reconstruction

# Runs an attack on a candidate for a share of the iterations.
Attempt = Callable[[Target, float], "Reconstruction"]


@dataclass(frozen=True)
class Likely:
    """What the search found.

    Attributes:
        target: What was shared, by a model that does to its inputs what the client did.
        start: Private images to start from (N x C x H x W in [0, 1]); None: nothing is known.
    """

    target: Target
    start: torch.Tensor | None = None
