"""Targets of clients without classes: findings and values, from the head's gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import gradinvbench as gib
from attack.knowledge.labels import accuracy_by_rule, label_accuracy, recover_labels
from attack.knowledge.labels.last_layer import last_layer_of
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanAbsoluteError, MeanSquaredError
from core.models.architecture import GivenModel
from core.target import Target

FEATURES = 12


def client(
    loss: Loss, targets: torch.Tensor, *end: nn.Module, outputs: int, seed: int = 0
) -> Target:
    """What a float64 network on rows of a table shares; its features have both signs."""
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, outputs), *end]
    model = nn.Sequential(*layers).double()
    inputs = torch.randn(len(targets), FEATURES, dtype=torch.float64)
    value = loss(model(inputs), targets)
    named = dict(model.named_parameters())
    gradient = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))
    data = DataSpec("rows", (FEATURES,), (0.0,), (1.0,), 0)
    state = model.state_dict()
    return Target(
        GivenModel(model), data, state, gradient, False, batch_size=len(targets), loss=loss
    )


def findings(k: int, n: int, seed: int) -> torch.Tensor:
    return torch.randint(2, (k, n), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("rule", ["exact", "binary"])
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("pos_weight", [None, [4.0]], ids=["plain", "weighted"])
def test_findings_of_one_sample(rule: str, outputs: int, pos_weight: list[float] | None) -> None:
    for seed in range(6):
        truth = findings(1, outputs, seed)
        loss = BinaryCrossEntropy(pos_weight)
        target = client(loss, truth, outputs=outputs, seed=seed)
        # By an unknown factor, as under clipping.
        clipped = {name: 0.1 * value for name, value in target.gradient.items()}
        assert torch.equal(recover_labels(rule, target), truth)
        assert torch.equal(
            recover_labels(rule, dataclasses.replace(target, gradient=clipped)), truth
        )


@pytest.mark.parametrize("pos_weight", [None, [3.0]], ids=["plain", "weighted"])
def test_how_many_samples_have_each_finding(
    pos_weight: list[float] | None, caplog: pytest.LogCaptureFixture
) -> None:
    truth = findings(6, 4, seed=1)
    loss = BinaryCrossEntropy(pos_weight)
    found = recover_labels("exact", client(loss, truth, outputs=4))
    assert found.shape == truth.shape
    assert (found.sum(0) - truth.sum(0)).abs().max() <= 1
    assert label_accuracy(found, truth) >= 0.9
    assert "not which" in caplog.text


@pytest.mark.parametrize("outputs", [1, 3])
def test_values_of_one_sample_to_rounding(outputs: int) -> None:
    for seed in range(4):
        truth = 5 * torch.randn(1, outputs, generator=torch.Generator().manual_seed(seed)).double()
        target = client(MeanSquaredError(), truth, outputs=outputs, seed=seed)
        torch.testing.assert_close(recover_labels("exact", target), truth, rtol=1e-10, atol=1e-10)


def test_a_classifier_with_smoothed_labels() -> None:
    loss = CrossEntropy(label_smoothing=0.3)
    for label in range(4):
        target = client(loss, torch.tensor([label]), outputs=4, seed=label)
        assert recover_labels("exact", target).tolist() == [label]
    labels = torch.tensor([6, 0, 3, 3])
    target = client(loss, labels, outputs=8)
    assert recover_labels("exact", target).tolist() == [0, 3, 3, 6]


def test_an_overconfident_classifier_with_smoothed_labels() -> None:
    # Its own class is then not the lowest bias gradient; the features tell.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 3)).double()
    inputs = torch.randn(1, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias[1] += 12
    loss = CrossEntropy(label_smoothing=0.3)
    value = loss(model(inputs), torch.tensor([1]))
    named = dict(model.named_parameters())
    gradient = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))
    data = DataSpec("rows", (FEATURES,), (0.0,), (1.0,), 3)
    target = Target(
        GivenModel(model), data, model.state_dict(), gradient, False, batch_size=1, loss=loss
    )
    assert int(gradient["0.bias"].argmin()) != 1
    assert recover_labels("exact", target).tolist() == [1]


def test_the_front_door_recovers_what_the_loss_compares_with() -> None:
    truth = torch.tensor([[1.0, 0.0, 1.0]])
    target = client(BinaryCrossEntropy(), truth.double(), outputs=3)
    found = gib.invert(target, iterations=2, progress=False)
    assert torch.equal(found.labels.float(), truth)


def test_only_rules_that_fit_are_compared() -> None:
    truth = findings(1, 3, seed=0)
    rules = accuracy_by_rule(client(BinaryCrossEntropy(), truth, outputs=3), truth)
    assert {name: row["accuracy"] for name, row in rules.items()} == {"binary": 1, "exact": 1}


class TestRefusals:
    def test_several_values(self) -> None:
        target = client(MeanSquaredError(), torch.randn(3, 2).double(), outputs=2)
        with pytest.raises(InputError, match=r"3 samples .* only a mean residual"):
            recover_labels("exact", target)

    def test_a_loss_without_a_rule(self) -> None:
        target = client(MeanAbsoluteError(), torch.randn(1, 2).double(), outputs=2)
        with pytest.raises(InputError, match="no rule recovers the targets of the loss mae"):
            recover_labels("exact", target)

    def test_a_rule_of_another_loss(self) -> None:
        target = client(BinaryCrossEntropy(), findings(1, 2, 0), outputs=2)
        with pytest.raises(InputError, match="llg is for clients with cross-entropy"):
            recover_labels("llg", target)

    def test_an_output_that_is_not_the_last_layers(self) -> None:
        target = client(MeanSquaredError(), torch.ones(1, 2).double(), nn.Sigmoid(), outputs=2)
        with pytest.raises(InputError, match="changes the outputs of its last layer 3"):
            recover_labels("exact", target)

    def test_values_under_noise(self) -> None:
        target = client(MeanSquaredError(), torch.ones(1, 2).double(), outputs=2)
        noisy = {name: v + 0.1 * torch.randn_like(v) for name, v in target.gradient.items()}
        with pytest.raises(InputError, match="not the outer product"):
            recover_labels("exact", dataclasses.replace(target, gradient=noisy))


def test_values_of_a_changed_gradient_are_refused() -> None:
    """Clipping leaves the outer product that one sample leaves, and other values behind it."""
    truth = torch.randn(1, 3, dtype=torch.float64)
    target = client(MeanSquaredError(), truth, outputs=3)
    norm = sum(float(g.square().sum()) for g in target.gradient.values()) ** 0.5
    clipped = dataclasses.replace(
        target,
        gradient={name: 0.1 / norm * value for name, value in target.gradient.items()},
        defenses=("clip:0.1",),
    )
    with pytest.raises(InputError, match=r"gradient as it was.*changed it \(clip:0\.1\), by"):
        recover_labels("regression", clipped)
    shares = {name: 0.1 / norm * value for name, value in target.gradient.items()}
    target = dataclasses.replace(target, gradient=shares)
    local = gib.LocalTraining(clip_norm=0.1)
    with pytest.raises(InputError, match=r"changed it \(local training sgd clip-norm=0\.1\)"):
        recover_labels("exact", dataclasses.replace(target, local=local))


def shares_bias_only(target: Target) -> Target:
    gradient = {name: value for name, value in target.gradient.items() if name != "3.weight"}
    return dataclasses.replace(target, gradient=gradient)


@pytest.mark.parametrize("seed", range(5))
def test_the_bias_alone_tells_one_label(seed: int) -> None:
    label = torch.tensor([seed])
    target = shares_bias_only(client(CrossEntropy(), label, outputs=5, seed=seed))
    assert torch.equal(recover_labels("exact", target), label)
    found = findings(1, 5, seed)
    target = shares_bias_only(client(BinaryCrossEntropy(), found, outputs=5, seed=seed))
    assert torch.equal(recover_labels("exact", target), found)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (CrossEntropy(), torch.tensor([1, 2])),
        (CrossEntropy(label_smoothing=0.1), torch.tensor([1])),
        (MeanSquaredError(), torch.randn(1, 5, dtype=torch.float64)),
    ],
    ids=["two samples", "smoothed", "values"],
)
def test_the_bias_alone_does_not_tell_the_rest(loss: Loss, targets: torch.Tensor) -> None:
    target = shares_bias_only(client(loss, targets, outputs=5))
    with pytest.raises(InputError, match=r"3\.weight|smoothing|was not shared"):
        recover_labels("exact", target)


def test_other_rules_read_more_than_the_bias() -> None:
    target = shares_bias_only(client(CrossEntropy(), torch.tensor([1]), outputs=5))
    with pytest.raises(InputError, match=r"3\.weight, which the client did not share: give"):
        recover_labels("ilrg", target)


WEIGHTS = [0.1, 2, 1, 5, 0.5, 3, 1, 0.7]


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smoothed"])
@pytest.mark.parametrize("labels", [[3], [0, 5], [1, 3, 3], [0, 3, 6, 6], [0, 0, 0, 1, 7]], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.2], ids=["as it was", "clipped"])
def test_samples_that_weigh_by_their_classes(
    labels: list[int], smoothing: float, factor: float
) -> None:
    # Outputs tell the classes apart, as those of tables do.
    loss = CrossEntropy(smoothing, WEIGHTS)
    for seed in range(3):
        target = client(loss, torch.tensor(labels), outputs=8, seed=seed)
        shared = {name: factor * value for name, value in target.gradient.items()}
        found = recover_labels("exact", dataclasses.replace(target, gradient=shared))
        assert found.tolist() == sorted(labels)


def test_the_targets_of_a_weighted_loss_are_torchs() -> None:
    # The mean of (sum of t) p - t is torch's own gradient in the outputs.
    loss = CrossEntropy(0.2, WEIGHTS)
    labels = torch.tensor([0, 3, 6, 6, 1])
    outputs = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(outputs, labels), outputs)
    target = client(loss, labels, outputs=8)
    targets = last_layer_of(target, target.build_model()).targets(labels)
    found = (targets.sum(1, keepdim=True) * outputs.detach().softmax(1) - targets) / 5
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_more_weighted_samples_than_classes_are_estimated() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    aware, unaware = 0.0, 0.0
    for seed in range(6):
        target = client(CrossEntropy(weights=[0.2, 3, 1]), labels, outputs=3, seed=seed)
        plain = dataclasses.replace(target, loss=CrossEntropy())
        aware += label_accuracy(recover_labels("exact", target), labels) / 6
        unaware += label_accuracy(recover_labels("exact", plain), labels) / 6
    assert aware > unaware + 0.1
    assert aware >= 0.7


def test_weighted_samples_that_cannot_be_counted() -> None:
    labels = torch.tensor([1, 3, 3])
    target = client(CrossEntropy(weights=[0.1, 2, 1, 5]), labels, outputs=4)
    with pytest.raises(InputError, match=r"weighs them by their classes: use exact"):
        recover_labels("llg", target)
    target = client(CrossEntropy(weights=[0, 2, 1, 5]), labels, outputs=4)
    with pytest.raises(InputError, match="class 0 has weight 0, and its samples leave no trace"):
        recover_labels("exact", target)


STEPS = {
    "weight decay": "sgd lr=0.1 weight-decay=0.3",
    "nesterov": "sgd lr=0.1 momentum=0.9 nesterov=yes weight-decay=0.1",
    "another rate": "sgd lr=0.1 rates=0.03",
    "clipping that does nothing": "sgd lr=0.1 clip-norm=1e6 weight-decay=0.1",
}


@pytest.mark.parametrize("words", STEPS.values(), ids=STEPS)
def test_one_step_of_sgd_is_undone(words: str) -> None:
    torch.manual_seed(0)
    body = [nn.Linear(FEATURES, 9), nn.Tanh(), nn.LayerNorm(9)]
    inputs = torch.randn(1, FEATURES, dtype=torch.float64)
    values = 5 * torch.randn(1, 3, dtype=torch.float64)
    model = nn.Sequential(*body, nn.Linear(9, 3)).double()
    target, _ = gib.share(model, inputs, values, loss="mse", local=words, bounds=None)
    torch.testing.assert_close(recover_labels("exact", target), values, rtol=1e-8, atol=1e-8)
    for label in range(3):
        target, _ = gib.share(model, inputs, [label], local=words, bounds=None)
        assert recover_labels("exact", target).tolist() == [label]
    inputs = torch.randn(4, FEATURES, dtype=torch.float64)
    model = nn.Sequential(*body, nn.Linear(9, 8)).double()
    target, _ = gib.share(model, inputs, [0, 2, 2, 7], local=words, bounds=None)
    assert recover_labels("exact", target).tolist() == [0, 2, 2, 7]


def test_a_clipping_defense_that_does_nothing_leaves_the_values() -> None:
    truth = torch.randn(1, 3, dtype=torch.float64)
    target = client(MeanSquaredError(), truth, outputs=3)
    unclipped = dataclasses.replace(target, defenses=("clip:1e6",))
    torch.testing.assert_close(recover_labels("exact", unclipped), truth, rtol=1e-8, atol=1e-8)
