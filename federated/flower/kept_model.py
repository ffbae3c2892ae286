"""The global model of the round before, which a site keeps: Flower's apps remember nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.array_files import read_arrays
from core.errors import InputError
from core.storage import atomic_file
from federated.flower.records import Arrays

KEPT = "received_before.npz"


def exchanged(path: Path, received: Arrays) -> Arrays | None:
    """Keep the model that came in.

    Args:
        path: Where it is kept; its folder exists.
        received: The model's arrays by name.

    Returns:
        The one that was kept before; None where there is none that can be read.
    """
    before = _read(path)
    with atomic_file(path) as file:
        # By place: names may hold what a file's name cannot.
        np.savez(file, np.array(list(received)), *received.values())
    return before


def _read(path: Path) -> Arrays | None:
    try:
        held = read_arrays(path)
        return {str(name): held[f"arr_{i + 1}"] for i, name in enumerate(held["arr_0"])}
    except (InputError, KeyError):
        return None
