"""Whether another package hides one of ours: `training` and `core` are common names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
ROOMS = ("core", "training", "gradients", "attack", "audit")


def check_packages() -> None:
    """Refuse to start where Python would import another package than ours.

    Raises:
        ImportError: Names the package and where the other one lies.
    """
    for room in ROOMS:
        place = _place(room)
        if place is None:
            raise ImportError(f"gradinvbench's package {room} is missing; install it again")
        if place != HOME / room:
            raise ImportError(
                f"gradinvbench's package {room} is hidden by another one of that name, {place}; "
                "run Python from another folder, or rename or uninstall the other package"
            )


def _place(name: str) -> Path | None:
    """The package's folder (or the module's file); None where there is neither."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    if spec.origin is not None and not folders:
        return Path(spec.origin).resolve()
    return Path(folders[0]).resolve() if folders else None
