"""DCS-2: share the gradient of sensitive images together with that of images that conceal them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.errors import InputError
from core.losses import Targets, main_output
from core.models.unchanged import modes_held
from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    normal_like,
    register_defense,
    require,
)
from gradients.defenses.mixup import class_probabilities

# Shares of the iterations at which the learning rate falls tenfold.
FALLS = (3 / 8, 5 / 8, 7 / 8)
RATE, FALL = 0.1, 0.1
# Weight of the distance between images, under an exponential, and of that between outputs.
IMAGE_WEIGHT, OUTPUT_WEIGHT = 0.01, 0.01


@register_defense("dcs2")
@dataclass(frozen=True)
class DCS2(Defense):
    """Add the gradient of images that look different and have the same gradient.

    One concealing image c for each image x begins at share s + (1 - share) x, with another
    image s, and descends 1 - cos(g(c), g(x)) + exp(-0.01 |c - x|) + 0.01 |f(c) - f(x)| / |f(x)|
    for gradients g of the batch and outputs f (Adam, 0.1, in evaluation mode). Its label is
    `share` times that of s and the rest that of x. Shared is the mean of both gradients; where
    it points away from g(x), it is moved until it does not.

    Not followed: what s is (there the mean image of another class, here noise, with a random
    class); sensitive images alone (here all are); the weight of a third in place of a half for
    shares between 0 and 1; and the margin of 0.5 of the projection.

    Args:
        iterations: Of the descent.
        share: Of the other image at the start, and in the label.

    Source: Wu, Hayat, Zhou, Harandi, "Concealing Sensitive Samples against Gradient Leakage in
        Federated Learning", AAAI 2024, https://arxiv.org/abs/2209.05724; values as in
        https://github.com/JingWu321/DCS-2.

    Published: the strongest protection among the compared defenses at the same accuracy.
    """

    iterations: int = 1000
    share: float = 0.7

    def __post_init__(self) -> None:
        require(self.iterations >= 0, "the number of iterations must not be negative")
        require(0 <= self.share <= 1, "the share must lie in [0, 1]")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """The mean with the concealing images' gradient.

        Raises:
            InputError: The client does not classify inputs that are numbers, or trains several
                steps.
        """
        if client.loss.targets is not Targets.CLASSES or not client.images.is_floating_point():
            raise InputError(f"--defense {self.word}: is for classifiers of inputs in numbers")
        if client.local.steps > 1:
            raise InputError(f"--defense {self.word}: conceals the gradient of one local step")
        images, labels = self.concealing(gradient, client)
        names = list(gradient)
        with modes_held(client.model):
            hidden = _gradient(client, names, images, labels, False)
        mixed = {name: (g + h) / 2 for (name, g), h in zip(gradient.items(), hidden, strict=True)}
        return _turned(mixed, gradient)

    def concealing(
        self, gradient: Gradient, client: ClientView
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The concealing images and their labels, as probabilities."""
        own = class_probabilities(client)
        n, classes = own.shape
        drawn = torch.randint(classes, (n,), generator=client.generator)
        labels = self.share * F.one_hot(drawn, classes).to(own) + (1 - self.share) * own
        start = normal_like(client.images, client.generator)
        images = self.share * start + (1 - self.share) * client.images
        images = images.detach().requires_grad_()
        adam = torch.optim.Adam([images], lr=RATE)
        milestones = [int(share * self.iterations) for share in FALLS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, milestones, FALL)
        with modes_held(client.model), torch.enable_grad():
            client.model.eval()
            outputs = _outputs(client, client.images).detach()
            for _ in range(self.iterations):
                adam.zero_grad()
                loss = _loss(gradient, client, (images, labels), outputs)
                (images.grad,) = torch.autograd.grad(loss, [images])
                adam.step()
                schedule.step()
        return images.detach(), labels


def _loss(
    gradient: Gradient,
    client: ClientView,
    batch: tuple[torch.Tensor, torch.Tensor],
    outputs: torch.Tensor,
) -> torch.Tensor:
    images, labels = batch
    found = _gradient(client, list(gradient), images, labels, True)
    given, own = (torch.cat([g.flatten() for g in one]) for one in (found, gradient.values()))
    aligned = F.cosine_similarity(given, own, dim=0)
    apart = (images - client.images).flatten(1).norm(dim=1).mean()
    moved = (_outputs(client, images) - outputs).norm(dim=1) / outputs.norm(dim=1)
    return 1 - aligned + torch.exp(-IMAGE_WEIGHT * apart) + OUTPUT_WEIGHT * moved.mean()


def _outputs(client: ClientView, images: torch.Tensor) -> torch.Tensor:
    return main_output(client.model(images))


def _gradient(
    client: ClientView, names: list[str], images: torch.Tensor, labels: torch.Tensor, graph: bool
) -> list[torch.Tensor]:
    """Of the loss in evaluation mode, in the named parameters."""
    model = client.model.eval()
    held, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.enable_grad():
        wanted = {name: held[name].detach().requires_grad_() for name in names}
        outputs = torch.func.functional_call(model, {**buffers, **wanted}, (images,))
        value = client.loss(outputs, labels)
        found = torch.autograd.grad(
            value, list(wanted.values()), create_graph=graph, materialize_grads=True
        )
    return list(found)


def _turned(mixed: Gradient, own: Gradient) -> Gradient:
    """The nearest gradient that does not point away from one's own."""
    dot = sum(float((mixed[n].double() * own[n].double()).sum()) for n in own)
    square = sum(float(own[n].double().square().sum()) for n in own)
    if dot >= 0 or square == 0:
        return mixed
    return {name: value - dot / square * own[name] for name, value in mixed.items()}
