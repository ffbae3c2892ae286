"""The similarity metrics by their published module path."""

from federated.similarity import ImageSimMetric, SimMetric

__all__ = ["ImageSimMetric", "SimMetric"]
