"""The relative data leakage value pair by pair, for code written for the published filter.

`audit.leakage` measures a whole update at once; this is the published function's order of work
and its results, for any loader, similarity and transform.

Source: `RelativeDataLeakageValueFilter.compute_rdlv` of NVFlare's research example "Quantifying
Data Leakage in Federated Learning",
https://github.com/NVIDIA/NVFlare/tree/main/research/quantifying-data-leakage; described from its
interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from attack.metrics import relative_leakage
from audit.similarity import SimMetric, compare
from core.errors import InputError

BEST = {"max": np.argmax, "min": np.argmin}


def compute_rdlv(
    train_loader: Iterable[Mapping[str, Any]],
    recons: Sequence[Any],
    sim_metric: SimMetric,
    reduce: str | None = "max",
    recon_transforms: Callable[[Any], Any] | None = None,
    image_key: str = "image",
    prior: Any = None,
    fl_ctx: Any = None,
) -> tuple[np.ndarray, np.ndarray, list[list[Any]], np.ndarray | None]:
    """Every training image against every reconstruction.

    Args:
        train_loader: Batches of one image, 1 x C x H x W in 0..255 under `image_key`.
        recons: M reconstructions, C x H x W.
        sim_metric: The similarity.
        reduce: "max", "min", or None for no reduction.
        recon_transforms: Brings a reconstruction to 0..255.
        image_key: Of the images in a batch.
        prior: C x H x W in 0..255; None: the similarities themselves, not relative ones.
        fl_ctx: NVFlare's context, for metrics that take one.

    Returns:
        N x K values of the best reconstruction (by the first metric) of every image, N x M x K
        values of all, N pairs of an image and its best reconstruction, and the N x K numbers
        of the best reconstructions by each metric. Without a reduction: all values twice, no
        pairs, and None.

    Raises:
        InputError: An unknown reduction, or a batch of several images.
    """
    if reduce is not None and reduce not in BEST:
        raise InputError(f"reduce {reduce!r}: choose max, min or None")
    shown = [recon if recon_transforms is None else recon_transforms(recon) for recon in recons]
    images, rows = [], []
    for batch in train_loader:
        image = batch[image_key]
        if len(image) != 1:
            raise InputError(f"a batch has {len(image)} images under {image_key!r}, not one")
        images.append(image[0])
        found = _values(sim_metric, shown, image[0], fl_ctx)
        if prior is not None:
            found = relative_leakage(found, _values(sim_metric, [prior], image[0], fl_ctx))
        rows.append(found)
    values = np.stack(rows)
    if reduce is None:
        return values, values, [], None
    closest = BEST[reduce](values, axis=1)
    best = closest[:, 0]
    matches = [[image, recons[index]] for image, index in zip(images, best, strict=True)]
    return values[np.arange(len(best)), best], values, matches, closest


def _values(metric: SimMetric, sources: Sequence[Any], reference: Any, fl_ctx: Any) -> np.ndarray:
    """M x K similarities of some images with one."""
    x = torch.as_tensor(reference)
    found = [compare(metric, torch.as_tensor(source), x, fl_ctx) for source in sources]
    return np.array([list(values.values()) for values in found], dtype=float)
