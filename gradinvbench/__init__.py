"""What federated learning leaks: share an update, invert it, measure what was recovered.

>>> import gradinvbench as gib
>>> target, truth = gib.share(model, images, labels, defense="clip:1")  # any nn.Module
>>> found = gib.invert(target, attack="spectral", iterations=500)  # never sees the truth
>>> print(gib.evaluate(found, truth))

Everything that a user needs is a name of this package. Names are imported when they are
first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gradinvbench._shadowing import check_packages

if TYPE_CHECKING:
    from attack.attacks import Attack, OptimizationAttack, register_attack
    from attack.metrics import Evaluation, register_metric
    from attack.reconstruction import Reconstruction
    from attack.settings import InversionConfig as Settings
    from audit.decision import Verdict, decide
    from core.data.given import GivenData
    from core.data.records import Table
    from core.data.records import load_table as table
    from core.data.specs import DataSpec
    from core.data.text import text_data
    from core.errors import InputError
    from core.losses import (
        BinaryCrossEntropy,
        CrossEntropy,
        Dice,
        GivenLoss,
        Loss,
        MeanAbsoluteError,
        MeanSquaredError,
        PixelCrossEntropy,
        SumOfHeads,
        register_loss,
    )
    from core.models.architecture import Architecture, GivenModel
    from core.models.building import ModelSpec
    from core.target import LocalTraining, Target, Truth
    from core.version import __version__
    from federated.phantoms.findings import chest_phantoms
    from gradients.defenses import ClientView, Defense, Gradient, register_defense
    from gradients.shared_update import SharedUpdate, read_update
    from gradinvbench._audit import Audit, audit
    from gradinvbench._catalogue import attacks, defenses, losses, metrics
    from gradinvbench._evaluate import evaluate
    from gradinvbench._files import load_target, save_target
    from gradinvbench._invert import invert
    from gradinvbench._received import target_from_update
    from gradinvbench._share import share

__all__ = [
    "Architecture",
    "Attack",
    "Audit",
    "BinaryCrossEntropy",
    "ClientView",
    "CrossEntropy",
    "DataSpec",
    "Defense",
    "Dice",
    "Evaluation",
    "GivenData",
    "GivenLoss",
    "GivenModel",
    "Gradient",
    "InputError",
    "LocalTraining",
    "Loss",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "ModelSpec",
    "OptimizationAttack",
    "PixelCrossEntropy",
    "Reconstruction",
    "Settings",
    "SharedUpdate",
    "SumOfHeads",
    "Table",
    "Target",
    "Truth",
    "Verdict",
    "__version__",
    "attacks",
    "audit",
    "chest_phantoms",
    "decide",
    "defenses",
    "evaluate",
    "invert",
    "load_target",
    "losses",
    "metrics",
    "read_update",
    "register_attack",
    "register_defense",
    "register_loss",
    "register_metric",
    "save_target",
    "share",
    "table",
    "target_from_update",
    "text_data",
]

# Where each name is defined, and what it is called there if it differs.
_HOMES = {
    "Architecture": "core.models.architecture",
    "Attack": "attack.attacks",
    "Audit": "gradinvbench._audit",
    "BinaryCrossEntropy": "core.losses",
    "ClientView": "gradients.defenses",
    "CrossEntropy": "core.losses",
    "DataSpec": "core.data.specs",
    "Defense": "gradients.defenses",
    "Dice": "core.losses",
    "Evaluation": "attack.metrics",
    "GivenLoss": "core.losses",
    "GivenData": "core.data.given",
    "GivenModel": "core.models.architecture",
    "Gradient": "gradients.defenses",
    "InputError": "core.errors",
    "LocalTraining": "core.target",
    "Loss": "core.losses",
    "MeanAbsoluteError": "core.losses",
    "MeanSquaredError": "core.losses",
    "ModelSpec": "core.models.building",
    "OptimizationAttack": "attack.attacks",
    "PixelCrossEntropy": "core.losses",
    "Reconstruction": "attack.reconstruction",
    "Settings": "attack.settings:InversionConfig",
    "SharedUpdate": "gradients.shared_update",
    "SumOfHeads": "core.losses",
    "Table": "core.data.records",
    "Target": "core.target",
    "Truth": "core.target",
    "Verdict": "audit.decision",
    "__version__": "core.version",
    "attacks": "gradinvbench._catalogue",
    "audit": "gradinvbench._audit",
    "chest_phantoms": "federated.phantoms.findings",
    "decide": "audit.decision",
    "defenses": "gradinvbench._catalogue",
    "evaluate": "gradinvbench._evaluate",
    "invert": "gradinvbench._invert",
    "load_target": "gradinvbench._files",
    "losses": "gradinvbench._catalogue",
    "metrics": "gradinvbench._catalogue",
    "read_update": "gradients.shared_update",
    "register_attack": "attack.attacks",
    "register_defense": "gradients.defenses",
    "register_loss": "core.losses",
    "register_metric": "attack.metrics",
    "save_target": "gradinvbench._files",
    "share": "gradinvbench._share",
    "table": "core.data.records:load_table",
    "target_from_update": "gradinvbench._received",
    "text_data": "core.data.text",
}

check_packages()


def _find(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, called = _HOMES[name].partition(":")
    value: object = getattr(importlib.import_module(module), called or name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:
    # A type checker reads the imports above and finds misspelt names.
    __getattr__ = _find


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
