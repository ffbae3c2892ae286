"""A model that is trained so that gradients of whole batches give their images away (EGGV)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError
from core.losses import CrossEntropy, main_output
from core.models.unchanged import in_mode, random_numbers_held
from gradients.servers.base import MaliciousServer, Means, register_server

# Numbers that a gradient is projected to, and images of a batch at most.
PROJECTED, BATCH = 1024, 4
# Learning rate; length of the step by which an image is moved, normalised; weight of the clients'
# own loss, which keeps the model in training.
RATE, STEP, LOSS_WEIGHT = 5e-4, 0.05, 0.1


@register_server
class Eggv(MaliciousServer):
    """Train the model until its gradients move with every image: `--malicious eggv:STEPS`.

    The gradient of a batch of public images is scaled to length one and projected at random. How
    far the projection moves, when one image of the batch moves by a small random step, says how
    well gradients tell two such batches apart, and so how much noise hides the difference. STEPS of
    Adam raise the mean logarithm of it over all images of a batch, so that none is preferred to
    another, and keep the loss low. Nothing is set by hand: no weight is zero, no neuron repeats.

    Only the abstract of the paper could be read: a gradient projector and a jointly optimised
    discriminator assess how vulnerable gradients are, and the model is steered to where they are
    most so. What the discriminator is asked is not in it; the distance stands in its place here,
    and all settings are ours. A discriminator that was asked for the images themselves was tried:
    it says more of a poisoned model's batches, but attacks get no more from them.

    Read by `--attack eggv`.

    Source: Xiang, Yang, Hao, Li, Wang, Ding, Jiang, Zhang, "The Gradient Puppeteer: Adversarial
        Domination in Gradient Leakage Attacks through Model Poisoning", 2025,
        https://arxiv.org/abs/2502.04106.
    """

    name = "eggv"

    def send(self, model: nn.Module, means: Means) -> nn.Module:
        """See `MaliciousServer.send`; the same numbers are drawn every time.

        Raises:
            InputError: The server knows no classes of its public images, or has too few.
        """
        labels, size = means.labels, min(BATCH, max(2, means.batch_size))
        if labels is None or len(means.inputs) < size:
            raise InputError("--malicious eggv: needs public images whose classes are known")
        poisoned = in_mode(copy.deepcopy(model), False)
        inputs = means.inputs.to(next(poisoned.parameters()))
        with random_numbers_held(inputs.device), torch.enable_grad():
            torch.manual_seed(0)
            projector = Projector.of(poisoned)
            optimiser = torch.optim.Adam(projector.trained(poisoned), lr=RATE)
            for _ in range(means.malice.number):
                chosen = torch.randperm(len(inputs))[:size]
                batch = inputs[chosen], labels[chosen].to(inputs.device)
                moved, loss = projector.movements(poisoned, *batch)
                optimiser.zero_grad()
                (LOSS_WEIGHT * loss - moved.clamp_min(1e-12).log().mean()).backward()
                optimiser.step()
        poisoned.zero_grad(set_to_none=True)
        return poisoned.train(model.training)


@dataclass(frozen=True)
class Projector:
    """A sparse random projection of a model's gradients.

    Attributes:
        places: By parameter, the number that each of its elements is added to.
        signs: With which sign.
    """

    places: tuple[torch.Tensor, ...]
    signs: tuple[torch.Tensor, ...]

    @staticmethod
    def trained(model: nn.Module) -> list[nn.Parameter]:
        """The parameters whose gradients are shared."""
        return [p for p in model.parameters() if p.requires_grad]

    @staticmethod
    def of(model: nn.Module) -> Projector:
        """One for a model's gradients, from torch's random numbers."""
        like = Projector.trained(model)
        return Projector(
            tuple(torch.randint(PROJECTED, (p.numel(),)).to(p.device) for p in like),
            tuple((2 * torch.randint(2, (p.numel(),)) - 1).to(p) for p in like),
        )

    def movements(
        self, model: nn.Module, images: torch.Tensor, classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the projection moves with each image, per length of the image's step.

        Args:
            model: Its parameters are what the result can be differentiated in.
            images: N x C x H x W, normalised.
            classes: N.

        Returns:
            N distances, and the batch's loss.
        """
        here, loss = self._projected(model, images, classes)
        distances = []
        for number in range(len(images)):
            step = torch.randn(images[number].shape).to(images)
            moved = images.clone()
            moved[number] += STEP * step / step.norm()
            there, _ = self._projected(model, moved, classes)
            distances.append((there - here).square().sum().clamp_min(1e-24).sqrt() / STEP)
        return torch.stack(distances), loss

    def _projected(
        self, model: nn.Module, images: torch.Tensor, classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = CrossEntropy()(main_output(model(images)), classes)
        gradients = torch.autograd.grad(loss, self.trained(model), create_graph=True)
        length = torch.stack([g.square().sum() for g in gradients]).sum().clamp_min(1e-24).sqrt()
        sums = images.new_zeros(PROJECTED)
        for g, places, signs in zip(gradients, self.places, self.signs, strict=True):
            sums = sums.index_add(0, places, g.flatten() * signs)
        return sums / length, loss
