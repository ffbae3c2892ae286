"""What a search among the random choices of a defense gives and takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from core.settings import Value
from core.target import Target

if TYPE_CHECKING:
    from attack.reconstruction import Reconstruction

# Of the attack's iterations, in a short one that only has to choose.
SHORT = 0.3


class Attempt(Protocol):
    """Runs an attack on a candidate."""

    def __call__(self, target: Target, share: float, **changes: Value) -> Reconstruction:
        """Attack.

        Args:
            target: The candidate.
            share: Of the attack's iterations; may exceed 1.
            changes: Settings of the attack to change, by name.
        """


@dataclass(frozen=True)
class Likely:
    """What the search found.

    Attributes:
        target: What was shared, by a model that does to its inputs what the client did.
        start: Private images to start from (N x C x H x W in [0, 1]); None: nothing is known.
        labels: Of the target's images, where they are others than those that are asked for.
        kept: So many of the target's first images are asked for; None: all.
    """

    target: Target
    start: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    kept: int | None = None
