"""What a client's shared running statistics say about its batch.

A client that shares its whole state shares BatchNorm's running statistics with it. They
are a moving average of the statistics of its batches, so the batch's own follow from the
values before and after:

- one local step: exactly, up to rounding (which the recovery magnifies by 1 / momentum);
- several local steps: only the average over the steps that the running statistics took;
- asynchronous BatchNorm: those of the client's first process, whose buffers it shares;
  the other processes' leave no trace.

Source: Hatamizadeh et al., "Do Gradient Inversion Attacks Make Federated Learning Unsafe?",
section III, https://arxiv.org/abs/2202.06924.
"""

from __future__ import annotations

import torch

from attack.settings import setting_error
from core.models.unchanged import in_mode
from core.target import BatchStatistics, Target
from gradients.batch_statistics import (
    batch_norm_layers,
    statistics_from_running,
    values_per_channel,
)


def layer_momentum(target: Target) -> dict[str, float]:
    """BatchNorm momentum by module name: what the client states, or else each layer's own.

    Raises:
        InputError: A layer averages over all batches it has ever seen.
    """
    found: dict[str, float] = {}
    stated = target.local.bn_momentum
    for name, layer in batch_norm_layers(target.model.skeleton()).items():
        momentum = getattr(layer, "momentum", None) if stated is None else stated
        if momentum is None:
            raise setting_error(
                f"{{bn_from_update}}: {name} has no momentum, its average no weights"
            )
        found[name] = float(momentum)
    return found


def recovered_statistics(target: Target) -> BatchStatistics:
    """Statistics of the client's batch (of its first process, where asynchronous).

    Args:
        target: What the client shared.

    Returns:
        By module name, in float64: mean and biased variance after one local step; after
        several, the steps' average of mean and unbiased variance.

    Raises:
        InputError: The client has not shared its running statistics.
    """
    steps = target.local.steps
    return _statistics(target, _values_per_channel(target) if steps == 1 else None)


def average_statistics(target: Target) -> BatchStatistics:
    """The local steps' average of mean and unbiased variance, also of a single step.

    Args:
        target: What the client shared.

    Returns:
        By module name, in float64.

    Raises:
        InputError: The client has not shared its running statistics.
    """
    return _statistics(target, None)


def _statistics(target: Target, counts: dict[str, int] | None) -> BatchStatistics:
    if target.running_after is None:
        raise setting_error(
            "{bn_from_update}: the checkpoint holds no running statistics after training"
        )
    steps = target.local.steps
    # K steps move the running value by 1 - (1 - m)^K towards their weighted average.
    moved = {name: 1 - (1 - m) ** steps for name, m in layer_momentum(target).items()}
    after = {name: value.double() for name, value in target.running_after.items()}
    before = {name: target.state_dict[name].double() for name in after}
    found = statistics_from_running(before, after, moved, counts)
    # Rounding may push the variance of a dead channel below 0.
    return {name: (mean, variance.clamp_min(0)) for name, (mean, variance) in found.items()}


def _values_per_channel(target: Target) -> dict[str, int]:
    """Values behind each statistic of one local step, found without computing any."""
    images = target.batch_size if target.synchronized else target.shards[0]
    model = in_mode(target.model.skeleton().to("meta"), False)
    return values_per_channel(model, torch.zeros((images, *target.data.shape), device="meta"))
