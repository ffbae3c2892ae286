"""Norms of the client's own gradient, layer by layer."""

from __future__ import annotations

import statistics

from audit.detectors.base import Detector, View, largest_change, log_ratio, register_detector


@register_detector
class GradientNorms(Detector):
    """Whether one layer's gradient is out of proportion.

    By itself: decimal logarithm of the largest layer's norm over the middle one's. A block that
    copies the input into its gradient has a gradient of the input's size, and a drowned last
    layer leaves nothing to those before it.

    Against the round before: over all parameters, the largest |log10| of the ratio of the norms.
    """

    name = "gradient-norms"

    def alone(self, now: View) -> float:
        """See the class."""
        norms = [now.gradient_norms[name] for name in now.matrices if name in now.gradient_norms]
        return log_ratio(max(norms), statistics.median(norms)) if norms else 0.0

    def against(self, now: View, before: View) -> float:
        """See the class."""
        return largest_change(now.gradient_norms, before.gradient_norms)
