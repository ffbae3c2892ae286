"""Published module path, see `federated.similarity`."""

from federated.similarity import ImageSimMetric, SimMetric

__all__ = ["ImageSimMetric", "SimMetric"]
