"""What the client's own samples cost under the model."""

from __future__ import annotations

from audit.detectors.base import Detector, View, log_ratio, register_detector


@register_detector
class LossJump(Detector):
    """Decimal logarithm of the mean loss; against the round before, by how much it has risen.

    A federation's model is never much worse than a guess, and no honest round makes it much worse
    than the one before.
    """

    name = "loss-jump"

    def alone(self, now: View) -> float:
        """See the class."""
        return log_ratio(float(now.sample_losses.double().mean()), 1.0)
