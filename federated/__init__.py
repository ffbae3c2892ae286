"""The measurement of leakage inside a live federation of NVFlare clients.

The components of a job, by the names that its JSON files use. Those that are NVFlare
components are imported when they are asked for, so that what needs no NVFlare (images,
phantoms, inversion, figures) works without it.
"""

from __future__ import annotations

import importlib
from typing import Any

_COMPONENTS = {
    "AuditFilter": "federated.flare.audit_filter",
    "CXRLearner": "federated.flare.learner",
    "GaussianPrivacy": "federated.flare.gaussian_privacy",
    "GradInversionInverter": "federated.flare.inverter",
    "ImageSimMetric": "audit.similarity",
    "Inverter": "federated.flare.inverter",
    "ReceivedModelFilter": "federated.flare.received_filter",
    "RelativeDataLeakageValueFilter": "federated.flare.rdlv_filter",
    "SimMetric": "audit.similarity",
}

__all__ = sorted(_COMPONENTS)


def __getattr__(name: str) -> Any:
    """The component of this name.

    Raises:
        InputError: It is an NVFlare component, and NVFlare is not installed.
    """
    if name not in _COMPONENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_COMPONENTS[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "nvflare":
            raise
        from core.errors import InputError

        raise InputError(
            f"federated.{name} needs NVFlare: pip install 'gradinvbench[federated]'"
        ) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_COMPONENTS])
