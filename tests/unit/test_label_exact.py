"""The default label rule, on heads that read signed features, and outside of its comfort."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack.knowledge.labels import label_accuracy, recover_labels, recover_most_exactly
from attack.knowledge.labels.fit import EXPLAINED, Equations, misfit
from attack.knowledge.labels.last_layer import last_layer_of, random_features
from core.data.specs import DataSpec
from core.errors import InputError
from core.models.architecture import GivenModel
from core.target import Target

SIDE = 8
DISTINCT = [3, 8, 1, 5]
REPEATED = [7, 2, 7, 7, 0, 2]


class Tokens(nn.Module):
    """Attention over patches, their mean behind LayerNorm: a small vision transformer."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        # Registered first, used last.
        self.classifier = nn.Linear(16, n_classes)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        out: torch.Tensor = self.classifier(self.norm(self.attention(tokens).mean(1)))
        return out


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3 * SIDE, 16, batch_first=True)
        self.classifier = nn.Linear(16, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(images.transpose(1, 2).flatten(2))
        out: torch.Tensor = self.classifier(states[:, -1])
        return out


def perceptron(n_classes: int, *end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 16), *end, nn.Linear(16, n_classes))


HEADS = {
    "tokens": Tokens,
    "lstm": Rows,
    "layer norm": lambda n: perceptron(n, nn.LayerNorm(16)),
    "tanh": lambda n: perceptron(n, nn.Tanh()),
    "hardswish": lambda n: perceptron(n, nn.Hardswish()),
    "gelu and dropout": lambda n: perceptron(n, nn.GELU(), nn.Dropout(0.3)),
    "batch norm": lambda n: perceptron(n, nn.BatchNorm1d(16)),
    "relu": lambda n: perceptron(n, nn.ReLU()),
}


def head_case(
    head: str,
    labels: list[int],
    n_classes: int = 10,
    seed: int = 0,
    train: bool = False,
) -> Target:
    """What a client with these labels shares."""
    torch.manual_seed(seed)
    model = HEADS[head](n_classes)
    model.train(train)
    inputs = 0.7 * torch.randn(len(labels), 3, 1, 1) + torch.randn(len(labels), 3, SIDE, SIDE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss = F.cross_entropy(model(inputs), torch.tensor(labels))
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    model.load_state_dict(state)
    data = DataSpec("noise", (3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3, n_classes)
    shared = dict(zip(named, gradients, strict=True))
    return Target(GivenModel(model), data, state, shared, train, len(labels))


def changed(target: Target, gradient: dict[str, torch.Tensor]) -> Target:
    return dataclasses.replace(target, gradient=gradient)


def without_bias(target: Target) -> Target:
    """The head's bias stays with the client."""
    last = [name for name, value in target.gradient.items() if value.dim() == 1][-1]
    return changed(target, {k: v for k, v in target.gradient.items() if k != last})


@pytest.mark.parametrize("head", HEADS)
def test_single_images_are_certain(head: str) -> None:
    train = head != "batch norm"
    found = [
        recover_labels("exact", head_case(head, [label], seed=label, train=train)).tolist()
        for label in range(10)
    ]
    assert found == [[label] for label in range(10)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("labels", [DISTINCT, REPEATED], ids=["distinct", "repeated"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_batches_smaller_than_the_number_of_classes(
    head: str, labels: list[int], train: bool
) -> None:
    target = head_case(head, labels, train=train)
    assert recover_labels("exact", target).tolist() == sorted(labels)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(3))
def test_two_classes_with_one_image_of_each(head: str, seed: int) -> None:
    target = head_case(head, [1, 0], n_classes=2, seed=seed, train=True)
    assert recover_labels("exact", target).tolist() == [0, 1]


@pytest.mark.parametrize("head", HEADS)
def test_single_images_without_a_bias_gradient(head: str) -> None:
    for label in range(5):
        target = without_bias(head_case(head, [label], n_classes=5, seed=label))
        assert recover_labels("exact", target).tolist() == [label]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("labels", [[6], DISTINCT, REPEATED], ids=["one", "distinct", "repeated"])
def test_clipping_by_an_unknown_factor(head: str, labels: list[int]) -> None:
    target = head_case(head, labels)
    clipped = changed(target, {name: 0.17 * value for name, value in target.gradient.items()})
    assert recover_labels("exact", clipped).tolist() == sorted(labels)


@pytest.mark.parametrize("labels", [[6], DISTINCT], ids=["one", "distinct"])
def test_noise_of_a_thousandth(labels: list[int]) -> None:
    target = head_case("tokens", labels)
    torch.manual_seed(0)
    noisy = {name: v + 1e-3 * torch.randn_like(v) for name, v in target.gradient.items()}
    assert recover_labels("exact", changed(target, noisy)).tolist() == sorted(labels)


def test_more_samples_than_classes() -> None:
    labels = [0, 1, 1, 2, 2, 2, 2]
    target = head_case("layer norm", labels, n_classes=3)
    assert label_accuracy(recover_labels("exact", target), torch.tensor(labels)) >= 6 / 7


def test_only_the_right_labels_explain_the_gradient() -> None:
    # By two ways: the fit to the head's gradient, and the labels that the client used.
    target = head_case("tokens", DISTINCT)
    model = target.build_model()
    last = last_layer_of(target, model)
    equations = Equations.of(last)
    assert equations is not None
    start = random_features(target, model).mean(0).expand(4, -1)
    assert misfit(equations, torch.tensor(DISTINCT), start) < EXPLAINED / 10
    for place in range(4):
        wrong = torch.tensor(DISTINCT)
        wrong[place] = 9
        assert misfit(equations, wrong, start) > 10 * EXPLAINED


class TestSignedFeatures:
    """Sign rules are a coin toss where features may be negative; they say so."""

    @pytest.mark.parametrize("head", [name for name in HEADS if name != "relu"])
    def test_a_sign_rule_warns(self, head: str, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            recover_labels("llg", head_case(head, [4]))
        assert "assumes that no feature at the last layer's input is negative" in caplog.text
        assert "use exact" in caplog.text

    def test_it_does_not_warn_behind_a_relu(self, caplog: pytest.LogCaptureFixture) -> None:
        recover_labels("llg", head_case("relu", [4]))
        assert not caplog.text

    def test_from_grads_warns_only_without_a_bias(self, caplog: pytest.LogCaptureFixture) -> None:
        target = head_case("tanh", [4])
        recover_labels("from_grads", target)
        assert not caplog.text
        recover_labels("from_grads", without_bias(target))
        assert "use exact" in caplog.text

    def test_sign_rules_are_wrong_there_and_the_default_is_not(self) -> None:
        targets = [head_case("layer norm", [label], seed=label) for label in range(10)]
        by_sign = [int(recover_labels("idlg", target)) for target in targets]
        assert sum(found == label for label, found in enumerate(by_sign)) < 10
        assert [int(recover_most_exactly(target)) for target in targets] == [*range(10)]


def test_nothing_of_the_model_or_of_the_random_numbers_changes() -> None:
    target = head_case("batch norm", DISTINCT, train=True)
    model = target.build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for rule in ("exact", "llg"):
        recover_labels(rule, target, model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_private_head_is_named() -> None:
    target = head_case("tokens", DISTINCT)
    gradient = {k: v for k, v in target.gradient.items() if not k.startswith("classifier")}
    with pytest.raises(InputError, match=r"classifier\.weight, which the client did not share"):
        recover_labels("exact", changed(target, gradient))
