"""What a client may notice of a malicious server before it trains: one detector a file.

Every file of this folder is imported, so that what it registers is known by its name; a new
detector is a new file.
"""

import importlib
import pkgutil

from audit.detectors.base import (
    Detector,
    Received,
    View,
    detector_names,
    get_detector,
    register_detector,
    scores_of,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Detector",
    "Received",
    "View",
    "detector_names",
    "get_detector",
    "register_detector",
    "scores_of",
]
