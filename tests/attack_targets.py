"""Attack x model x setting: what every attack is tested on, and what it should make of it.

A row names an attack, a setting of `SETTINGS` and the margin in dB of PSNR by which the
attack must beat both guesses that need no gradient, the flat mean colour of each image and
the mean of other images. Margin `FAILS` records a setting that the attack must not win.
To cover another attack, add rows to `CASES`; for a setting of its own, a function to
`SETTINGS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attack.attacks import Attack, OptimizationAttack, get_attack
from attack.attacks.ensemble import EnsembleConfig
from attack.knowledge.labels import recover_labels
from attack.knowledge.threat_models import Capability
from attack.metrics import assign, psnr
from attack.reconstruction import Reconstruction
from core.models.building import ModelSpec
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.malicious_server import tamper
from gradients.received_model import build_received_model
from tests.targets import data_spec, make_target, smooth_images

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
        labels: Rule of `attack.knowledge.labels`, or "known"; None: the attack's own.
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
    "lenet, batch 4": lambda: make_target(LENET, 4, double=False),
    # BatchNorm in train mode: the statistics are those of the batch.
    "cnn, train mode": lambda: make_target(CNN, 2, train_mode=True, double=False),
    # BatchNorm with running statistics, those of many such images.
    "cnn, eval mode": lambda: make_target(CNN, 1, double=False, adapted=True),
    # Federated averaging: two epochs over two batches of one image.
    "lenet, 4 local steps": lambda: make_target(
        LENET, 2, local=LocalTraining(epochs=2, batches=2, lr=0.1), double=False
    ),
}

WIDE = ModelSpec("mlp", 10, 8, width=128)
VIT = ModelSpec("vit_tiny", 10, 16, width=96)

SETTINGS |= {
    "mlp": lambda: make_target(WIDE, 1),
    "mlp, batch 8": lambda: make_target(WIDE, 8),
    "mlp, batch 32": lambda: make_target(MLP, 32),
    "cnn6": lambda: make_target(ModelSpec("cnn6", 10, 8, width=6), 1),
    "vit": lambda: make_target(VIT, 1),
    "vit, bare attention": lambda: make_target(dataclasses.replace(VIT, arch="vit_april"), 1),
    "imprinted": lambda: malicious_target(CNN, 8, "imprint:256", train_mode=True),
    "fished": lambda: malicious_target(LENET, 4, "fishing:2", train_mode=False),
    "fished, one label": lambda: malicious_target(
        LENET, 8, "fishing:2", train_mode=False, labels=[2] * 8
    ),
    # The cut follows from public images; one of this batch lies below.
    "fished by feature, one label": lambda: malicious_target(
        LENET, 8, "fishing-feature:2", train_mode=False, labels=[2] * 8
    ),
}


def malicious_target(
    spec: ModelSpec,
    batch: int,
    malicious: str,
    *,
    train_mode: bool,
    labels: Sequence[int] | None = None,
) -> Made:
    """What clients share of a model that a malicious server changed; labels 0, 1, ... if None."""
    spec = dataclasses.replace(spec, malicious=malicious)
    honest = build_received_model(dataclasses.replace(spec, malicious="")).double()
    data = data_spec(spec.image_size, spec.n_classes)
    given = torch.arange(batch) % spec.n_classes if labels is None else torch.tensor(labels)
    truth = Truth(smooth_images(batch, spec.image_size), given)
    public = data.normalize(smooth_images(200, spec.image_size, seed=7))
    model = tamper(honest, spec, public, batch_size=batch)
    settings = ClientSettings(train_mode=train_mode)
    target = share_update(model, spec, data, truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


CASES = [
    # Exact recovery: the margins say that nothing but rounding is left.
    Case("analytic", "mlp", 60),
    Case("analytic", "mlp, batch 32", FAILS, why="every neuron is active for several images"),
    Case("spear", "mlp, batch 8", 60),
    Case("spear-descent", "mlp, batch 8", 60),
    Case("r-gap", "lenet", 20),
    Case("r-gap", "cnn6", 60),
    Case("patch-projection", "vit", 60),
    Case("april", "vit, bare attention", 60),
    Case("robbing-the-fed", "imprinted", 60),
    Case("inverting-gradients", "lenet", 5, {"iterations": 200, "tv": 1e-4}),
    Case("fishing", "fished", 1, {"iterations": 150}, why="one image of the batch of four"),
    Case("fishing", "fished, one label", FAILS, {"iterations": 100}, why="eight of one label"),
    Case(
        "fishing",
        "fished by feature, one label",
        2,
        {"iterations": 100},
        why="one image of eight, at 40 dB, the others at the guess",
    ),
    Case("spectral", "lenet", 5, {"iterations": 100}),
    Case("spectral", "cnn, train mode", 1, {"iterations": 100}),
    Case("spectral-2", "lenet", 5, {"iterations": 100}),
    Case("spectral-2", "cnn, train mode", 1, {"iterations": 100}),
    Case("spectral-3", "lenet", 5, {"iterations": 100}),
    Case("spectral-3", "cnn, train mode", 1, {"iterations": 100}),
    # Some starts of L-BFGS without a line search get stuck.
    Case("dlg", "lenet", 20, {"iterations": 40, "restarts": 4}, labels=None),
    Case("dlg", "cnn, train mode", FAILS, {"iterations": 5}, why="ReLU has no curvature"),
    Case("idlg", "lenet", 20, {"iterations": 30}, labels=None),
    Case(
        "gradinversion",
        "cnn, eval mode",
        FAILS,
        {"iterations": 100, "restarts": 2},
        labels=None,
        why="the published weight of the gradient is made for ResNet-50 at 224 px",
    ),
    Case(
        "gradinversion",
        "lenet",
        5,
        {"iterations": 200, "restarts": 2, "gradient_weight": 1.0, "bn": 0.0, "warmup": 10},
        labels=None,
    ),
    Case("e2egi", "cnn, train mode", 2, {"iterations": 300, "restarts": 2, "combine_every": 45}),
    Case("modern", "cnn, eval mode", 3, {"iterations": 300}),
    Case(
        "hatamizadeh",
        "cnn, train mode",
        FAILS,
        {"iterations": 100},
        labels=None,
        why="unexplained: weights from 0.001 to 100 do no better on so small a network",
    ),
    Case(
        "hatamizadeh",
        "lenet",
        5,
        {
            "iterations": 200,
            "gradient_weight": 1.0,
            "bn": 0.0,
            "exact_bn": False,
            "warmup": 10,
        },
        labels=None,
    ),
    Case("inverting-gradients-fedavg", "lenet, 4 local steps", 4, {"iterations": 200}),
    Case("data-leakage-fedavg", "lenet, 4 local steps", 4, {"iterations": 250}),
    Case("auto", "lenet", 5, {"config": EnsembleConfig(("spectral", "dlg"), iterations=250)}),
]


def build_attack(case: Case) -> Attack:
    """The attack of a row, cut down as it says."""
    attack = get_attack(case.attack)
    if issubclass(attack, OptimizationAttack):
        return attack(attack.published.changed(**case.changes))
    return attack(**case.changes)


def run_case(
    case: Case,
    made: Made,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Reconstruction:
    """What the attack makes of the target; the truth gives labels only where granted."""
    target, truth = made
    attack = build_attack(case)
    rule = case.labels or getattr(attack, "label_rule", "llg")
    granted = truth.labels if rule == "known" else None
    labels = recover_labels(rule, target, truth_labels=granted)
    if Capability.PRIOR_DATA in attack.requires:
        prior = mean_of_others(truth).expand_as(truth.images)
        return attack.reconstruct(target, labels=labels, device=device, seed=0, prior=prior)
    return attack.reconstruct(target, labels=labels, device=device, seed=0)


def gain(found: Reconstruction, truth: Truth) -> float:
    """Mean PSNR of the assigned reconstructions above that of the better guess, in dB."""
    ordered = found.images[assign(found.images, truth.images)]
    return float(psnr(ordered, truth.images).mean()) - best_guess(truth)


def best_guess(truth: Truth) -> float:
    """PSNR of the better of two guesses: each image's mean colour, the mean of others."""
    flat = truth.images.mean((2, 3), keepdim=True).expand_as(truth.images)
    mean = mean_of_others(truth).expand_as(truth.images)
    return max(float(psnr(guess, truth.images).mean()) for guess in (flat, mean))


def mean_of_others(truth: Truth) -> torch.Tensor:
    """The mean of images of the same kind that are not the client's (1 x C x H x W)."""
    return smooth_images(64, truth.images.shape[-1], seed=12345).mean(0, keepdim=True)
