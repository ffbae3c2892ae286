"""MixUp: train on convex combinations of the batch's images and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from core.errors import InputError
from core.losses import Targets, main_output
from core.models.unchanged import modes_held
from gradients.defenses.base import ClientView, InputDefense, register_defense, require


@register_defense("mixup")
@dataclass(frozen=True)
class MixUp(InputDefense):
    """Mix every image with another one of the batch, and their labels alike.

    With one share s from Beta(alpha, alpha) and one random permutation p of the batch, image i
    becomes s x_i + (1 - s) x_p(i), and its label the same mixture. The permutation may leave
    images alone: of two images in half of the batches.

    Args:
        alpha: Of the Beta distribution; 1: all shares are equally likely.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
        https://arxiv.org/abs/1710.09412; as a defense: Huang et al., "Evaluating Gradient
        Inversion Attacks and Defenses in Federated Learning", NeurIPS 2021,
        https://arxiv.org/abs/2112.00059.

    Published: as a defense it alone hides little in the second paper, which mixes four images.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha must be positive")

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels, mixed.

        Raises:
            InputError: The loss does not compare with classes.
        """
        if client.loss.targets is not Targets.CLASSES:
            raise InputError(f"--defense {self.word}: mixes classes; the loss is another one")
        n = len(client.images)
        seed = int(torch.randint(2**31, (1,), generator=client.generator))
        share = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
        order = torch.randperm(n, generator=client.generator)
        weights = mixing(share, order.tolist()).to(client.images)
        labels = class_probabilities(client)
        return mixed(client.images, weights), mixed(labels, weights)


def mixing(share: float, order: list[int]) -> torch.Tensor:
    """The n x n matrix whose rows are the shares of the images in each mixture (float64).

    Args:
        share: Of an image in its own mixture.
        order: The other image of each mixture.
    """
    one = torch.eye(len(order), dtype=torch.float64)
    return share * one + (1 - share) * one[order]


def mixed(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Combine the rows of a batch.

    Args:
        values: N x ...
        weights: N x N, see `mixing`.
    """
    return torch.tensordot(weights.to(values), values, dims=1)


def class_probabilities(client: ClientView) -> torch.Tensor:
    """Labels as N x classes, in the precision of the images."""
    if client.labels.is_floating_point():
        return client.labels
    buffers = {name: buffer.clone() for name, buffer in client.model.named_buffers()}
    with torch.no_grad(), modes_held(client.model):
        model = client.model.eval()
        outputs = torch.func.functional_call(model, buffers, (client.images[:1],))
    one = torch.eye(main_output(outputs).shape[1]).to(client.images)
    return one[client.labels]
