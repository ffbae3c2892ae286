"""Similarities as NVFlare components, for code that logs or listens to events from them."""

from __future__ import annotations

from collections.abc import Sequence

from nvflare.apis.fl_component import FLComponent

from audit import similarity


class SimMetric(similarity.SimMetric, FLComponent):
    """See `audit.similarity.SimMetric`; `log_info` and its like are NVFlare's."""

    def __init__(self) -> None:
        FLComponent.__init__(self)


class ImageSimMetric(similarity.ImageSimMetric, SimMetric):
    """See `audit.similarity.ImageSimMetric`."""

    def __init__(self, metrics: str | Sequence[str] | None = None) -> None:
        FLComponent.__init__(self)
        similarity.ImageSimMetric.__init__(self, metrics)
