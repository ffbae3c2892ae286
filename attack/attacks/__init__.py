"""Published attacks, one file each, and this project's own."""

from attack.attacks.analytic import Analytic
from attack.attacks.auto import Auto
from attack.attacks.base import (
    Attack,
    OptimizationAttack,
    attack_names,
    get_attack,
    register_attack,
)
from attack.attacks.inverting_gradients import InvertingGradients
from attack.attacks.spear import Spear, SpearDescent
from attack.attacks.spectral import Spectral

__all__ = [
    "Analytic",
    "Attack",
    "Auto",
    "InvertingGradients",
    "OptimizationAttack",
    "Spear",
    "SpearDescent",
    "Spectral",
    "attack_names",
    "get_attack",
    "register_attack",
]
