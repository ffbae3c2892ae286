"""Attack x model x setting: what every attack is tested on, and what it should make of it.

A row names an attack, a setting of `SETTINGS` and the margin in dB of PSNR by which the
attack must beat both guesses that need no gradient, the flat mean colour of each image and
the mean of other images. Margin `FAILS` records a setting that the attack must not win.
To cover another attack, add rows to `CASES`; for a setting of its own, a function to
`SETTINGS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attack.attacks import Attack, OptimizationAttack, get_attack
from attack.labels import recover_labels
from attack.metrics import assign, psnr
from attack.reconstruction import Reconstruction
from gradients.checkpoint import Target, Truth
from tests.targets import make_target, smooth_images
from training.models import ModelSpec

Made = tuple[Target, Truth]

LENET = ModelSpec("lenet", 10, 8, width=8)
CNN = ModelSpec("cnn", 10, 8, width=8)
MLP = ModelSpec("mlp", 10, 8, width=32)
RESNET = ModelSpec("resnet18", 10, 16, stem="cifar", width=8)

# Not above the guesses by more than this: the images are not recovered.
FAILS = None
NOTHING_DB = 1.0


@dataclass(frozen=True)
class Case:
    """One attack on one setting.

    Attributes:
        attack: Its registered name.
        setting: Key of `SETTINGS`.
        margin: Least gain in dB over the better guess; `FAILS` where it should not work.
        changes: Cuts of the published setting (fields of `InversionConfig`, or arguments
            of an attack without one); the fewer, the better.
        labels: Rule of `attack.labels`, or "known"; None: the attack's own.
        why: Why it should fail, or what the row shows.
    """

    attack: str
    setting: str
    margin: float | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    labels: str | None = "known"
    why: str = ""

    def __str__(self) -> str:
        return f"{self.attack}-{self.setting}"


SETTINGS: dict[str, Callable[[], Made]] = {
    # A smooth network, whose gradient determines one image.
    "lenet": lambda: make_target(LENET, 1, double=False),
    "lenet, batch 2": lambda: make_target(LENET, 2, double=False),
    # BatchNorm in train mode: the statistics are those of the batch.
    "cnn, train mode": lambda: make_target(CNN, 2, train_mode=True, double=False),
}

CASES = [
    Case("inverting-gradients", "lenet", 5, {"iterations": 200, "tv": 1e-4}),
    Case("spectral", "lenet", 5, {"iterations": 100}),
    Case("spectral", "cnn, train mode", 1, {"iterations": 100}),
]


def build_attack(case: Case) -> Attack:
    """The attack of a row, cut down as it says."""
    attack = get_attack(case.attack)
    if issubclass(attack, OptimizationAttack):
        return attack(dataclasses.replace(attack.published, **case.changes))
    return attack(**case.changes)


def run_case(case: Case, made: Made) -> Reconstruction:
    """What the attack makes of the target; the truth gives labels only where granted."""
    target, truth = made
    attack = build_attack(case)
    rule = case.labels or getattr(attack, "label_rule", "llg")
    granted = truth.labels if rule == "known" else None
    labels = recover_labels(rule, target, truth_labels=granted)
    return attack.reconstruct(target, labels=labels, device=torch.device("cpu"), seed=0)


def gain(found: Reconstruction, truth: Truth) -> float:
    """Mean PSNR of the assigned reconstructions above that of the better guess, in dB."""
    ordered = found.images[assign(found.images, truth.images)]
    return float(psnr(ordered, truth.images).mean()) - best_guess(truth)


def best_guess(truth: Truth) -> float:
    """PSNR of the better of two guesses: each image's mean colour, the mean of others."""
    flat = truth.images.mean((2, 3), keepdim=True).expand_as(truth.images)
    others = smooth_images(64, truth.images.shape[-1], seed=12345)
    mean = others.mean(0, keepdim=True).expand_as(truth.images)
    return max(float(psnr(guess, truth.images).mean()) for guess in (flat, mean))
