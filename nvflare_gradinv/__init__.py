"""The published package's names for the components in `federated`.

Job folders that say `nvflare_gradinv.GaussianPrivacy`, and so on, run unchanged.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import federated

__all__ = [*federated.__all__]

# NVFlare components here, and plain classes in `federated`, which need no NVFlare.
_COMPONENTS = ("ImageSimMetric", "SimMetric")


def __getattr__(name: str) -> Any:
    """The component of this name, from `federated`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _COMPONENTS and find_spec("nvflare") is not None:
        return getattr(import_module("federated.flare.similarity"), name)
    return getattr(federated, name)
