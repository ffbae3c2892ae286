"""CENSOR: share a random direction that is orthogonal to the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from core.models.unchanged import modes_held
from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    normal_like,
    register_defense,
    require,
)

ORTHOGONAL, PUBLISHED_CODE = "orthogonal", "code"
PROJECTIONS = (ORTHOGONAL, PUBLISHED_CODE)
# Learning rate of the step after which a trial is judged, in the published code.
TRIAL_RATE = 1e-4


@register_defense("censor")
@dataclass(frozen=True)
class Censor(Defense):
    """Share, of several random vectors orthogonal to the gradient, the one of lowest loss.

    For every tensor, a normal vector r becomes r - <r, g> g / |g|^2, scaled to |g|. A trial is
    one such vector per tensor; the trial is shared after whose step (learning rate 1e-4) the
    batch's loss is smallest, in evaluation mode as in the published code. What is shared says
    of each tensor of g its norm, and one direction that g does not have.

    Args:
        trials: Number of trials.
        seed: A constant seed of the random vectors, which then are known to whoever knows the
            defense (the published code seeds with 123); -1: they are the client's secret.
        projection: `orthogonal` as in the paper, or `code` as in the published code, which
            subtracts <r, g> g / |g| and is orthogonal only to tensors with |g| = 1.

    Source: Zhang et al., "CENSOR: Defense Against Gradient Inversion via Orthogonal Subspace
        Bayesian Sampling", NDSS 2025, https://arxiv.org/abs/2501.15718; 20 trials as in
        https://github.com/KaiyuanZh/censor.

    Published: reconstructions by five attacks, among them Inverting Gradients, show nothing of
        64 px images on three data sets, at little cost in accuracy.
    """

    trials: int = 20
    seed: int = -1
    projection: str = ORTHOGONAL

    def __post_init__(self) -> None:
        require(self.trials >= 1, "there must be at least one trial")
        require(self.seed >= -1, "the seed must not be negative; -1 means a secret one")
        require(self.projection in PROJECTIONS, f"the projection is one of {PROJECTIONS}")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Replace every tensor by the best trial's."""
        best, smallest = dict(gradient), math.inf
        for directions in self.directions(list(gradient.values()), client.generator):
            pairs = zip(gradient.items(), directions, strict=True)
            trial = {name: self._projected(r, g) for (name, g), r in pairs}
            loss = _loss_after_step(client, trial)
            if loss < smallest:
                best, smallest = trial, loss
        return best

    def directions(
        self, like: Sequence[torch.Tensor], secret: torch.Generator
    ) -> Iterator[list[torch.Tensor]]:
        """The random unit vectors of every trial, in the shapes of `like`.

        Args:
            like: The tensors of the gradient.
            secret: The client's random numbers, which a constant seed leaves alone.
        """
        numbers = secret if self.seed < 0 else torch.Generator().manual_seed(self.seed)
        for _ in range(self.trials):
            drawn = [normal_like(g, numbers) for g in like]
            yield [r / r.norm().clamp_min(1e-30) for r in drawn]

    def _projected(self, direction: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        norm = gradient.double().norm()
        if norm == 0:
            return torch.zeros_like(gradient)
        if gradient.numel() == 1:
            # Nothing is orthogonal to a number.
            return torch.zeros_like(gradient)
        unit = gradient.double() / norm
        along = (direction.double() * unit).sum()
        if self.projection == PUBLISHED_CODE:
            along = along * norm
        found = direction.double() - along * unit
        return (found * (norm / found.norm().clamp_min(1e-30))).to(gradient.dtype)


@torch.no_grad()
def _loss_after_step(client: ClientView, direction: Gradient) -> float:
    """The batch's loss after a small step against a direction."""
    parameters = dict(client.model.named_parameters())
    moved = {name: parameters[name] - TRIAL_RATE * d for name, d in direction.items()}
    state = {**dict(client.model.named_buffers()), **moved}
    with modes_held(client.model):
        outputs = torch.func.functional_call(client.model.eval(), state, (client.images,))
    return float(client.loss(outputs, client.labels))
