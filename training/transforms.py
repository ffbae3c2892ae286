"""What a client does to its update before the server sees it, as training needs to know it.

Training is the room before `gradients`, where the defenses live: it states the interface here,
and finds what fulfils it by name (`DEFENSES`), as a command finds a plugin. A defense that a
plugin registers is found the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import nn

from core.data.specs import DataSpec
from core.local_training import LocalTraining
from core.losses import DEFAULT_LOSS, Loss
from core.named_objects import named_object

Update = dict[str, torch.Tensor]
# What makes a transformation of words such as `clip:1,gaussian:0.01`.
DEFENSES = "gradients.defenses:as_transform"


@dataclass(frozen=True)
class ClientView:
    """What a client knows when it defends its update.

    Attributes:
        model: theta_0, in the mode the client used.
        images: N x C x H x W, normalised.
        labels: N class indices.
        generator: Source of the defense's random numbers, on the CPU, so that a
            seed gives the same noise on every device.
        loss: What the client minimises.
        local: Its local training; the update is (theta_0 - theta_K) / (lr K).
        data: Normalisation of the images; None where nobody says.
    """

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    generator: torch.Generator
    loss: Loss = DEFAULT_LOSS
    local: LocalTraining = field(default_factory=LocalTraining)
    data: DataSpec | None = None


class Transform(Protocol):
    """A transformation of a client's update.

    Attributes:
        word: Name and parameters, for records; empty where nothing is changed.
    """

    @property
    def word(self) -> str:
        """See above."""

    def prepare(self, model: nn.Module) -> None:
        """Change the model before local training (freezing does)."""

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels to train on instead of the client's own; labels may be
        probabilities.
        """

    def apply(self, gradient: Update, client: ClientView) -> Update:
        """The update to share instead of `gradient`, by parameter name."""

    def epsilon(self, rounds: int, delta: float) -> float | None:
        """The privacy budget that so many uses spend at delta; None: nothing is promised."""


def transform_of(words: str) -> Transform:
    """The transformation of words such as `clip:1,gaussian:0.01`.

    Raises:
        InputError: An unknown name, or a parameter that it cannot use.
    """
    make = named_object(DEFENSES, "--defense")
    assert callable(make)
    return cast(Transform, make(words))
