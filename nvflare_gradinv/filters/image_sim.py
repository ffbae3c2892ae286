"""Published module path, see `federated.flare.similarity`."""

from federated.flare.similarity import ImageSimMetric, SimMetric

__all__ = ["ImageSimMetric", "SimMetric"]
