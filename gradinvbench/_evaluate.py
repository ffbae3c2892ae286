"""`evaluate`: how much of the private images a reconstruction shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attack.metrics import (
    Evaluation,
    evaluate_text,
    metric_names,
    metrics_for,
    registered_metrics,
)
from attack.metrics import evaluate as measure
from attack.reconstruction import Reconstruction
from core.target import Truth
from gradinvbench._names import check_name

# Of images; other samples get those that fit them.
DEFAULT = ("psnr", "ssim", "mse")


def evaluate(
    found: Reconstruction | torch.Tensor,
    truth: Truth,
    *,
    metrics: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Compare a reconstruction with the truth.

    Every reconstructed image is assigned to one true image, once, by the mean squared
    error; all metrics use that assignment. Flat colours stand beside it as a guess that
    needs no gradient. Values without bounds (tables, signals) have no range of their own, which
    PSNR and SSIM need: the range of the true values stands for it. Sentences of token ids are
    assigned so that most tokens are in their places, and have metrics of their own.

    Args:
        found: What `invert` returned, or images (N x C x H x W in [0, 1]), signals, volumes or
            rows of a table.
        truth: The second thing that `share` returned.
        metrics: Names in `metrics()`; default: PSNR, SSIM, MSE and those of plugins; of signals
            and volumes also the NCC, and of tables that in place of the SSIM; of a `table`'s
            records also the share of right cells and of exact records, beside guesses from the
            columns' distributions.
        device: Where to compute; default: where the images are.

    Returns:
        Prints as a table; `to_frame()` has one row per image.

    Raises:
        InputError: An unknown metric, or shapes that do not belong together.
    """
    if truth.is_text:
        return _text(found, truth, metrics)
    names = _default(truth) if metrics is None else tuple(metrics)
    for name in names:
        check_name("metric", name, metric_names())
    return measure(
        found.images if isinstance(found, Reconstruction) else found,
        found.labels if isinstance(found, Reconstruction) else None,
        truth,
        metrics=names,
        device=device,
        mean_image=truth.mean_image,
        nearest_images=truth.nearest_images,
        confidence=found.confidence if isinstance(found, Reconstruction) else None,
    )


def _text(
    found: Reconstruction | torch.Tensor, truth: Truth, metrics: Sequence[str] | None
) -> Evaluation:
    for name in metrics or ():
        check_name("metric", name, metric_names())
    if isinstance(found, Reconstruction):
        return evaluate_text(found.images, found.labels, truth, found.data, metrics)
    return evaluate_text(found, None, truth, metrics=metrics)


def _default(truth: Truth) -> tuple[str, ...]:
    if truth.images.dim() == 4:
        return (*DEFAULT, *registered_metrics())
    return metrics_for(truth.images.shape[1:], truth.columns)
