"""Malicious servers: what each does to the model that it sends, one file each.

Every file of this folder is imported, so that what it registers is known by its kind; what a kind
means on the command line and in a checkpoint is said in `core.models.malicious`.
"""

import importlib
import pkgutil

from gradients.servers.base import (
    MaliciousServer,
    Means,
    get_server,
    register_server,
    server_names,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MaliciousServer", "Means", "get_server", "register_server", "server_names"]
