"""Statistics of the weights."""

from __future__ import annotations

import math

from audit.detectors.base import TINY, Detector, View, log_ratio, register_detector


@register_detector
class Weights(Detector):
    """How far weights are from where a training leaves them.

    By itself: over the matrices, the largest |log10(s sqrt(d))|; s is the root mean square of a
    matrix's elements and d its number of inputs: initialisations that keep variances make it a
    constant near 0, and training moves it little.

    Against the round before: over all parameters, the largest |change| / |before|, both as root
    mean squares; of a parameter that was near zero the mean over all stands in its place. A
    parameter that was not there makes it infinite.

    Source: norms of the update by layer are what audits of a server's model start with, as in
        Garov et al., "Hiding in Plain Sight", ICLR 2024, section 3,
        https://arxiv.org/abs/2306.03013.
    """

    name = "weights"

    def alone(self, now: View) -> float:
        """See the class."""
        sizes = (
            log_ratio(float(w.square().mean().sqrt()) * math.sqrt(w.shape[1]), 1.0)
            for w in now.matrices.values()
        )
        return max(map(abs, sizes), default=0.0)

    def against(self, now: View, before: View) -> float:
        """See the class."""
        shapes = [{n: w.shape for n, w in view.weights.items()} for view in (now, before)]
        if shapes[0] != shapes[1]:
            return math.inf
        sizes = {n: float(w.square().mean().sqrt()) for n, w in before.weights.items()}
        usual = sum(sizes.values()) / max(len(sizes), 1)
        changes = {
            n: float((w - before.weights[n]).square().mean().sqrt()) for n, w in now.weights.items()
        }
        return max(
            (changes[n] / max(size, 0.1 * usual, TINY) for n, size in sizes.items()), default=0.0
        )
