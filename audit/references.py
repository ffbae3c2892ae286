"""Similarities of reconstructions and images, beside what knows nothing of the update.

Images are compared by correlation and structure, sentences by the tokens that they share, records
of a table by the cells that are right. The first measure of a kind is the one that decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from attack.metrics.records import right_cells
from audit.record import SimilaritySection
from audit.similarity import ImageSimMetric, similarity_matrix
from core.data.columns import Columns
from core.data.specs import DataSpec

# The protocol's count of leaks: above the 99th percentile of 100 images of noise.
NOISE_IMAGES, PERCENTILE = 100, 99
NCC, SSIM = "ncc", "ssim"
TOKENS, PLACES, CELLS = "tokens", "places", "cells"
_NOISE_STREAM, _DRAW = 31, 37


def at_scale(images: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Images (N x C x ...) as means over the pixels of a coarser grid; as they are at their own."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    pool: dict[int, Callable[..., torch.Tensor]]
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return pool[len(size)](images, size)


def metrics_of(data: DataSpec) -> tuple[str, ...]:
    """The similarities that samples of a kind have: rows of numbers have no windows."""
    if data.n_tokens:
        return (TOKENS, PLACES)
    if data.columns is not None:
        return (CELLS,)
    return (NCC, SSIM) if len(data.shape) > 1 else (NCC,)


def similarities(
    metric: str, found: torch.Tensor, images: torch.Tensor, columns: Columns | None = None
) -> np.ndarray:
    """Reconstructions x images.

    Args:
        metric: "ncc" or "ssim"; "tokens", the share of a sentence's tokens that the other has, in
            any order (ROUGE-1 of sentences of one length); "places", the share that is the same in
            its place; "cells", the share of a record's cells that are right.
        found: M x ...
        images: N x ...
        columns: Of a table's records.
    """
    if metric == TOKENS:
        return _shared_tokens(found, images)
    if metric == PLACES:
        return (found[:, None] == images[None]).double().mean(2).numpy()
    if metric == CELLS:
        assert columns is not None
        each = [right_cells(columns, record, images).double().mean(1) for record in found]
        return torch.stack(each).numpy()
    return similarity_matrix(ImageSimMetric(metric), images, found)[metric].T


def _shared_tokens(found: torch.Tensor, images: torch.Tensor) -> np.ndarray:
    """Overlap of the multisets of token ids, over the length of a sentence."""
    size = 1 + int(max(found.max(), images.max()))
    own, others = (
        torch.zeros((len(ids), size), dtype=torch.int32).scatter_add_(
            1, ids.long(), torch.ones_like(ids, dtype=torch.int32)
        )
        for ids in (found, images)
    )
    each = [torch.minimum(counts, others).sum(1) for counts in own]
    return (torch.stack(each).double() / found.shape[1]).numpy()


def similarity_section(
    metric: str,
    found: torch.Tensor,
    members: torch.Tensor,
    non_members: torch.Tensor,
    *,
    seed: int,
    prior: torch.Tensor | None = None,
    data: DataSpec | None = None,
) -> SimilaritySection:
    """One similarity of reconstructions with the three references beside it.

    Args:
        metric: See `similarities`.
        found: M x C x ..., the reconstructions.
        members: N x C x ...
        non_members: K x C x ...
        seed: Of the noise.
        prior: C x ..., what the attack started from; None: noise.
        data: Says of sentences how many tokens there are, and of records what their columns are.
    """
    columns = None if data is None else data.columns

    def best_of(samples: torch.Tensor, among: torch.Tensor) -> np.ndarray:
        return similarities(metric, samples, among, columns).max(1)

    own = best_of(found, members)
    noise = best_of(noise_like(non_members, seed, data), members)
    limit = float(np.percentile(noise, PERCENTILE))
    public = [typical(non_members), *([] if prior is None else [prior])]
    best = [float(best_of(image[None], members).max()) for image in public]
    return SimilaritySection(
        metric=metric,
        best_member=tuple(own.tolist()),
        best_non_member=tuple(best_of(found, non_members).tolist()),
        noise=tuple(noise.tolist()),
        noise_99=limit,
        above_noise=int((own > limit).sum()),
        mean_image=best[0],
        prior_image=best[1] if prior is not None else None,
    )


def some_of(images: torch.Tensor, most: int, seed: int) -> torch.Tensor:
    """At most so many of the images, drawn by chance and in order; 0: all of them."""
    if not 0 < most < len(images):
        return images
    drawn = np.random.default_rng((seed, _DRAW)).choice(len(images), most, replace=False)
    return images[torch.from_numpy(np.sort(drawn))]


def typical(samples: torch.Tensor) -> torch.Tensor:
    """The mean of images or records; of sentences the most frequent token in each place."""
    return samples.mean(0) if samples.is_floating_point() else samples.mode(0).values


def noise_like(images: torch.Tensor, seed: int, data: DataSpec | None = None) -> torch.Tensor:
    """Gaussian noise of the images' mean and standard deviation, `NOISE_IMAGES` of it.

    Of sentences, tokens drawn from all; of a table, cells drawn from its columns one by one.
    """
    generator = torch.Generator().manual_seed(seed + _NOISE_STREAM)
    if data is not None and data.columns is not None:
        return data.columns.sample(NOISE_IMAGES, seed + _NOISE_STREAM)
    if data is not None and data.n_tokens:
        shape = (NOISE_IMAGES, *images.shape[1:])
        return torch.randint(data.n_tokens, shape, generator=generator)
    noise = torch.randn((NOISE_IMAGES, *images.shape[1:]), generator=generator)
    spread = images.std() if images.numel() > 1 else 1.0
    return images.mean() + spread * noise
