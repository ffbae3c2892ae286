"""Priors that leave the contrast of images alone where BatchNorm hides it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.attacks import get_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.loop.inversion import Inversion
from attack.loop.many_targets import ManyInversions
from attack.metrics import evaluate
from attack.priors.contrast import hidden_contrast, without_contrast
from attack.priors.regularizers import AnisotropicTV
from core.data.data_sets import load_data, take_samples
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from tests.targets import make_target, share_images

CPU = torch.device("cpu")
VERSIONS = ("spectral", "spectral-2")
CNN = ModelSpec("cnn", 10, 16, width=8)


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def total_variation(x: torch.Tensor) -> torch.Tensor:
    return AnisotropicTV()(x).sum()


def contrast(x: torch.Tensor) -> torch.Tensor:
    """Length of what is left of an image without the mean of each channel."""
    return (x - x.mean((2, 3), keepdim=True)).square().sum().sqrt()


def test_it_is_the_gradient_relative_to_the_contrast() -> None:
    """Total variation over contrast does not see contrast: its gradient has none along it."""
    both = images(2)
    plain, relative = [], []
    for image in both.split(1):
        x = image.requires_grad_()
        plain += torch.autograd.grad(total_variation(x), x)
        (slope,) = torch.autograd.grad(total_variation(x) / contrast(x), x)
        relative.append(slope * contrast(x).detach())
    found = without_contrast(torch.cat(plain), both)
    torch.testing.assert_close(found, torch.cat(relative))
    assert not torch.allclose(found, torch.cat(plain))


def test_images_without_contrast_and_signals_are_taken() -> None:
    gradient, flat = images(2), torch.ones(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(without_contrast(gradient, flat), gradient)
    signals = gradient.flatten(2)
    assert without_contrast(signals, signals.roll(1, 2)).shape == signals.shape


GROUP_NORM = ModelSpec("cnn", 10, 16, width=8, norm="group")


@pytest.mark.parametrize(
    ("spec", "train_mode", "batch", "groups", "hidden"),
    [
        (CNN, True, 1, None, [True]),
        (CNN, True, 4, None, None),
        (CNN, True, 4, [1, 2, 1], [True, False, False, True]),
        (CNN, True, 4, [2, 2], None),
        (CNN, False, 1, None, None),
        (GROUP_NORM, True, 1, None, None),
        (ModelSpec("lenet", 10, 16), True, 1, None, None),
    ],
)
def test_whose_contrast_is_hidden(
    spec: ModelSpec,
    train_mode: bool,
    batch: int,
    groups: list[int] | None,
    hidden: list[bool] | None,
) -> None:
    assert hidden_contrast(build_model(spec).train(train_mode), batch, groups) == hidden


def inversion(made: tuple[Target, Truth], iterations: int, name: str) -> Inversion:
    attack = get_attack(name)
    assert issubclass(attack, OptimizationAttack)
    config = attack.published.changed(iterations=iterations)
    target, truth = made
    return attack(config).inversion(target, labels=truth.labels, device=CPU, seed=1)


@pytest.mark.parametrize(("batch", "train_mode"), [(2, True), (1, False)])
def test_where_nothing_is_hidden_nothing_changes(batch: int, train_mode: bool) -> None:
    made = make_target(CNN, batch, train_mode=train_mode)
    old, new = (inversion(made, 12, name).run() for name in VERSIONS)
    assert torch.equal(old.images, new.images)


def test_only_the_images_that_are_alone_are_kept() -> None:
    """Two processes of a client, of which one has a single image."""
    made = make_target(CNN, 3, train_mode=True, shards=(1, 2))
    old, new = (inversion(made, 2, name) for name in VERSIONS)
    x = old.problem.inputs(old.restarts[0])
    (_, before), (_, after) = (each.evaluation.prior(x, None) for each in (old, new))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after[:1], without_contrast(before[:1], x[:1]))
    assert torch.equal(after[1:], before[1:])


def photographs(n: int) -> list[tuple[Target, Truth]]:
    """Targets of one photograph each at 16 px, through the same network."""
    data = load_data("photo-patches", image_size=16)
    wide = dataclasses.replace(CNN, width=16)
    base, _ = make_target(wide, 1, train_mode=True, double=False)
    base = dataclasses.replace(base, data=data.spec)
    batches = [take_samples(data.train_plain, [number], data.spec) for number in range(n)]
    return [
        (share_images(base, images, labels), Truth(images, labels)) for images, labels in batches
    ]


def test_photographs_do_not_fade_in_train_mode() -> None:
    made = photographs(4)
    similarity = {}
    for name in VERSIONS:
        found = ManyInversions([inversion(each, 300, name) for each in made]).run()
        scores = [
            evaluate(each.images, truth.labels, truth, metrics=["ssim"]).summary()["ssim"]["mean"]
            for each, (_, truth) in zip(found, made, strict=True)
        ]
        similarity[name] = sum(float(score or 0) for score in scores) / len(scores)
    assert similarity["spectral-2"] > similarity["spectral"] + 0.1
