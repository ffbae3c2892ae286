"""Published attacks, one file each, and this project's own."""

from attack.attacks.analytic import Analytic
from attack.attacks.april import April, PatchProjection
from attack.attacks.base import (
    Attack,
    OptimizationAttack,
    attack_names,
    get_attack,
    register_attack,
)
from attack.attacks.fishing import Fishing
from attack.attacks.inverting_gradients import InvertingGradients
from attack.attacks.r_gap import RGap
from attack.attacks.robbing_the_fed import RobbingTheFed
from attack.attacks.spear import Spear, SpearDescent
from attack.attacks.spectral import Spectral

__all__ = [
    "Analytic",
    "April",
    "Attack",
    "Fishing",
    "InvertingGradients",
    "OptimizationAttack",
    "PatchProjection",
    "RGap",
    "RobbingTheFed",
    "Spear",
    "SpearDescent",
    "Spectral",
    "attack_names",
    "get_attack",
    "register_attack",
]
