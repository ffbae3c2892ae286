"""BatchNorm statistics of a batch: measured by hooks, or recovered from running statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from core.models.kinds import BatchNorm
from core.target import BatchStatistics


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every BatchNorm layer of `model` by module name, in the order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}


@torch.no_grad()
def collect_batch_statistics(model: nn.Module, images: torch.Tensor) -> BatchStatistics:
    """Measure the mean and variance that a batch has in front of every BatchNorm layer.

    The model's buffers are left as they were, although a forward pass in train
    mode would move the running statistics.

    Args:
        model: Run in whatever mode it is in.
        images: N x C x H x W, normalised.

    Returns:
        By module name: mean and biased variance per channel.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    passes, close = observe_passes(model)
    try:
        # Cloned buffers take the update of the running statistics.
        torch.func.functional_call(model, buffers, (images,))
    finally:
        close()
    return passes[0] if passes else {}


def observe_passes(
    model: nn.Module, *, unbiased: bool = False
) -> tuple[list[BatchStatistics], Callable[[], None]]:
    """Measure what every forward pass has in front of every BatchNorm layer.

    Args:
        model: Every layer is passed once in each of its passes.
        unbiased: Measure the unbiased variance.

    Returns:
        The means and variances of every pass, as they come, differentiable; and what
        ends the observation.
    """
    passes: list[BatchStatistics] = []

    def measure(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not passes or name in passes[-1]:
            passes.append({})
        features = inputs[0]
        over = [dim for dim in range(features.dim()) if dim != 1]
        passes[-1][name] = (features.mean(over), features.var(over, unbiased=unbiased))

    hooks = [
        layer.register_forward_pre_hook(partial(measure, name))
        for name, layer in batch_norm_layers(model).items()
    ]

    def close() -> None:
        for hook in hooks:
            hook.remove()

    return passes, close


def merge_batch_statistics(
    parts: Sequence[BatchStatistics], sizes: Sequence[int]
) -> BatchStatistics:
    """Statistics of a whole batch from those of its parts (Chan et al. 1979).

    Args:
        parts: Statistics of every part.
        sizes: Images in every part.

    Returns:
        Mean and biased variance over all images.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances", http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
    """
    return {name: _merge([part[name] for part in parts], sizes) for name in parts[0]}


def _merge(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    shares = [size / sum(sizes) for size in sizes]
    mean = torch.stack([share * m for share, (m, _) in zip(shares, parts, strict=True)]).sum(0)
    spread = [
        share * (v + (m - mean).square()) for share, (m, v) in zip(shares, parts, strict=True)
    ]
    return mean, torch.stack(spread).sum(0)


def statistics_from_running(
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    momentum: Mapping[str, float] | float = 0.1,
    n: Mapping[str, int] | int | None = None,
) -> BatchStatistics:
    """Recover the statistics of one batch from the running statistics around it.

    A BatchNorm layer moves its running value r by momentum m towards the batch's
    value b: r' = (1 - m) r + m b, hence b = (r' - (1 - m) r) / m.

    Args:
        old: State dictionary before the local step.
        new: State dictionary after exactly one local step.
        momentum: BatchNorm momentum m, one number or one per layer.
        n: Values per channel behind every statistic (images x height x width), one
            number or one per layer. Running variances are unbiased; with `n` they
            are turned into the biased variance the layer normalised with, without
            it they stay unbiased.

    Returns:
        By module name: mean and variance per channel.

    Source: Hatamizadeh et al., "Do Gradient Inversion Attacks Make Federated Learning
        Unsafe?", section III, https://arxiv.org/abs/2202.06924.
    """
    suffix = "running_mean"
    names = [key.removesuffix(suffix).rstrip(".") for key in old if key.endswith(suffix)]
    recovered: BatchStatistics = {}
    for name in names:
        m = momentum[name] if isinstance(momentum, Mapping) else momentum
        mean, variance = (
            (new[key] - (1 - m) * old[key]) / m
            for key in (_key(name, suffix), _key(name, "running_var"))
        )
        count = n.get(name) if isinstance(n, Mapping) else n
        recovered[name] = (mean, variance if count is None else variance * (count - 1) / count)
    return recovered


def _key(name: str, statistic: str) -> str:
    # A model that is itself a BatchNorm layer has no module name in front.
    return f"{name}.{statistic}" if name else statistic


def values_per_channel(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Images x height x width in front of every BatchNorm layer, for `statistics_from_running`."""
    counts: dict[str, int] = {}

    def count(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    hooks = [
        layer.register_forward_pre_hook(partial(count, name))
        for name, layer in batch_norm_layers(model).items()
    ]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        torch.func.functional_call(model, buffers, (images,))
    for hook in hooks:
        hook.remove()
    return counts
