"""Modules of the user's own that add schemes, models, defenses, attacks or metrics."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from core.errors import InputError


def import_from_here(name: str) -> ModuleType:
    """Import a module of the user's from the current folder or the Python path.

    Raises:
        ImportError: It cannot be imported.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        # A script's Python path starts at the repository, not where the user stands.
        sys.path.append(here)
    return importlib.import_module(name)


def import_plugin(name: str | None) -> None:
    """Import the module that `--plugin` names, from the current folder or the Python path.

    Every process of a command imports it, so that what it registers is known to all.

    Raises:
        InputError: There is no such module.
    """
    if name is None:
        return
    try:
        import_from_here(name)
    except ModuleNotFoundError as error:
        raise InputError(f"--plugin {name}: cannot be imported ({error})") from None
