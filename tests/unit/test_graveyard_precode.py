"""PRECODE: its bottleneck against its definition, and what its gradients give away."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from attack.attacks.spectral import Spectral
from attack.knowledge.answers import precode
from attack.knowledge.answers.precode import (
    SeenBottleneck,
    inputs_of_head,
    likeliest_noise,
    seen_bottleneck,
)
from attack.knowledge.known_defenses import adapt
from attack.metrics import assign, psnr
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from gradients.checkpoint import load_target, save_target
from gradients.client import ClientSettings, share_update
from gradients.defenses import ClientView, parse_defenses
from gradients.defenses.precode import (
    BottleneckArchitecture,
    bottleneck_of,
    insert_bottleneck,
)
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 16, width=8)
WORDS = "precode:32"


@functools.cache
def shared(batch: int = 2, words: str = WORDS) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    truth = Truth(smooth_images(batch, 16), torch.tensor([3, 7, 1][:batch]))
    settings = ClientSettings(train_mode=False, defenses=parse_defenses(words), dropout_seed=5)
    target = share_update(
        build_model(LENET), LENET, data_spec(16), truth.images, truth.labels, settings
    )
    assert target is not None
    return target, truth


def noise_of(target: Target, truth: Truth) -> torch.Tensor:
    """The noise of the client's pass, from its seed."""
    from gradients.local_update import dropout_masks

    model = target.build_model()
    drawn: list[torch.Tensor] = []
    bottleneck = bottleneck_of(model)
    assert bottleneck is not None

    def note(module: torch.nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        mean, deviation = bottleneck.distribution(given[0])
        decoded = torch.linalg.lstsq(bottleneck.decoder, (out - bottleneck.decoder_bias).T)
        drawn.append(((decoded.solution.T - mean) / deviation).detach())

    bottleneck.register_forward_hook(note)
    with dropout_masks(target.dropout_seed, 0, 0, CPU):
        model(target.data.normalize(truth.images))
    return drawn[0]


def test_the_bottleneck_draws_from_its_distribution() -> None:
    model = build_model(LENET)
    insert_bottleneck(model, 4)
    bottleneck = bottleneck_of(model)
    assert bottleneck is not None
    features = torch.randn(1, bottleneck.encoder.shape[1]).expand(4000, -1)
    mean, deviation = bottleneck.distribution(features[:1])
    outputs = bottleneck(features).detach().double()
    decoder = bottleneck.decoder.detach().double()
    expected = decoder @ torch.diag(deviation[0].detach().double().square()) @ decoder.T
    torch.testing.assert_close(torch.cov(outputs.T).trace(), expected.trace(), rtol=0.1, atol=0)
    center = (mean @ bottleneck.decoder.T + bottleneck.decoder_bias)[0].detach().double()
    spread = float(expected.trace() / 4000) ** 0.5
    assert float((outputs.mean(0) - center).norm()) < 4 * spread


def test_the_divergence_is_that_of_normal_distributions() -> None:
    model = build_model(LENET)
    insert_bottleneck(model, 6)
    bottleneck = bottleneck_of(model)
    assert bottleneck is not None
    features = torch.randn(5, bottleneck.encoder.shape[1])
    mean, deviation = bottleneck.distribution(features)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(bottleneck.divergence(features), theirs.sum(1).mean() / math.log(2))


def test_inserting_changes_neither_names_nor_the_head_and_happens_once() -> None:
    model = build_model(LENET)
    before = list(model.state_dict())
    insert_bottleneck(model, 8)
    once = list(model.state_dict())
    insert_bottleneck(model, 8)
    assert list(model.state_dict()) == once
    assert [name for name in once if "bottleneck" not in name] == before
    copied = copy.deepcopy(model)
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(1)
    first = model(images)
    torch.manual_seed(1)
    assert torch.equal(copied(images), first)
    assert not torch.equal(model(images), first)


def test_what_is_shared_is_the_gradient_of_both_losses() -> None:
    target, truth = shared(2, "precode:32:0.5")
    assert isinstance(target.model, BottleneckArchitecture)
    noise = noise_of(target, truth)
    pinned = BottleneckArchitecture(target.model.inner, 32, noise)
    model = pinned.build()
    model.load_state_dict(target.state_dict)
    bottleneck = bottleneck_of(model)
    assert bottleneck is not None
    features: list[torch.Tensor] = []
    bottleneck.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    outputs = model.eval()(target.data.normalize(truth.images))
    loss = F.cross_entropy(outputs, truth.labels) + 0.5 * bottleneck.divergence(features[0])
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), g in zip(model.named_parameters(), gradient, strict=True):
        torch.testing.assert_close(target.gradient[name], g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_gradients_of_the_bottleneck_give_its_noise_and_features_away(batch: int) -> None:
    target, truth = shared(batch)
    model = target.build_model()
    bottleneck = bottleneck_of(model)
    assert bottleneck is not None
    seen = seen_bottleneck(target, truth.labels, bottleneck)
    assert seen is not None
    features: list[torch.Tensor] = []
    bottleneck.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    model(target.data.normalize(truth.images))
    found, true = torch.from_numpy(seen.features).float(), features[0].detach()
    torch.testing.assert_close(found, true, rtol=1e-2, atol=1e-2 * float(true.std()))
    noise = torch.from_numpy(seen.noise).float()
    torch.testing.assert_close(noise, noise_of(target, truth), rtol=0, atol=0.03)


@pytest.mark.parametrize("labels", [[9, 6, 8, 6], [1, 1, 2, 2], [3, 3, 3, 3]])
def test_inputs_of_a_layer_are_found_where_classes_repeat(labels: list[int]) -> None:
    numbers = np.random.default_rng(1)
    weight = numbers.normal(size=(10, 64)) / 8
    bias = numbers.normal(size=10) / 10
    inputs = 0.3 * numbers.normal(size=(4, 64))
    errors = softmax(inputs @ weight.T + bias, axis=1) - np.eye(10)[labels]
    solved = inputs_of_head(errors.T @ inputs / 4, weight, bias, labels)
    assert solved is not None
    # Images of one class are in no order.
    away = np.abs(solved[0][:, None] - inputs[None]).max(2)
    assert away.min(0).max() < 1e-3
    nearest = away.argmin(1)
    assert sorted(nearest) == [0, 1, 2, 3]
    assert [labels[i] for i in nearest] == labels


def test_noise_that_nobody_would_draw_is_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    target, truth = shared()
    bottleneck = bottleneck_of(target.build_model())
    assert bottleneck is not None
    assert seen_bottleneck(target, truth.labels, bottleneck) is not None
    monkeypatch.setattr(precode, "LIKELY_SQUARES", (2.0, 3.0))
    assert seen_bottleneck(target, truth.labels, bottleneck) is None


@pytest.mark.parametrize("better", [False, True])
def test_the_late_gradients_count_as_suits_the_network(better: bool) -> None:
    target, truth = shared(1)

    def attempt(candidate: Target, share: float, **_: object) -> Reconstruction:
        """Finds the image by one of the two ways of weighing."""
        model = candidate.model
        assert isinstance(model, SeenBottleneck)
        found = truth.images if model.balanced is better else torch.rand_like(truth.images)
        return Reconstruction(found, truth.labels, objective=0.0, iterations=1, seconds=0.0)

    likely = likeliest_noise(target, truth.labels, attempt)
    assert isinstance(likely.target.model, SeenBottleneck)
    assert likely.target.model.balanced is better
    adaptation = adapt(likely.target, InversionConfig())
    parts: dict[bool, float] = {False: 0.0, True: 0.0}
    for (name, g), w in zip(target.gradient.items(), adaptation.weights, strict=True):
        parts[name.startswith("7.")] += float((w * g).square().sum())
        assert 0 < w <= 1
    assert (parts[True] <= parts[False] * (1 + 1e-4)) is better
    assert ("count as much" in adaptation.notes[0]) is better


def test_where_only_late_gradients_are_shared_nothing_is_tried_out() -> None:
    target, truth = shared(1)
    late = {name: g for name, g in target.gradient.items() if name.startswith("7.")}

    def attempt(candidate: Target, share: float, **_: object) -> Reconstruction:
        raise AssertionError

    likely = likeliest_noise(dataclasses.replace(target, gradient=late), truth.labels, attempt)
    assert isinstance(likely.target.model, SeenBottleneck)
    assert not likely.target.model.balanced


def attacked(adaptive: bool) -> tuple[float, str]:
    target, truth = shared()
    config = Spectral.published.changed(iterations=100, race=0, adaptive=adaptive)
    found = Spectral(config).reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    value = psnr(found.images[assign(found.images, truth.images)], truth.images)
    return float(value.mean()), "".join(found.details.get("adaptations", []))


def test_who_computes_the_noise_sees_the_images() -> None:
    told, note = attacked(True)
    assert "is computed from the bottleneck" in note
    assert told > attacked(False)[0] + 3


def test_where_the_noise_is_unknown_the_layers_that_it_reaches_are_left_out() -> None:
    target, _ = shared()
    adaptation = adapt(target, InversionConfig())
    kept = dict(zip(target.gradient, (float(w) for w in adaptation.weights), strict=True))
    assert all(kept[name] == 0 for name in kept if "bottleneck" in name)
    assert kept[next(iter(kept))] == 1
    assert "drawn anew" in adaptation.notes[0]


def test_a_checkpoint_brings_its_bottleneck_along(tmp_path: Path) -> None:
    target, truth = shared()
    path = tmp_path / "shared.pth.tar"
    save_target(path, target, truth)
    again, _ = load_target(path)
    assert isinstance(again.model, BottleneckArchitecture)
    assert list(again.build_model().state_dict()) == list(target.build_model().state_dict())


def test_impossible_words_are_refused() -> None:
    with pytest.raises(InputError, match="at least one number"):
        parse_defenses("precode:0")
    with pytest.raises(InputError, match="must not be negative"):
        parse_defenses("precode:8:-1")


def test_a_model_without_the_bottleneck_gets_no_divergence() -> None:
    (defense,) = parse_defenses(WORDS)
    view = ClientView(
        build_model(LENET), torch.rand(1, 3, 16, 16), torch.tensor([0]), torch.Generator()
    )
    gradient = {"x": torch.ones(2)}
    assert torch.equal(defense.apply(gradient, view)["x"], gradient["x"])
