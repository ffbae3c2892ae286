"""How often units are on, on the client's own data."""

from __future__ import annotations

import math

from audit.detectors.base import Detector, View, register_detector


@register_detector
class ActivationRates(Detector):
    """Whether units wait for few samples, or for others than a round before.

    By itself: over dense layers and convolutions but the last, the largest mean distance of a
    unit's rate from one half, in shares of that half. Traps wait for one sample of a batch, which
    makes it nearly 1.

    Against the round before: over these layers, the largest mean change of a unit's rate.
    """

    name = "activation-rates"

    def alone(self, now: View) -> float:
        """See the class."""
        hidden = list(now.activation_rates.values())[:-1]
        return max((float((2 * r - 1).abs().mean()) for r in hidden), default=0.0)

    def against(self, now: View, before: View) -> float:
        """See the class."""
        rates, earlier = now.activation_rates, before.activation_rates
        if {n: r.shape for n, r in rates.items()} != {n: r.shape for n, r in earlier.items()}:
            return math.inf
        names = list(rates)[:-1]
        return max((float((rates[n] - earlier[n]).abs().mean()) for n in names), default=0.0)
