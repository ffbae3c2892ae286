"""InstaHide: train on mixtures of images whose pixels have random signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.errors import InputError
from core.losses import Targets
from gradients.defenses.base import ClientView, InputDefense, register_defense, require
from gradients.defenses.mixup import class_probabilities, mixed

# The largest share of an image in a mixture, as published.
LARGEST_SHARE = 0.65


@register_defense("instahide")
@dataclass(frozen=True)
class InstaHide(InputDefense):
    """Mix every image with others of the batch, then flip the sign of every pixel at random.

    Image i becomes m_i o sum_j s_ij x_j with a mask m_i of independent signs, drawn anew for
    every batch, and random shares of `mixed` images that sum to one, of which none exceeds
    0.65; its label is the same mixture. Pixels are the network's inputs, which are centred.
    A batch of fewer images mixes all that it has; of one image only signs are hidden.

    Not followed: images of a public set among those that are mixed, for a client's data alone
    are at hand here.

    Args:
        mixed: Images in a mixture.

    Source: Huang, Song, Li, Arora, "InstaHide: Instance-hiding Schemes for Private Distributed
        Learning", ICML 2020, https://arxiv.org/abs/2010.02772.

    Published: as hard to invert as a vector subset sum; Carlini et al., "Is Private Learning
        Possible with Instance Encoding?", S&P 2021, https://arxiv.org/abs/2011.05315, recover
        recognisable images of its challenge from the encodings.
    """

    mixed: int = 4

    def __post_init__(self) -> None:
        require(self.mixed >= 1, "at least one image must be in a mixture")

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels, encoded.

        Raises:
            InputError: The loss does not compare with classes, or inputs are no numbers.
        """
        if client.loss.targets is not Targets.CLASSES or not client.images.is_floating_point():
            raise InputError(f"--defense {self.word}: is for classifiers of inputs in numbers")
        weights = self.weights(len(client.images), client.generator).to(client.images)
        signs = torch.randint(0, 2, client.images.shape, generator=client.generator) * 2 - 1
        images = signs.to(client.images) * mixed(client.images, weights)
        return images, mixed(class_probabilities(client), weights)

    def weights(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """The shares of n images in each other's mixtures: n x n, rows sum to one (float64)."""
        k = min(self.mixed, n)
        rows = torch.zeros(n, n, dtype=torch.float64)
        for row, i in zip(rows, range(n), strict=True):
            others = torch.randperm(n, generator=generator)
            chosen = torch.cat([torch.tensor([i]), others[others != i]])[:k]
            row[chosen] = _shares(k, generator)
        return rows


def _shares(k: int, generator: torch.Generator) -> torch.Tensor:
    """k random shares of which none is too large."""
    if k == 1:
        return torch.ones(1, dtype=torch.float64)
    while True:
        drawn = torch.empty(k, dtype=torch.float64).uniform_(generator=generator)
        shares = drawn / drawn.sum()
        if float(shares.max()) <= LARGEST_SHARE:
            return shares
