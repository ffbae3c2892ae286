"""The measurement of leakage inside a live federation of Flower clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from federated.flower.audit_mod import AuditMod

__all__ = ["AuditMod"]


def __getattr__(name: str) -> Any:
    """The mod, imported when it is asked for.

    Raises:
        InputError: Flower is not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from federated.flower.audit_mod import AuditMod
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "flwr":
            raise
        from core.errors import InputError

        raise InputError(
            f"federated.flower.{name} needs Flower: pip install 'gradinvbench[flower]'"
        ) from None
    return AuditMod
