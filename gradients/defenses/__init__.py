"""Defenses: what a client does to its update before sharing it.

Each file holds one defense. They are named on the command line and in the
checkpoint by words such as `gaussian:0.01`, and are applied in the order given.
"""

from gradients.defenses.ats import ATS
from gradients.defenses.base import (
    ClientView,
    Defense,
    Gradient,
    apply_defenses,
    current_name,
    defense_class,
    defense_names,
    encode_batch,
    parse_defenses,
    register_defense,
)
from gradients.defenses.censor import Censor
from gradients.defenses.clip import Clip
from gradients.defenses.dcs2 import DCS2
from gradients.defenses.enclave import Enclave
from gradients.defenses.freeze import Freeze
from gradients.defenses.gaussian import Gaussian
from gradients.defenses.graddefense import GradDefense
from gradients.defenses.instahide import InstaHide
from gradients.defenses.laplace import Laplace
from gradients.defenses.layerdrop import LayerDrop
from gradients.defenses.mixup import MixUp
from gradients.defenses.outpost import Outpost
from gradients.defenses.percentile_noise import Percentile
from gradients.defenses.pipeline import Pipeline, as_transform
from gradients.defenses.precode import Precode
from gradients.defenses.prune import Prune
from gradients.defenses.quantize import Quantize
from gradients.defenses.refiner import Refiner
from gradients.defenses.shadow import Shadow
from gradients.defenses.sign import Sign
from gradients.defenses.soteria import Soteria
from gradients.defenses.svdefense import SVDefense
from gradients.defenses.topk import TopK

__all__ = [
    "ATS",
    "DCS2",
    "Censor",
    "ClientView",
    "Clip",
    "Defense",
    "Enclave",
    "Freeze",
    "Gaussian",
    "GradDefense",
    "Gradient",
    "InstaHide",
    "Laplace",
    "LayerDrop",
    "MixUp",
    "Outpost",
    "Percentile",
    "Pipeline",
    "Precode",
    "Prune",
    "Quantize",
    "Refiner",
    "SVDefense",
    "Shadow",
    "Sign",
    "Soteria",
    "TopK",
    "apply_defenses",
    "as_transform",
    "current_name",
    "defense_class",
    "defense_names",
    "encode_batch",
    "parse_defenses",
    "register_defense",
]
