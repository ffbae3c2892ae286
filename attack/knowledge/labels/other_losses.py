"""Targets of losses other than cross-entropy, from the last layer's gradient.

The bias gradient of output j is the mean over samples of the loss's slope there: of
(sigmoid(z_j) - y_j) under binary cross-entropy, of 2 (z_j - y_j) under squared error, both divided
by the number of outputs, over which these losses average.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from attack.knowledge.labels.fit import EXPLAINED
from attack.knowledge.labels.last_layer import (
    LastLayer,
    common_factor,
    random_features,
    require_plain_head,
)
from attack.knowledge.labels.registry import SignedFeatures, register_rule
from core.errors import InputError
from core.losses import BinaryCrossEntropy, Loss, MeanSquaredError, Targets
from core.target import Target

logger = logging.getLogger(__name__)


@register_rule(
    "binary",
    targets=frozenset({Targets.LABELS}),
    signed_features=SignedFeatures.MISLEAD_WITHOUT_BIAS,
    bias_alone=True,
)
def binary(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """Which findings are present, under binary cross-entropy: present where the slope is negative.

    For one sample the sign of an output's bias gradient is exact, whatever the features and any
    factor (clipping, weights of present findings). For several samples it gives how many have
    each finding, by the model's mean probabilities on noise; which of them have it, it does not
    tell: the first ones get it.

    Returns:
        K x outputs, 0 or 1.
    """
    if not isinstance(target.loss, BinaryCrossEntropy):
        raise _no_rule(target.loss)
    require_plain_head(target, model)
    if last.batch_size == 1:
        gradient = last.bias_gradient
        if gradient is None or not gradient.any():
            gradient = last.weight_gradient @ random_features(target, model).mean(0)
        return (gradient < 0).double()[None]
    logger.warning(
        "label recovery binary counts how many of the %d samples have each finding, not which",
        last.batch_size,
    )
    counts = _present(last, random_features(target, model), target.loss)
    return (torch.arange(last.batch_size)[:, None] < counts).double()


def _present(last: LastLayer, features: torch.Tensor, loss: BinaryCrossEntropy) -> torch.Tensor:
    """How many samples have each finding: K (mean p - g), more exactly with weights w.

    The slope is p (1 - y) - w y (1 - p): y and p being nearly independent, K g = K p - counts
    (p + w (1 - p)).
    """
    if last.bias_gradient is not None:
        gradient = last.bias_gradient
    else:
        mean = features.mean(0)
        gradient = last.weight_gradient @ mean / mean.square().sum()
    probabilities = last.outputs(features).sigmoid().mean(0)
    weight = torch.ones(1) if loss.pos_weight is None else torch.tensor(loss.pos_weight)
    slope = gradient * last.n_classes
    counts = (probabilities - slope) / (probabilities + weight * (1 - probabilities))
    return (last.batch_size * counts).round().clamp(0, last.batch_size)


@register_rule("regression", targets=frozenset({Targets.VALUES}))
def regression(target: Target, model: nn.Module, last: LastLayer) -> torch.Tensor:
    """The values of one sample under mean squared error: y = z - (outputs / 2) times the slope.

    The features are the quotient of weight and bias gradient, and give the outputs z. Exact for
    one sample and one step of SGD, which is undone. Several samples only show their mean
    residual, from which no value follows; nor can an unknown factor (clipping) be told from
    the residual, in which the whole gradient of one sample is linear.

    Returns:
        1 x outputs.
    """
    if not isinstance(target.loss, MeanSquaredError):
        raise _no_rule(target.loss)
    if last.batch_size != 1 or target.local.steps > 1:
        raise InputError(
            f"label recovery regression reads the values of one sample and one local step; "
            f"{last.batch_size} samples over {target.local.steps} local step(s) show only a mean "
            "residual: give the targets, or optimise them with the inputs"
        )
    factor = common_factor(target)
    if factor:
        raise InputError(
            f"label recovery regression reads values off the gradient as it was, and the client "
            f"changed it ({factor}), by a factor that cannot be told from the residual: give the "
            "targets, or optimise them"
        )
    require_plain_head(target, model)
    gradient = last.require_bias("regression")
    if not last.weight_gradient.any():
        raise InputError(
            "label recovery regression reads the weight gradient of the last layer, which was not "
            "shared or is zero: give the targets, or optimise them"
        )
    features = features_of_one(last.weight_gradient, gradient)
    if features is None:
        raise InputError(
            "label recovery regression: the last layer's gradient is not the outer product that "
            "one sample leaves (noise, or a defense): give the targets, or optimise them"
        )
    return (last.outputs(features) - last.n_classes / 2 * gradient)[None]


def features_of_one(weight_gradient: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """The last layer's input, where its gradient is the outer product that one sample leaves.

    Args:
        weight_gradient: n x features.
        gradient: n, that of the bias.

    Returns:
        None where noise or a defense has made it something else.
    """
    largest = gradient.abs().argmax()
    if not gradient[largest]:
        return None
    features = weight_gradient[largest] / gradient[largest]
    rest = weight_gradient - gradient[:, None] * features
    return features if rest.norm() <= EXPLAINED * weight_gradient.norm() else None


def _no_rule(loss: Loss) -> InputError:
    return InputError(
        f"no rule recovers the targets of the loss {loss.name}: give them, or optimise them with "
        "the inputs (targets='optimise', --joint-labels)"
    )
