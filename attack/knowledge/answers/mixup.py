"""Against MixUp: candidates are private images, mixed as the client mixed its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import least_squares
from scipy.special import softmax

from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.known_defenses import Adaptation, register_adaptation
from core.errors import InputError
from core.losses import Loss, Outputs, main_output
from core.models.architecture import Architecture
from core.target import Target
from gradients.defenses.mixup import mixed, mixing

# Singular values below this share of the largest are rounding.
RANK = 1e-5
# Mean error of probabilities from which on the equations are not solved.
UNSOLVED = 1e-3
# Shares that are tried first, and how far from the best one the next are.
SHARES, FINER = (0.55, 0.65, 0.75, 0.85, 0.95, 1.0), (0.05, 0.025)


@register_adaptation("mixup")
def _mixup(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    if isinstance(target.model, MixingArchitecture):
        share = float(target.model.weights.diagonal().min())
        adaptation.notes.append(f"mixup: candidates are mixed like the client's, share {share:.3f}")
    else:
        adaptation.notes.append("mixup: the mixed images are matched, and not taken apart")


def likeliest_mixture(
    target: Target, labels: torch.Tensor, objective: Callable[[Target], float]
) -> Target:
    """The target whose model mixes its inputs as the client did.

    Of two images there are two orders, of which one mixes nothing (a share of 1), and a share
    below 1/2 says the same as its complement. The classifier's gradient says which share it
    was; where it does not, short attacks tell. More images have too many orders for a search:
    the target stays as it is.

    Args:
        target: What was shared under MixUp.
        labels: N classes of the private images.
        objective: How well a short attack explains what was shared.
    """
    if target.batch_size != 2 or len(target.shards) > 1:
        return target
    share = share_from_head(target, labels)
    if share is not None:
        return mixing_target(target, share)
    found = {share: objective(mixing_target(target, share)) for share in SHARES}
    for step in FINER:
        best = min(found, key=found.__getitem__)
        near = {round(best + step, 4), round(best - step, 4)} - set(found)
        for share in sorted(s for s in near if 0.5 < s <= 1):
            found[share] = objective(mixing_target(target, share))
    return mixing_target(target, min(found, key=found.__getitem__))


def share_from_head(target: Target, labels: torch.Tensor) -> float | None:
    """The share that two images of different classes were mixed with, from the last layer.

    Its weight's gradient is G = (u_1 f_1' + u_2 f_2') / 2 with features f and u_i = softmax(W
    f_i + b) - y_i(s). G has rank 2 and is P Q; with an unknown 2 x 2 matrix A the features are
    A Q and the u_i / 2 are P A^-1. That u and f belong together is 2 n equations in the five
    unknowns A and s.

    Args:
        target: What was shared under MixUp.
        labels: Two classes.

    Returns:
        In [1/2, 1]; None where there is no such layer, or the equations have no solution.
    """
    found = solved_shares(target, labels, [[share] for share in SHARES], _mixed_classes)
    return None if found is None else min(1.0, max(float(found[0]), 1 - float(found[0])))


def solved_shares(
    target: Target,
    labels: torch.Tensor,
    starts: list[list[float]],
    mix: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray | None:
    """The shares that solve the equations of the last layer, see `share_from_head`.

    Args:
        target: What was shared of two mixtures of two images.
        labels: Two classes.
        starts: Shares to begin at.
        mix: Of the labels as 2 x classes, and the shares, the labels of the mixtures.

    Returns:
        None where there is no such layer, or the equations have no solution.
    """
    head = _head_of(target)
    if head is None or labels.is_floating_point() or int(labels[0]) == int(labels[1]):
        return None
    gradient, weight, bias = head
    left, singular, right = np.linalg.svd(gradient, full_matrices=False)
    if len(singular) < 2 or singular[1] < RANK * singular[0]:
        return None
    p, q = left[:, :2] * singular[:2], right[:2]
    classes = np.eye(len(bias))[labels.cpu().numpy()]
    towards = q @ weight.T

    def errors(unknown: np.ndarray) -> np.ndarray:
        a, shares = unknown[:4].reshape(2, 2), unknown[4:]
        given = softmax(a @ towards + bias, axis=1) - mix(classes, shares)
        return (given - 2 * (p @ np.linalg.pinv(a)).T).ravel()

    best, smallest = None, UNSOLVED * math.sqrt(classes.size)
    for shares in starts:
        expected = softmax(bias) - mix(classes, np.array(shares))
        start = np.linalg.pinv(np.linalg.lstsq(p, expected.T / 2, rcond=None)[0])
        solved = least_squares(errors, [*start.ravel(), *shares], xtol=1e-14, ftol=1e-14)
        error = float(np.linalg.norm(solved.fun))
        if error < smallest:
            best, smallest = solved.x[4:], error
    return best


def _mixed_classes(classes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    mixture: np.ndarray = shares[0] * classes + (1 - shares[0]) * classes[::-1]
    return mixture


def _head_of(target: Target) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Gradient and value of the last layer's weight, and its bias; None where not shared."""
    from core.models.head import head_for

    try:
        name, layer = head_for(target.build_model(), target.data)
    except InputError:
        return None
    gradient = target.gradient.get(f"{name}.weight" if name else "weight")
    if gradient is None or layer.bias is None:
        return None
    found = (gradient, layer.weight, layer.bias)
    values, weight, bias = (t.detach().double().cpu().numpy() for t in found)
    return values, weight, bias


def mixing_target(target: Target, share: float) -> Target:
    """The same target of private images, whose model mixes two inputs first.

    Args:
        target: What was shared under MixUp, of two images.
        share: Of an image in its own mixture.
    """
    weights = mixing(share, [1, 0])
    model = MixingArchitecture(target.model, weights)
    return dataclasses.replace(target, model=model, loss=MixingLoss(target.loss, weights))


class MixingArchitecture(EncodedArchitecture):
    """An architecture whose model mixes the images of a batch first.

    Args:
        inner: The client's architecture; parameters keep their names.
        weights: N x N, see `gradients.defenses.mixup.mixing`.
    """

    def __init__(self, inner: Architecture, weights: torch.Tensor) -> None:
        super().__init__(inner, lambda x: mixed(x, weights.to(x.device)), len(weights))
        self.weights = weights


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
