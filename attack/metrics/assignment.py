"""Which reconstruction belongs to which original."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def pairwise_mse(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every image of `first` (N) against every one of `second` (M): N x M."""
    a, b = first.flatten(1), second.flatten(1)
    # The matrix-product form of the distance cancels where images nearly agree.
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / a.shape[1]


def assign(reconstructions: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Match reconstructions to originals by one linear sum assignment on the MSE.

    Args:
        reconstructions: M x C x H x W in [0, 1], M >= N.
        originals: N x C x H x W in [0, 1].

    Returns:
        N indices: `reconstructions[result]` stands in the order of the originals.
        A reconstruction with NaN or infinite pixels is matched last.
    """
    cost = pairwise_mse(originals, reconstructions).double().cpu().numpy()
    finite = np.isfinite(cost)
    worst = cost[finite].max(initial=0.0)
    cost[~finite] = (worst + 1.0) * (len(cost) + 1)
    _, columns = linear_sum_assignment(cost)
    return torch.from_numpy(columns).to(originals.device)
