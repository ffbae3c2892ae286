"""What a client may notice of a malicious server: scores, thresholds and honest rounds."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from audit.detectors import Received, View, detector_names, get_detector, scores_of
from audit.detectors.calibration import joint_p_value, rounds_needed, threshold
from audit.detectors.honest import Samples, fresh_start, honest_scores
from core.errors import InputError
from core.losses import as_loss
from core.models.building import ModelSpec, build_model
from gradients.malicious_server import tamper
from tests.targets import data_spec, smooth_images

SIZE, CLASSES = 8, 4
DATA = data_spec(SIZE, CLASSES)
LOSS = as_loss("cross-entropy")
MLP = ModelSpec("mlp", CLASSES, SIZE, width=24)
CNN = ModelSpec("cnn", CLASSES, SIZE, width=4)


def samples(n: int = 16, seed: int = 0) -> Samples:
    return Samples(DATA.normalize(smooth_images(n, SIZE, seed)), torch.arange(n) % CLASSES, LOSS)


def honest(spec: ModelSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(spec)


def tampered(spec: ModelSpec, malicious: str) -> nn.Module:
    public = DATA.normalize(smooth_images(200, SIZE, seed=7))
    spec = dataclasses.replace(spec, malicious=malicious)
    return tamper(honest(dataclasses.replace(spec, malicious="")), spec, public, batch_size=8)


def test_a_view_takes_gradients_of_samples_and_changes_nothing() -> None:
    model, own = honest(CNN).train(), samples()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    view = own.view(model)
    batch = LOSS(model.eval()(own.inputs), own.targets)
    whole = torch.autograd.grad(batch, list(model.parameters()))
    model.train()
    for (name, _), expected in zip(model.named_parameters(), whole, strict=True):
        assert view.gradient_norms[name] == pytest.approx(float(expected.norm()), rel=1e-4)
    for i in (0, 5):
        loss = LOSS(model.eval()(own.inputs[i : i + 1]), own.targets[i : i + 1])
        (alone,) = torch.autograd.grad(loss, [model.fc.weight])
        assert float(view.sample_norms["fc.weight"][i]) == pytest.approx(float(alone.norm()))
        assert float(view.sample_losses[i]) == pytest.approx(loss.item())
    model.train()
    assert view.activation_rates["conv1"].numel() == 4 * SIZE**2
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_d_snr_is_that_of_the_paper() -> None:
    view = samples().view(honest(MLP))
    ratios = []
    for name in ("1.weight", "3.weight", "5.weight"):
        squares = view.sample_norms[name].square()
        ratios.append(float((squares.max() / (squares.sum() - squares.max())).sqrt()))
    assert get_detector("dsnr")().alone(view) == pytest.approx(math.log10(max(ratios)))


@pytest.mark.parametrize(
    ("detector", "spec", "malicious"),
    [
        ("duplicate-rows", MLP, "imprint:64"),
        ("sparsity", MLP, "fishing:1"),
        ("loss-jump", CNN, "fishing:1"),
        ("gradient-norms", CNN, "fishing-feature:1"),
        ("activation-rates", MLP, "imprint:64"),
        ("dsnr", MLP, "fishing:1"),
        ("weights", MLP, "trap:1"),
    ],
)
def test_every_detector_finds_what_it_is_made_for(
    detector: str, spec: ModelSpec, malicious: str
) -> None:
    own = samples()
    sent = own.view(tampered(spec, malicious))
    usual = [get_detector(detector)().alone(own.view(honest(spec, seed))) for seed in range(20)]
    rule = threshold(usual, 0.05)
    assert rule.alarms(get_detector(detector)().score(Received(sent)))
    assert rule.false_alarm <= 0.05


def test_every_registered_detector_is_tested_and_says_what_it_does() -> None:
    names = {"activation-rates", "dsnr", "duplicate-rows", "gradient-norms", "loss-jump"}
    assert set(detector_names()) == names | {"sparsity", "weights"}
    assert all(get_detector(name).__doc__ for name in detector_names())


@pytest.mark.parametrize("malicious", ["trap:1", "fishing:1", "imprint:64"])
def test_the_round_before_sharpens(malicious: str) -> None:
    own, model = samples(), honest(MLP)
    before = own.view(model)

    def step(model: nn.Module, generator: torch.Generator) -> nn.Module:
        return own.trained(model, generator, lr=0.05, steps=2, size=8)

    rounds = list(itertools.islice(honest_scores(own, step, model, model), 39))
    usual = {name: [r[name] for r in rounds] for name in detector_names()}
    sent = scores_of(Received(own.view(tampered(MLP, malicious)), before))
    assert joint_p_value(sent, usual) == pytest.approx(1 / 40)
    further = step(model, torch.Generator().manual_seed(999))
    assert joint_p_value(scores_of(Received(own.view(further), before)), usual) > 0.05


def test_what_changes_its_shape_is_infinitely_suspicious() -> None:
    own = samples()
    wider = dataclasses.replace(MLP, width=25)
    found = scores_of(Received(own.view(honest(wider)), own.view(honest(MLP))))
    assert found["weights"] == found["activation-rates"] == math.inf
    broken = honest(MLP)
    with torch.no_grad():
        broken.get_parameter("1.weight").fill_(math.nan)
    assert scores_of(Received(own.view(broken)))["loss-jump"] == math.inf


def test_rounds_without_one_before_start_afresh_and_go_on() -> None:
    own, model = samples(), honest(MLP)

    def step(model: nn.Module, generator: torch.Generator) -> nn.Module:
        return own.trained(model, generator, lr=0.1, steps=4, size=8)

    found = list(itertools.islice(honest_scores(own, step, model, None), 8))
    losses = [round_["loss-jump"] for round_ in found]
    # Four rounds of one start, then another start.
    assert losses[3] < losses[0]
    assert losses[4] > losses[3]
    again = list(itertools.islice(honest_scores(own, step, model, None), 8))
    assert again == found
    fresh = fresh_start(model, 3)
    assert not torch.equal(fresh.get_parameter("1.weight"), model.get_parameter("1.weight"))


def test_thresholds_keep_to_their_rate_of_false_alarms() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(2000):
        *known, new = rng.lognormal(0, 2, 40)
        alarms += threshold(known, 0.1).alarms(new)
    # 4 of 40 may lie above: the rate is 4/40 exactly.
    assert threshold(known, 0.1).false_alarm == pytest.approx(4 / 40)
    assert alarms / 2000 == pytest.approx(0.1, abs=0.02)
    assert rounds_needed(0.05) == 19
    with pytest.raises(InputError, match="18 honest rounds are too few"):
        threshold(known[:18], 0.05)


def test_several_detectors_cost_no_more_false_alarms_than_one() -> None:
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(600):
        common = rng.normal(size=(20, 1))
        drawn = np.exp(common + rng.standard_t(2, size=(20, 7)))
        new = {str(i): float(drawn[0, i]) for i in range(7)}
        known = {str(i): drawn[1:, i].tolist() for i in range(7)}
        alarms += joint_p_value(new, known) <= 0.05
    assert alarms / 600 == pytest.approx(0.05, abs=0.025)
    assert joint_p_value({"a": math.inf}, {"a": [0.0] * 19}) == pytest.approx(0.05)


def test_a_view_of_no_layer_says_nothing() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :CLASSES] * self.scale

    own = samples()
    found = scores_of(Received(View(Scale(), own.inputs, own.targets, LOSS)))
    assert {name: value for name, value in found.items() if value} == {
        "loss-jump": found["loss-jump"]
    }
