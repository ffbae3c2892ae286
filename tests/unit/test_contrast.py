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
from attack.priors.contrast import (
    hidden_contrast,
    natural_length,
    with_length,
    without_contrast,
)
from attack.priors.regularizers import AnisotropicTV
from core.data.data_sets import load_data, take_samples
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from tests.targets import make_target, share_images

CPU = torch.device("cpu")
VERSIONS = ("spectral", "spectral-2", "spectral-3")
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
    old, *new = (inversion(made, 12, name).run() for name in VERSIONS)
    assert all(torch.equal(old.images, each.images) for each in new)


def test_only_the_images_that_are_alone_are_kept() -> None:
    """Two processes of a client, of which one has a single image."""
    made = make_target(CNN, 3, train_mode=True, shards=(1, 2))
    old, new = (inversion(made, 2, name) for name in VERSIONS[:2])
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
    similarity, quality = {}, {}
    for name in VERSIONS:
        found = ManyInversions([inversion(each, 300, name) for each in made]).run()
        scores = [
            evaluate(each.images, truth.labels, truth, metrics=["ssim", "psnr"]).summary()
            for each, (_, truth) in zip(found, made, strict=True)
        ]
        for metric, means in (("ssim", similarity), ("psnr", quality)):
            means[name] = sum(float(each[metric]["mean"] or 0) for each in scores) / len(scores)
    assert similarity["spectral-2"] > similarity["spectral"] + 0.1
    assert similarity["spectral-3"] > similarity["spectral"] + 0.1
    assert quality["spectral-3"] > quality["spectral"] + 2


def test_the_gradient_of_a_multiple_of_a_single_image_is_the_same() -> None:
    """What `spectral-3` rests on: padding, bias and all."""
    for spec, batch in [
        (CNN, 1),
        (ModelSpec("resnet18", 10, 16, "cifar", width=4), 1),
        (GROUP_NORM, 2),
    ]:
        target, truth = make_target(spec, batch, train_mode=True)
        found = inversion((target, truth), 1, "spectral-3")
        matcher = found.matcher
        x = target.data.normalize(truth.images)
        values = [float(matcher.value(x.to(found.dtype) * a, truth.labels)) for a in (1, 0.5, 2)]
        assert max(values) < 1e-4


def test_images_end_at_the_scale_of_photographs() -> None:
    made = make_target(CNN, 1, train_mode=True)
    old, new = (inversion(made, 12, name).run() for name in ("spectral", "spectral-3"))
    normalize = made[0].data.normalize
    faint, scaled = normalize(old.images.double()), normalize(new.images.double())
    # Where the box does not cut, one is a multiple of the other.
    inside = (new.images > 0.001) & (new.images < 0.999)
    factor = natural_length(made[0].data) / faint.square().mean().sqrt()
    torch.testing.assert_close(scaled[inside], factor * faint[inside], rtol=1e-3, atol=1e-3)


def test_behind_group_norm_every_image_is_scaled() -> None:
    target, truth = make_target(GROUP_NORM, 3)
    found = inversion((target, truth), 2, "spectral-3")
    restart = found.restarts[0]
    scaled = found._naturally_scaled(found.problem.found(restart), restart)
    lengths = scaled.square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, natural_length(target.data)))


def test_a_scale_that_shows_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective of what is scaled, which is asked for last, is a tenth larger."""
    made = make_target(CNN, 1, train_mode=True)
    shown = inversion(made, 12, "spectral-3")
    values = iter([1.0, 1.1])
    monkeypatch.setattr(shown.matcher, "value", lambda *_: torch.tensor(next(values)))
    plain = inversion(made, 12, "spectral").run()
    assert torch.equal(shown.run().images, plain.images)


def test_natural_length_is_that_of_standardised_photographs() -> None:
    data = dataclasses.replace(make_target(CNN, 1)[0].data, mean=(0.45,) * 3, std=(0.25,) * 3)
    assert natural_length(data) == pytest.approx(0.8)
    raw = dataclasses.replace(data, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert natural_length(raw) == pytest.approx(0.8 * (0.45**2 + 0.25**2) ** 0.5)


def test_only_the_chosen_images_are_scaled() -> None:
    both = images(2)
    found = with_length(both, 0.5, [True, False])
    assert float(found[0].square().mean().sqrt()) == pytest.approx(0.5)
    assert torch.equal(found[1], both[1])
    torch.testing.assert_close(found[0] / both[0], (found[0] / both[0]).mean().expand(3, 6, 5))
