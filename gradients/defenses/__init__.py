"""Defenses: what a client does to its update before sharing it.

Each file holds one defense. They are named on the command line and in the
checkpoint by words such as `gaussian:0.01`, and are applied in the order given.
"""

from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    apply_defenses,
    current_name,
    defense_class,
    defense_names,
    parse_defenses,
    register_defense,
)
from gradients.defenses.clip import Clip
from gradients.defenses.freeze import Freeze
from gradients.defenses.gaussian import Gaussian
from gradients.defenses.laplace import Laplace
from gradients.defenses.percentile import Percentile
from gradients.defenses.pipeline import Pipeline, as_transform
from gradients.defenses.prune import Prune
from gradients.defenses.quantize import Quantize
from gradients.defenses.sign import Sign
from gradients.defenses.soteria import Soteria
from gradients.defenses.topk import TopK

__all__ = [
    "ClientView",
    "Clip",
    "Defense",
    "Freeze",
    "Gaussian",
    "Gradient",
    "Laplace",
    "Percentile",
    "Pipeline",
    "Prune",
    "Quantize",
    "Sign",
    "Soteria",
    "TopK",
    "apply_defenses",
    "as_transform",
    "current_name",
    "defense_class",
    "defense_names",
    "parse_defenses",
    "register_defense",
]
