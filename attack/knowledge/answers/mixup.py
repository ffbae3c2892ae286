"""Against MixUp: candidates are private images, mixed as the client mixed its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from core.losses import Loss, Outputs, main_output
from core.models.architecture import Architecture, Description
from core.target import Target
from gradients.defenses.mixup import mixed, mixing

# Shares that are tried first, and how far from the best one the next are.
SHARES, FINER = (0.55, 0.65, 0.75, 0.85, 0.95, 1.0), (0.05, 0.025)


@register_adaptation("mixup")
def _mixup(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    if isinstance(target.model, MixingArchitecture):
        share = float(target.model.weights.diagonal().min())
        adaptation.notes.append(f"mixup: candidates are mixed like the client's, share {share:.3f}")
    else:
        adaptation.notes.append("mixup: the mixed images are matched, and not taken apart")


def likeliest_mixture(target: Target, objective: Callable[[Target], float]) -> Target:
    """The target whose model mixes its inputs as the client did.

    Of two images there are two orders, of which one mixes nothing (a share of 1), and a share
    below 1/2 says the same as its complement. More images have too many orders for a search:
    the target stays as it is.

    Args:
        target: What was shared under MixUp.
        objective: How well a short attack explains what was shared.
    """
    if target.batch_size != 2 or len(target.shards) > 1:
        return target
    found = {share: objective(mixing_target(target, share)) for share in SHARES}
    for step in FINER:
        best = min(found, key=found.__getitem__)
        near = {round(best + step, 4), round(best - step, 4)} - set(found)
        for share in sorted(s for s in near if 0.5 < s <= 1):
            found[share] = objective(mixing_target(target, share))
    return mixing_target(target, min(found, key=found.__getitem__))


def mixing_target(target: Target, share: float) -> Target:
    """The same target of private images, whose model mixes two inputs first.

    Args:
        target: What was shared under MixUp, of two images.
        share: Of an image in its own mixture.
    """
    weights = mixing(share, [1, 0])
    model = MixingArchitecture(target.model, weights)
    return dataclasses.replace(target, model=model, loss=MixingLoss(target.loss, weights))


@dataclass(frozen=True)
class MixingArchitecture:
    """An architecture whose model mixes the images of a batch first.

    Attributes:
        inner: The client's architecture; parameters keep their names.
        weights: N x N, see `gradients.defenses.mixup.mixing`.
    """

    inner: Architecture
    weights: torch.Tensor

    @property
    def name(self) -> str:
        """See `Architecture`."""
        return self.inner.name

    def build(self) -> nn.Module:
        """See `Architecture`."""
        model = self.inner.build()
        model.register_forward_pre_hook(_Mix(self.weights))
        return model

    def skeleton(self) -> nn.Module:
        """See `Architecture`."""
        return self.inner.skeleton()

    def describe(self) -> Description:
        """See `Architecture`."""
        return self.inner.describe()


class _Mix:
    """Mix a whole batch; parts of it, on which derivatives are checked, stay as they are."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images = inputs[0]
        if len(images) != len(self.weights):
            return inputs
        return (mixed(images, self.weights.to(images.device)), *inputs[1:])


class MixingLoss(Loss):
    """The client's loss of mixed labels.

    Args:
        inner: What the client minimises.
        weights: N x N, see `gradients.defenses.mixup.mixing`.
    """

    mean_over_samples = False

    def __init__(self, inner: Loss, weights: torch.Tensor) -> None:
        self.inner, self.weights = inner, weights
        self.name, self.targets = inner.name, inner.targets

    def __call__(self, outputs: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        logits = main_output(outputs)
        if not targets.is_floating_point():
            targets = F.one_hot(targets, logits.shape[1]).to(logits)
        if len(targets) == len(self.weights):
            targets = mixed(targets, self.weights.to(targets.device))
        return self.inner(outputs, targets)

    def relaxed(self, variables: torch.Tensor) -> torch.Tensor:
        """See `Loss`."""
        return self.inner.relaxed(variables)
