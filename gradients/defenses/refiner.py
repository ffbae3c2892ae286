"""Refiner: train on data that look different and have the gradient where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.models.unchanged import unchanged
from gradients.defenses.base import (
    ClientView,
    InputDefense,
    normal_like,
    register_defense,
    require,
    uniform_like,
)

# Length of a step of Adam, in pixels of [0, 1].
RATE = 0.02
# Channels after each layer of the evaluation network.
CHANNELS = (16, 32, 64)
# Its weights are always the same.
EVALUATION_SEED = 0


@register_defense("refiner")
@dataclass(frozen=True)
class Refiner(InputDefense):
    """Train on robust data r, refined from the client's images x, in place of them.

    r begins at (1 - share) x + share u with uniform noise u and descends (Adam, 0.02)

        mean_l sum_p w_p (g_p(r) - g_p(x))^2 / sum_p w_p g_p(x)^2 - weight * gap(r, x)

    for the batch's gradient g of parameters p in tensors l. w_p = |theta_p g_p(x)| is the
    first-order effect of leaving out parameter p: the gradient of key parameters is kept, that
    of others is free. gap is how far apart an evaluation network sees both images, 1 - cosine
    of its centred features, over its layers. Labels stay.

    Read were the abstracts of the paper's versions, which name these parts, and no formulas: no
    public code was found, and the full text was out of reach. So the weights w, the start and
    its noise, the optimiser and all values are this project's; so is the evaluation network:
    here convolutions with fixed random weights, because nothing is downloaded.

    Args:
        weight: Of the gap between images.
        iterations: Of the descent.
        share: Of noise at the start.

    Source: Fan, Chen, Wang, Li, Zhou, "Refiner: Data Refining against Gradient Leakage Attacks
        in Federated Learning", USENIX Security 2025, https://arxiv.org/abs/2212.02042.

    Published: stands above the compared defenses against the attacks of its time on several
        data sets; the abstract states no number.
    """

    weight: float = 0.2
    iterations: int = 20
    share: float = 0.5

    def __post_init__(self) -> None:
        require(self.weight >= 0, "the weight of the gap must not be negative")
        require(self.iterations >= 0, "the number of iterations must not be negative")
        require(0 <= self.share < 1, "the share of noise must lie in [0, 1)")

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """Robust data, and the labels as they are.

        Raises:
            InputError: Inputs are no images, or nobody says how they are normalised.
        """
        spec, private = self.images_of(client, "refines images")
        noise = uniform_like(private, client.generator)
        robust = ((1 - self.share) * private + self.share * noise).requires_grad_()
        adam = torch.optim.Adam([robust], lr=RATE)
        with unchanged(client.model), torch.enable_grad():
            kept = KeyGradient(client)
            for _ in range(self.iterations):
                utility = kept.distance(spec.normalize(robust))
                loss = utility - self.weight * semantic_gap(robust, private)
                (robust.grad,) = torch.autograd.grad(loss, [robust])
                adam.step()
                with torch.no_grad():
                    robust.clamp_(0, 1)
        return spec.normalize(robust.detach()), client.labels


class KeyGradient:
    """The gradient of a client's batch, and which of its elements count.

    Args:
        client: Its model must not change while this is used.
    """

    def __init__(self, client: ClientView) -> None:
        self.client = client
        self.parameters = [p for p in client.model.parameters() if p.requires_grad]
        self.own = [g.detach() for g in self._gradient(client.images, False)]
        self.weights = significance(self.parameters, self.own)
        self.sizes = self._weighted(self.own)

    def distance(self, images: torch.Tensor) -> torch.Tensor:
        """The weighted squared distance from the gradient of other images; of zero it is 1."""
        found = self._gradient(images, True)
        apart = self._weighted([f - g for f, g in zip(found, self.own, strict=True)])
        return (apart[self.sizes > 0] / self.sizes[self.sizes > 0]).mean()

    def _weighted(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weighted square of every tensor."""
        return torch.stack(
            [(w * v.square()).sum() for w, v in zip(self.weights, values, strict=True)]
        )

    def _gradient(self, images: torch.Tensor, graph: bool) -> Sequence[torch.Tensor]:
        loss = self.client.loss(self.client.model(images), self.client.labels)
        return torch.autograd.grad(
            loss, self.parameters, create_graph=graph, materialize_grads=True
        )


def significance(
    parameters: Sequence[torch.Tensor], gradient: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """|theta g|: what the loss loses to first order where a parameter is left out.

    Returns:
        Per tensor, in multiples of its largest; ones where all parameters are zero.
    """
    effects = [(p.detach() * g).abs() for p, g in zip(parameters, gradient, strict=True)]
    return [e / e.max() if bool(e.any()) else torch.ones_like(e) for e in effects]


def semantic_gap(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How far apart the evaluation network sees images, on average: 0 (alike) to 2.

    Args:
        images: N x C x H x W in [0, 1].
        others: As many.
    """
    filters = _filters(images)
    a, b, total = images - 0.5, others - 0.5, images.new_zeros(())
    for weight in filters:
        a, b = (F.relu(F.conv2d(x, weight, stride=2, padding=1)) for x in (a, b))
        total = total + 1 - F.cosine_similarity(_centred(a), _centred(b), dim=1).mean()
    return total / len(filters)


def _centred(features: torch.Tensor) -> torch.Tensor:
    """Without the mean of every channel: N x features."""
    return (features - features.mean((2, 3), keepdim=True)).flatten(1)


def _filters(like: torch.Tensor) -> list[torch.Tensor]:
    """The evaluation network's weights, for images of so many channels."""
    numbers = torch.Generator().manual_seed(EVALUATION_SEED)
    found, before = [], like.shape[1]
    for channels in CHANNELS:
        shape = like.new_empty(channels, before, 3, 3)
        found.append(normal_like(shape, numbers) * (2 / (9 * before)) ** 0.5)
        before = channels
    return found
