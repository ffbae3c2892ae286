"""Published attacks, one file each, and this project's own."""

from attack.attacks.analytic import Analytic
from attack.attacks.april import April, PatchProjection
from attack.attacks.auto import Auto
from attack.attacks.base import (
    Attack,
    OptimizationAttack,
    attack_names,
    get_attack,
    register_attack,
)
from attack.attacks.dlg import DLG
from attack.attacks.e2egi import E2EGI
from attack.attacks.fedavg import DataLeakageFedAvg, InvertingGradientsFedAvg
from attack.attacks.fishing import Fishing
from attack.attacks.gradinversion import GradInversion
from attack.attacks.hatamizadeh import Hatamizadeh
from attack.attacks.idlg import IDLG
from attack.attacks.inverting_gradients import InvertingGradients
from attack.attacks.modern import Modern
from attack.attacks.r_gap import RGap
from attack.attacks.robbing_the_fed import RobbingTheFed
from attack.attacks.spear import Spear, SpearDescent
from attack.attacks.spectral import Spectral

__all__ = [
    "DLG",
    "E2EGI",
    "IDLG",
    "Analytic",
    "April",
    "Attack",
    "Auto",
    "DataLeakageFedAvg",
    "Fishing",
    "GradInversion",
    "Hatamizadeh",
    "InvertingGradients",
    "InvertingGradientsFedAvg",
    "Modern",
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
