"""Whether a reconstruction gives away which image it came from, and how much it adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from attack.metrics.assignment import assign
from attack.metrics.similarity import ssim

# The prior's similarity does not count as smaller than this in a relative data leakage value.
PRIOR_FLOOR = 0.05
Values = TypeVar("Values", torch.Tensor, np.ndarray)


def iip(
    reconstructions: torch.Tensor,
    originals: torch.Tensor,
    candidates: torch.Tensor | None = None,
    *,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    order: torch.Tensor | None = None,
) -> float:
    """Image identification precision: how often the nearest known image is the right one.

    Args:
        reconstructions: M x C x H x W in [0, 1].
        originals: N x C x H x W.
        candidates: Further images, P x C x H x W, among which an original must be
            told apart; without them the pool is the batch itself.
        features: Maps images to N x D; pixels if None. The paper takes a network's
            last embedding with the cosine distance: return unit vectors for that.
        order: The reconstruction of every original; assigned on the MSE if None.

    Returns:
        Share in [0, 1] of the originals whose reconstruction is nearer to it than to
        any other image of the pool.

    Source:
        Yin et al., See through Gradients: Image Batch Recovery via GradInversion,
        CVPR 2021, section 4.1, https://arxiv.org/abs/2104.07586.
    """
    order = assign(reconstructions, originals) if order is None else order
    pool = originals if candidates is None else torch.cat([originals, candidates.to(originals)])
    describe = features or (lambda images: images.flatten(1))
    distance = torch.cdist(
        describe(reconstructions[order]),
        describe(pool),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    own = torch.arange(len(originals), device=distance.device)
    return float((distance.argmin(1) == own).double().mean())


def rdlv(
    reconstructions: torch.Tensor,
    originals: torch.Tensor,
    prior: torch.Tensor,
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = ssim,
) -> torch.Tensor:
    """Relative data leakage value (RDLV) of every original: what the best reconstruction adds.

    The largest `relative_leakage` over all reconstructions.

    Args:
        reconstructions: M x C x H x W in [0, 1].
        originals: N x C x H x W.
        prior: C x H x W or 1 x C x H x W, what the attacker knew before.
        similarity: Maps two batches of images to one value per pair.

    Returns:
        N values.
    """
    known = similarity(prior.reshape(1, *originals.shape[1:]).expand_as(originals), originals)
    best = torch.stack(
        [similarity(reconstructions, x.expand_as(reconstructions)).max() for x in originals]
    )
    return relative_leakage(best, known)


def relative_leakage(similarity: Values, prior: Values) -> Values:
    """How much closer a reconstruction r is to an image x than public knowledge is (RDLV).

    RDLV(x, r) = (sim(x, r) - sim(x, prior)) / max(|sim(x, prior)|, 0.05)

    The paper divides by sim(x, prior). For a prior of ordinary similarity the two are equal.
    Where the prior is bad they are not: of a negative similarity, the paper's value changes its
    sign and calls a better reconstruction a smaller leak; at 0 it has no value, and near 0 it
    calls every difference a leak. Here the sign always says whether the reconstruction is
    closer than the prior, and every image has a value.

    Args:
        similarity: sim(x, r), of any shape.
        prior: sim(x, prior), of a shape that broadcasts with it.

    Returns:
        The value of every pair, NaN only where a similarity is.

    Source:
        Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning Unsafe?,
        2022, eq. 9, https://arxiv.org/abs/2202.06924.
    """
    return (similarity - prior) / scale_of_prior(prior)


def scale_of_prior(prior: Values) -> Values:
    """What `relative_leakage` divides by: the length of the prior's similarity, at least 0.05."""
    scale: Values = abs(prior).clip(min=PRIOR_FLOOR)
    return scale
