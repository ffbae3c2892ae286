"""Models that a malicious server sends instead of honest ones.

`ModelSpec.malicious` says what was done, so that every program that loads a checkpoint
builds the same model; `gradients.malicious_server` sets its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from training.errors import InputError

if TYPE_CHECKING:
    from training.models import ModelSpec

KINDS = {"imprint": "number of bins", "fishing": "class"}
MAX_BINS = 65536


@dataclass(frozen=True)
class Malice:
    """What a server does to the model it sends.

    Attributes:
        kind: "imprint" (a block in front, Robbing the Fed) or "fishing" (the last layer).
        number: Bins of the imprint block, or the class to fish for.
    """

    kind: str
    number: int


def parse_malice(text: str, n_classes: int, flag: str = "--malicious") -> Malice:
    """Read `imprint:BINS` or `fishing:CLASS`.

    Args:
        text: The flag's value.
        n_classes: Of the model.
        flag: For messages.

    Raises:
        InputError: Unknown kind, or a number out of range.
    """
    kind, _, number = text.partition(":")
    if kind not in KINDS or not number.isdecimal():
        forms = " or ".join(f"{k}:N (N: {what})" for k, what in KINDS.items())
        raise InputError(f"{flag} {text}: expected {forms}")
    malice = Malice(kind, int(number))
    low, high = (2, MAX_BINS) if kind == "imprint" else (0, n_classes - 1)
    if not low <= malice.number <= high:
        raise InputError(f"{flag} {text}: the {KINDS[kind]} must lie in {low}..{high}")
    return malice


class Imprinted(nn.Module):
    """A classifier behind an imprint block: flatten, linear, ReLU, linear, image again.

    Args:
        model: Takes N x 3 x image_size x image_size.
        image_size: Side of the images.
        bins: Width of the block.

    Source: Fowl et al., "Robbing the Fed", ICLR 2022, section 3,
        https://arxiv.org/abs/2110.13057.
    """

    def __init__(self, model: nn.Module, image_size: int, bins: int) -> None:
        super().__init__()
        n = 3 * image_size**2
        self.imprint = nn.Sequential(
            nn.Flatten(),
            nn.Linear(n, bins),
            nn.ReLU(),
            nn.Linear(bins, n),
            nn.Unflatten(1, (3, image_size, image_size)),
        )
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """N x 3 x H x W to logits."""
        return self.model(self.imprint(images))


def add_malicious_layers(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The model with the layers that `spec.malicious` puts into it."""
    malice = parse_malice(spec.malicious, spec.n_classes)
    if malice.kind == "imprint":
        return Imprinted(model, spec.image_size, malice.number)
    return model
