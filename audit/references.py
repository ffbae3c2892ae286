"""Similarities of reconstructions and images, beside what knows nothing of the update."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from audit.record import SimilaritySection
from audit.similarity import ImageSimMetric, similarity_matrix

# The protocol's count of leaks: above the 99th percentile of 100 images of noise.
NOISE_IMAGES, PERCENTILE = 100, 99
NCC, SSIM = "ncc", "ssim"
_NOISE_STREAM, _DRAW = 31, 37


def at_scale(images: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Images (N x C x ...) as means over the pixels of a coarser grid; as they are at their own."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    pool: dict[int, Callable[..., torch.Tensor]]
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return pool[len(size)](images, size)


def metrics_of(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The similarities that samples of a shape have: rows of a table have no windows."""
    return (NCC, SSIM) if len(shape) > 1 else (NCC,)


def similarities(metric: str, found: torch.Tensor, images: torch.Tensor) -> np.ndarray:
    """Reconstructions x images."""
    return similarity_matrix(ImageSimMetric(metric), images, found)[metric].T


def similarity_section(
    metric: str,
    found: torch.Tensor,
    members: torch.Tensor,
    non_members: torch.Tensor,
    *,
    seed: int,
    prior: torch.Tensor | None = None,
) -> SimilaritySection:
    """One similarity of reconstructions with the three references beside it.

    Args:
        metric: "ncc" or "ssim".
        found: M x C x ..., the reconstructions.
        members: N x C x ...
        non_members: K x C x ...
        seed: Of the noise.
        prior: C x ..., what the attack started from; None: noise.
    """
    own = similarities(metric, found, members).max(1)
    noise = similarities(metric, noise_like(non_members, seed), members).max(1)
    limit = float(np.percentile(noise, PERCENTILE))
    public = [non_members.mean(0), *([] if prior is None else [prior])]
    best = [float(similarities(metric, image[None], members).max()) for image in public]
    return SimilaritySection(
        metric=metric,
        best_member=tuple(own.tolist()),
        best_non_member=tuple(similarities(metric, found, non_members).max(1).tolist()),
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


def noise_like(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian noise of the images' mean and standard deviation, `NOISE_IMAGES` of it."""
    generator = torch.Generator().manual_seed(seed + _NOISE_STREAM)
    noise = torch.randn((NOISE_IMAGES, *images.shape[1:]), generator=generator)
    spread = images.std() if images.numel() > 1 else 1.0
    return images.mean() + spread * noise
