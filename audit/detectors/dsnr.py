"""D-SNR: whether one sample of a batch drowns out the others."""

from __future__ import annotations

import torch

from audit.detectors.base import Detector, View, log_ratio, register_detector


@register_detector
class DisaggregationSignalToNoise(Detector):
    """Decimal logarithm of the largest D-SNR over the layers.

    D-SNR of a layer = max_i |g_i| / sqrt(sum_j |g_j|^2 - max_i |g_i|^2), g_i being sample i's own
    gradient of the layer's weights. Where one sample holds nearly all of it, the batch hides
    nothing of that sample. Only weights of dense layers and convolutions are looked at.

    Source: Garov, Dimitrov, Jovanović, Vechev, "Hiding in Plain Sight: Disguising Data Stealing
        Attacks in Federated Learning", ICLR 2024, section 3, https://arxiv.org/abs/2306.03013.
    """

    name = "dsnr"

    def alone(self, now: View) -> float:
        """See the class."""
        found = [_dsnr(now.sample_norms[n]) for n in now.matrices if n in now.sample_norms]
        return max(found, default=0.0)


def _dsnr(norms: torch.Tensor) -> float:
    squares = norms.double().square()
    loudest = float(squares.max())
    # A layer that gets no gradient from any sample gives none away.
    return log_ratio(loudest, float(squares.sum()) - loudest) / 2 if loudest > 0 else 0.0
