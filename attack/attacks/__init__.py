"""Published attacks, one file each, and this project's own.

Every file of this folder is imported, so that what it registers is known by its name; a new
attack is a new file.
"""

import importlib
import pkgutil

from attack.attacks.base import Attack, attack_names, get_attack, register_attack
from attack.attacks.optimisation import OptimizationAttack

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Attack", "OptimizationAttack", "attack_names", "get_attack", "register_attack"]
