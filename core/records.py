"""Provenance: what every result says about how it was made."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import torch
import torchvision

from core.version import __version__


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """Versions, device, threads and seed of this run, as plain values for a JSON record.

    Args:
        device: Device that runs the computation.
        seed: The seed it was started with.
    """
    cuda = device.type == "cuda"
    return {
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "gradinvbench": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if cuda else None,
        },
    }
