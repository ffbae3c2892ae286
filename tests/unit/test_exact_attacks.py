"""Closed forms and exact recovery: nothing but rounding is left, or a sentence says why not."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from attack.attacks import get_attack
from attack.attacks.fishing import fished_target
from attack.attacks.parts.first_layer import first_layer
from attack.attacks.spear import Pool, Spear, SpearDescent, factorize, rest_of_space, trim
from attack.cli.command import main
from attack.metrics import assign, psnr
from attack.reconstruction import Reconstruction
from core.errors import InputError, exit_status
from core.models.building import ModelSpec, register_model
from core.target import LocalTraining, Target, Truth
from gradients.checkpoint import save_target
from tests.attack_targets import CNN, LENET, malicious_target
from tests.targets import make_target

CPU = torch.device("cpu")
MLP = ModelSpec("mlp", 10, 8, width=128)
VIT = ModelSpec("vit_tiny", 10, 16, width=96)


@register_model("test-mlp-normalised")
def _normalised(spec: ModelSpec) -> nn.Module:
    """A classifier that shifts and scales its input by itself, per channel."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.tensor([0.1, 0.2, -0.3])
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


@register_model("test-mlp-sigmoid")
def _sigmoid(spec: ModelSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Sigmoid(), nn.Linear(64, 10))


@register_model("test-mlp-without-bias")
def _without_bias(spec: ModelSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32, bias=False), nn.ReLU(), nn.Linear(32, 10))


def attack(name: str, target: Target, truth: Truth, seed: int = 0) -> Reconstruction:
    found = get_attack(name)().reconstruct(target, labels=truth.labels, device=CPU, seed=seed)
    assert torch.isfinite(found.images).all()
    return found


def decibels(found: Reconstruction, truth: Truth) -> torch.Tensor:
    return psnr(found.images[assign(found.images, truth.images)], truth.images)


def with_gradient(target: Target, change: dict[str, torch.Tensor]) -> Target:
    return dataclasses.replace(target, gradient={**target.gradient, **change})


def zeroed(target: Target) -> Target:
    return with_gradient(target, {n: torch.zeros_like(g) for n, g in target.gradient.items()})


def noisy(target: Target, size: float = 1e-3) -> Target:
    torch.manual_seed(1)
    noise = {n: g + size * torch.randn_like(g) for n, g in target.gradient.items()}
    return with_gradient(target, noise)


@pytest.mark.parametrize("batch", [1, 2])
def test_analytic_is_exact(batch: int) -> None:
    target, truth = make_target(MLP, batch)
    assert decibels(attack("analytic", target, truth), truth).min() == 100


def test_analytic_undoes_a_normalisation_in_front() -> None:
    target, truth = make_target(ModelSpec("test-mlp-normalised", 10, 8), 1)
    assert decibels(attack("analytic", target, truth), truth).min() == 100


def test_analytic_sees_through_local_steps_on_one_image() -> None:
    target, truth = make_target(MLP, 1, local=LocalTraining(epochs=3, lr=0.1))
    assert decibels(attack("analytic", target, truth), truth).min() == 100


def test_analytic_averages_noise() -> None:
    target, truth = make_target(MLP, 1)
    size = 1e-2 * float(target.gradient["1.bias"].abs().max())
    single = target.gradient["1.weight"] / target.gradient["1.bias"][:, None]
    assert torch.isfinite(single).any()
    found = attack("analytic", noisy(target, size), truth)
    assert 15 < decibels(found, truth).min() < 60


def test_missing_images_are_shown_in_the_mean_colour() -> None:
    target, truth = make_target(dataclasses.replace(MLP, width=2), 8)
    found = attack("analytic", target, truth)
    assert found.details["solved"] < 8
    mean = torch.tensor(target.data.mean).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(found.images[-1], mean)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["spear", "spear-descent"])
def test_spear_recovers_the_batch_and_its_labels(name: str, double: bool) -> None:
    target, truth = make_target(MLP, 8, double=double)
    found = attack(name, target, truth)
    order = assign(found.images, truth.images)
    assert psnr(found.images[order], truth.images).min() > (99 if double else 60)
    assert torch.equal(found.labels[order], truth.labels)
    assert found.details["exact"]
    assert found.status == "finished"


def test_descent_recovers_what_sampling_would_take_hours_for() -> None:
    target, truth = make_target(ModelSpec("mlp", 10, 16, width=256), 24)
    assert decibels(attack("spear-descent", target, truth), truth).min() > 60


@pytest.mark.parametrize("kind", [Spear, SpearDescent])
def test_spear_is_seeded(kind: type[Spear]) -> None:
    target, truth = make_target(MLP, 4)
    runs = [attack(kind.name, target, truth, seed=3).images for _ in range(2)]
    assert torch.equal(*runs)


def test_spear_returns_when_its_time_is_up() -> None:
    target, truth = make_target(ModelSpec("mlp", 10, 16, width=64), 30)
    found = Spear(0.5).reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    assert found.status == "time"
    assert not found.details["exact"]
    assert found.seconds < 30


def test_rest_of_space_points_to_the_unknown_direction() -> None:
    target, _ = make_target(MLP, 6)
    factors = factorize(first_layer(target, "test", CPU), torch.float64)
    pool = Pool(factors)
    pool.add(SpearDescent().search(factors, pool, torch.Generator().manual_seed(0), 0))
    true = pool.directions[pool.basis()]
    assert len(true) == 6
    rest = rest_of_space(factors, true[:5])
    assert rest is not None
    assert rest.shape == (6, 1)
    assert abs(float(rest[:, 0] @ true[5])) > 0.9
    assert rest_of_space(factors, true) is None


def test_trimming_turns_a_nearly_right_direction_into_the_exact_one() -> None:
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(120, 6, dtype=torch.float64))[0]
    true = torch.nn.functional.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    # Half of the neurons are off for this image.
    left[:60] -= (left[:60] @ true)[:, None] * true
    near = torch.nn.functional.normalize(true + 0.02 * torch.randn(6, dtype=torch.float64), dim=0)
    assert abs(float(near @ true)) < 1 - 1e-5
    assert abs(float(trim(left, near[None])[0] @ true)) > 1 - 1e-12


def test_pool_keeps_every_direction_once() -> None:
    target, _ = make_target(MLP, 4)
    factors = factorize(first_layer(target, "test", CPU), torch.float64)
    pool = Pool(factors)
    search = SpearDescent().search(factors, pool, torch.Generator().manual_seed(0), 0)
    pool.add(search)
    known = len(pool.zeros)
    pool.add(-search)
    assert len(pool.zeros) == known >= 4


def test_a_basis_is_never_larger_than_the_space() -> None:
    """However nearly dependent directions in float32 are, as those of a trained network."""
    target, _ = make_target(MLP, 4)
    pool = Pool(factorize(first_layer(target, "test", CPU), torch.float32))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 2e-4, 1.1e-4):
        shared = torch.randn(4, generator=generator)
        apart = shared + size * torch.randn(400, 4, generator=generator)
        pool.directions = torch.nn.functional.normalize(apart, dim=1)
        pool.zeros = torch.arange(400)
        chosen = pool.directions[pool.basis()]
        assert len(chosen) <= 4
        assert int(torch.linalg.matrix_rank(chosen.double(), tol=1e-9)) == len(chosen)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_r_gap_on_a_chain(double: bool) -> None:
    target, truth = make_target(ModelSpec("cnn6", 10, 8, width=6), 1, double=double)
    found = attack("r-gap", target, truth)
    assert decibels(found, truth).min() > (99 if double else 40)
    assert found.details["ra_index"] < 0


def test_r_gap_loses_where_the_rank_analysis_says_so() -> None:
    target, truth = make_target(ModelSpec("cnn6", 10, 16, width=2), 1)
    found = attack("r-gap", target, truth)
    assert found.details["ra_index"] > 0
    assert decibels(found, truth).max() < 40


@pytest.mark.parametrize(
    ("name", "arch"),
    [("patch-projection", "vit_tiny"), ("patch-projection", "vit_april"), ("april", "vit_april")],
)
def test_embedding_of_a_vision_transformer(name: str, arch: str) -> None:
    target, truth = make_target(dataclasses.replace(VIT, arch=arch), 1)
    assert decibels(attack(name, target, truth), truth).min() == 100


@pytest.mark.parametrize("train_mode", [False, True])
def test_imprint_block_gives_every_image_away(train_mode: bool) -> None:
    target, truth = malicious_target(CNN, 8, "imprint:512", train_mode=train_mode)
    assert decibels(attack("robbing-the-fed", target, truth), truth).min() > 60


def test_images_of_equal_brightness_share_a_bin() -> None:
    target, truth = malicious_target(CNN, 8, "imprint:2", train_mode=False)
    found = attack("robbing-the-fed", target, truth)
    assert found.details["filled_bins"] <= 2
    assert decibels(found, truth).max() < 60


def test_fishing_isolates_one_image_of_the_batch() -> None:
    target, truth = malicious_target(LENET, 4, "fishing:2", train_mode=False)
    alone = fished_target(target, "fishing")
    inputs = target.data.normalize(truth.images[2:3].double())
    model = target.build_model().double()
    loss = nn.functional.cross_entropy(model(inputs), torch.tensor([2]))
    named = dict(model.named_parameters())
    exact = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for name, gradient in alone.gradient.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-6, atol=1e-12)


def fished_gain(malicious: str, labels: list[int]) -> tuple[list[int], float]:
    """Which images come nearest to what was fished, and the best PSNR among them."""
    target, truth = malicious_target(LENET, len(labels), malicious, train_mode=False, labels=labels)
    config = get_attack("fishing").published.changed(iterations=100)
    run = get_attack("fishing")(config).reconstruct
    found = run(target, labels=torch.tensor(labels), device=CPU, seed=0)
    fished = found.images[: found.details["solved"]]
    table = torch.stack([psnr(image.expand_as(truth.images), truth.images) for image in fished])
    return table.argmax(1).tolist(), float(table.max())


def test_a_feature_isolates_one_of_several_images_of_the_class() -> None:
    labels = [2] * 4
    mixed, best_of_mixed = fished_gain("fishing:2", labels)
    by_number, first = fished_gain("fishing-feature:2:0", labels)
    by_logit, second = fished_gain("fishing-feature:2:logit:0.447", labels)
    assert len(mixed) == 4
    assert by_number == [3]
    assert by_logit == [0]
    assert min(first, second) > best_of_mixed + 8


def test_the_other_classes_stay_silent_below_the_cut() -> None:
    # By rising logit: image 0 of another class, image 1 of the class, the cut, the others.
    labels = [1, 2, 2, 2, 2, 2, 2, 2]
    malicious = "fishing-feature:2:logit:0.46"
    target, truth = malicious_target(LENET, 8, malicious, train_mode=False, labels=labels)
    alone = fished_target(target, "fishing")
    assert alone.batch_size == 1
    model = target.build_model().double()
    model.load_state_dict(alone.state_dict)
    inputs = target.data.normalize(truth.images[1:2].double())
    loss = nn.functional.cross_entropy(model(inputs), torch.tensor([2]))
    named = dict(model.named_parameters())
    exact = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for name, gradient in alone.gradient.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-4)


def test_a_feature_that_the_last_layer_lacks() -> None:
    with pytest.raises(InputError, match="no feature 999"):
        malicious_target(LENET, 2, "fishing-feature:2:999", train_mode=False)


def _unsuitable() -> dict[str, tuple[str, Target, str]]:
    mlp, _ = make_target(MLP, 1)
    two, _ = make_target(MLP, 2)
    vit, _ = make_target(VIT, 1)
    cnn, _ = make_target(ModelSpec("cnn", 10, 8, width=4), 2, train_mode=True)
    steps = dataclasses.replace(two, local=LocalTraining(epochs=2))
    normalised, _ = make_target(ModelSpec("test-mlp-normalised", 10, 8), 2, train_mode=True)
    sigmoid, _ = make_target(ModelSpec("test-mlp-sigmoid", 10, 8), 2)
    biasless, _ = make_target(ModelSpec("test-mlp-without-bias", 10, 8), 1)
    fished, _ = malicious_target(CNN, 2, "fishing:9", train_mode=False)
    mixed, _ = malicious_target(CNN, 2, "fishing:1", train_mode=True)
    narrow, _ = make_target(dataclasses.replace(VIT, width=32), 1)
    frozen = {n: g for n, g in mlp.gradient.items() if n != "1.bias"}
    return {
        "features": ("analytic", cnn, "sees features"),
        "zero": ("analytic", zeroed(mlp), "is zero"),
        "no bias": ("analytic", biasless, "has no bias"),
        "kept back": ("analytic", dataclasses.replace(mlp, gradient=frozen), "was not shared"),
        "BatchNorm": ("analytic", normalised, "train-mode BatchNorm"),
        "noise": ("spear", noisy(two), "rank"),
        "sigmoid": ("spear-descent", sigmoid, "ReLU"),
        "local steps": ("spear", steps, "one local step"),
        "BatchNorm in the chain": ("r-gap", cnn, "one image"),
        "transformer": ("r-gap", vit, "chain of convolutions"),
        "two images": ("r-gap", two, "one image"),
        "no dead end": ("r-gap", zeroed(mlp), "is zero"),
        "normalised tokens": ("april", vit, "vit_april"),
        "not a transformer": ("patch-projection", mlp, "vision transformer"),
        "few channels": ("patch-projection", narrow, "underdetermined"),
        "honest front": ("robbing-the-fed", mlp, "no imprint block"),
        "honest end": ("fishing", mlp, "is honest"),
        "no such class": ("fishing", fished, "no image of the class"),
        "mixing": ("fishing", mixed, "mixes"),
    }


unsuitable = functools.cache(_unsuitable)
REASONS = [
    "features", "zero", "no bias", "kept back", "BatchNorm", "noise", "sigmoid", "local steps",
    "BatchNorm in the chain", "transformer", "two images", "no dead end", "normalised tokens",
    "not a transformer", "few channels", "honest front", "honest end", "no such class", "mixing",
]  # fmt: skip


def test_every_reason_is_tested() -> None:
    assert list(unsuitable()) == REASONS


@pytest.mark.parametrize("reason", REASONS)
def test_unsuitable_targets_are_named(reason: str) -> None:
    name, target, sentence = unsuitable()[reason]
    labels = torch.arange(target.batch_size)
    with pytest.raises(InputError, match=sentence) as caught:
        get_attack(name)().reconstruct(target, labels=labels, device=CPU, seed=0)
    assert f"--attack {name}" in str(caught.value)


@pytest.mark.parametrize("name", ["analytic", "spear-descent"])
def test_from_the_command_line(name: str, tmp_path: Path) -> None:
    target, truth = make_target(MLP, 2)
    save_target(tmp_path / "mlp.tar", target, truth)
    words = ["--attack", name, "--checkpoint", str(tmp_path / "mlp.tar"), "--metric", "--cpu"]
    words += ["--root", str(tmp_path), "--quiet", "--time-budget", "30"]
    assert exit_status(functools.partial(main, words)) == 0
    record = json.loads((tmp_path / "test" / "record.json").read_text())
    assert record["attack"] == name
    assert all(image["psnr"] == 100 for image in record["evaluation"]["per_image"])


def test_the_malicious_model_travels_with_the_checkpoint(tmp_path: Path) -> None:
    target, truth = malicious_target(CNN, 4, "imprint:256", train_mode=True)
    save_target(tmp_path / "imprinted.tar", target, truth)
    words = ["--attack", "robbing-the-fed", "--checkpoint", str(tmp_path / "imprinted.tar")]
    words += ["--root", str(tmp_path), "--quiet", "--metric", "--cpu"]
    assert exit_status(functools.partial(main, words)) == 0
    record = json.loads((tmp_path / "test" / "record.json").read_text())
    assert min(image["psnr"] for image in record["evaluation"]["per_image"]) > 60


@pytest.mark.parametrize(
    "text",
    [
        "imprint",
        "imprint:1",
        "fishing:10",
        "fishing:-1",
        "poison:3",
        "fishing:2:1",
        "fishing-feature",
        "fishing-feature:2:mean",
        "fishing-feature:2:1:nan",
        "fishing-feature:2:1:0.5:1",
        "fishing-feature:10",
    ],
)
def test_malicious_flag_is_checked(text: str) -> None:
    from core.models.malicious import parse_malice

    with pytest.raises(InputError, match="--malicious"):
        parse_malice(text, 10)


@pytest.mark.parametrize(("threat", "status"), [("honest-server", 2), ("malicious-server", 0)])
def test_a_changed_model_takes_a_malicious_server(
    threat: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, truth = malicious_target(CNN, 4, "imprint:256", train_mode=True)
    save_target(tmp_path / "imprinted.tar", target, truth)
    words = ["--attack", "robbing-the-fed", "--checkpoint", str(tmp_path / "imprinted.tar")]
    words += ["--root", str(tmp_path), "--quiet", "--cpu", "--threat", threat]
    assert exit_status(functools.partial(main, words)) == status
    if status:
        assert "the server may change the model it sends" in capsys.readouterr().err
