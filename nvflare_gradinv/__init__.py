"""The published package's names for the components in `federated`.

Job folders that say `nvflare_gradinv.GaussianPrivacy`, and so on, run unchanged.
"""

from __future__ import annotations

from typing import Any

import federated

__all__ = [*federated.__all__]


def __getattr__(name: str) -> Any:
    """The component of this name, from `federated`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(federated, name)
