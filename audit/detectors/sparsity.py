"""Weights that are zero."""

from __future__ import annotations

import torch

from audit.detectors.base import Detector, View, register_detector

# Elements below this share of their matrix's root mean square count as zero.
ZERO = 1e-3


@register_detector
class Sparsity(Detector):
    """The largest share of zeros in a matrix.

    Of normal weights, less than a thousandth are as small as that. Layers that copy their input,
    or that silence classes, consist of zeros.
    """

    name = "sparsity"

    def alone(self, now: View) -> float:
        """See the class."""
        return max((_share_of_zeros(w) for w in now.matrices.values()), default=0.0)


def _share_of_zeros(weight: torch.Tensor) -> float:
    size = weight.square().mean().sqrt()
    return float((weight.abs() <= ZERO * size).double().mean())
