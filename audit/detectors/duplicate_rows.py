"""Neurons that measure the same."""

from __future__ import annotations

import torch

from audit.detectors.base import TINY, Detector, View, register_detector

# Rows of a matrix that are compared, evenly taken; inputs that are needed for directions to differ.
MOST_ROWS, FEWEST_INPUTS = 256, 8


@register_detector
class DuplicateRows(Detector):
    """How much alike a layer's neurons are: the largest over the layers.

    Of every neuron, the largest |cosine| of its weights and another neuron's; of a layer, their
    mean. All neurons of an imprint measure one thing against thresholds of their own, which makes
    it 1.
    """

    name = "duplicate-rows"

    def alone(self, now: View) -> float:
        """See the class."""
        wide = [w for w in now.matrices.values() if w.shape[1] >= FEWEST_INPUTS and len(w) > 1]
        return max(map(_likeness, wide), default=0.0)


def _likeness(weight: torch.Tensor) -> float:
    rows = weight[:: -(-len(weight) // MOST_ROWS)]
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(TINY)
    cosines = (units @ units.T).abs().fill_diagonal_(0)
    return float(cosines.max(1).values.mean())
