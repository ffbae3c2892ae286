"""Honest rounds that a client can make by itself, to compare what it received with.

A client knows its own samples and how it trains. What a federation of clients like it would send
is approximated by what it would send alone: from the model of the round before where it is at
hand, else from fresh initialisations, round after round. Real rounds average several sites, and
may differ more: the rate of false alarms that is stated holds for rounds like the client's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from audit.detectors.base import MOST_SAMPLES, Received, View, scores_of
from core.losses import Loss
from core.models.unchanged import in_mode, random_numbers_held

Trained = Callable[[nn.Module, torch.Generator], nn.Module]
# Rounds of one fresh initialisation: an early phase and a later one.
ROUNDS_OF_A_START = 4


@dataclass(frozen=True)
class Samples:
    """Those of the client.

    Attributes:
        inputs: N x ..., normalised.
        targets: N x ..., as the loss takes them.
        loss: What the client minimises.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    loss: Loss

    def view(self, model: nn.Module) -> View:
        """A model on at most `MOST_SAMPLES` of them, evenly taken."""
        step = -(-len(self.inputs) // MOST_SAMPLES)
        return View(model, self.inputs[::step], self.targets[::step], self.loss)

    def trained(
        self, model: nn.Module, generator: torch.Generator, *, lr: float, steps: int, size: int
    ) -> nn.Module:
        """A copy of the model after steps of SGD on random batches of them.

        Args:
            model: Left as it is.
            generator: Of the batches.
            lr: Learning rate.
            steps: How many.
            size: Samples of a batch.
        """
        found = copy.deepcopy(model)
        with torch.enable_grad(), random_numbers_held(self.inputs.device):
            in_mode(found, model.training)
            trained = [p for p in found.parameters() if p.requires_grad]
            for _ in range(steps):
                chosen = torch.randperm(len(self.inputs), generator=generator)[:size]
                loss = self.loss(found(self.inputs[chosen]), self.targets[chosen])
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(trained, gradients, strict=True):
                        if gradient is not None:
                            parameter.sub_(lr * gradient)
        return found


def fresh_start(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose layers are initialised anew, as their own classes do it."""
    found = copy.deepcopy(model)
    with random_numbers_held(torch.device("cpu")):
        torch.manual_seed(seed)
        for module in found.modules():
            again = getattr(module, "reset_parameters", None)
            if callable(again):
                again()
    return found


def honest_scores(
    samples: Samples, trained: Trained, received: nn.Module, before: nn.Module | None, seed: int = 0
) -> Iterator[dict[str, float]]:
    """Scores of honest rounds by detector, without end.

    Args:
        samples: Of the client.
        trained: What a model becomes in a round, with random numbers of a generator.
        received: The received model: its architecture is what counts.
        before: That of the round before; None: rounds start from fresh initialisations.
        seed: Of every random number.
    """
    number = 0
    earlier = None if before is None else samples.view(before)
    while True:
        if before is not None:
            yield _score(samples, _round(trained, before, seed, number), earlier)
            number += 1
            continue
        model = fresh_start(received, seed + number)
        for _ in range(ROUNDS_OF_A_START):
            yield _score(samples, model, None)
            model = _round(trained, model, seed, number)
            number += 1


def _round(trained: Trained, model: nn.Module, seed: int, number: int) -> nn.Module:
    return trained(model, torch.Generator().manual_seed(seed * 100_003 + number))


def _score(samples: Samples, model: nn.Module, before: View | None) -> dict[str, float]:
    return scores_of(Received(samples.view(model), before))
