"""Published module path, see `audit.similarity`."""

from audit.similarity import ImageSimMetric, SimMetric

__all__ = ["ImageSimMetric", "SimMetric"]
