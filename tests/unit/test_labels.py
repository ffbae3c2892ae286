"""Label recovery on real gradients of small networks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from attack.knowledge.labels import (
    label_accuracy,
    recover_labels,
    register_rule,
    rule_names,
    rule_requires,
)
from attack.knowledge.threat_models import Capability
from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec, build_model, last_linear
from core.target import LocalTraining, Target

CLASSES = 10
# Made for other losses than cross-entropy, or no rule at all.
NO_CLASS_RULES = ("known", "binary", "regression")
DATA = DataSpec("noise", (3, 8, 8), (0.5,) * 3, (0.25,) * 3, CLASSES)
SPEC = ModelSpec("cnn", CLASSES, 8, width=8)
NAME = last_linear(build_model(SPEC))[0]


def images_of(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Noise around one random pattern per class: learnable."""
    patterns = torch.rand(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    noise = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 0.7 * patterns[labels] + 0.3 * noise


def network(trained: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(SPEC).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    # Down to a loss of 0.6; the rules live from what the network still gets wrong.
    for step in range(10 if trained else 0):
        labels = torch.arange(CLASSES).repeat(4)
        inputs = DATA.normalize(images_of(labels, step)).to(dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def share(
    labels: torch.Tensor,
    model: nn.Module,
    *,
    train: bool = True,
    local: LocalTraining | None = None,
) -> Target:
    """(theta_0 - theta_K) / (lr K) of plain SGD; the gradient itself for one step."""
    local = local or LocalTraining()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(train)
    dtype = next(model.parameters()).dtype
    inputs = DATA.normalize(images_of(labels, 7)).to(dtype)
    total: dict[str, torch.Tensor] = {}
    named = dict(model.named_parameters())
    for _ in range(local.epochs):
        for x, y in zip(inputs.chunk(local.batches), labels.chunk(local.batches), strict=True):
            loss = nn.functional.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, list(named.values()))
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                total[name] = total.get(name, 0) + gradient / local.steps
                parameter.data -= local.lr * gradient
    model.load_state_dict(start)
    return Target(SPEC, DATA, start, total, train, len(labels), local)


BATCHES = {
    "one": [4],
    "distinct": [8, 1, 5, 3],
    "four each": [2] * 4 + [7] * 4 + [0] * 4 + [9] * 4,
    "all the same": [6] * 8,
    "uneven": [1] * 11 + [2] * 1 + [8] * 3 + [5] * 6,
    "every class and more": [*range(10)] * 3 + [3, 3],
}
EVERY_CLASS = "every class and more"


@pytest.mark.parametrize("rule", ["ilrg", "ilrg-robust"])
@pytest.mark.parametrize("name", [name for name in BATCHES if name != EVERY_CLASS])
@pytest.mark.parametrize(
    ("trained", "train"), [(False, False), (False, True), (True, False)], ids=str
)
def test_ilrg_counts_repeated_labels_exactly(
    rule: str, name: str, trained: bool, train: bool
) -> None:
    truth = torch.tensor(BATCHES[name])
    model = network(trained)
    target = share(truth, model, train=train)
    assert torch.equal(recover_labels(rule, target, model), truth.sort().values)


def test_robust_ilrg_on_a_trained_network_with_batch_statistics() -> None:
    model = network(True)
    accuracy = {
        rule: [
            label_accuracy(recover_labels(rule, share(truth, model), model), truth)
            for truth in map(torch.tensor, BATCHES.values())
        ]
        for rule in ("ilrg", "ilrg-robust")
    }
    pairs = zip(accuracy["ilrg-robust"], accuracy["ilrg"], strict=True)
    assert all(robust >= plain for robust, plain in pairs)
    assert sum(accuracy["ilrg-robust"]) > sum(accuracy["ilrg"]) + 0.3


def test_ilrg_with_every_class_in_the_batch() -> None:
    # No class is absent, so every quotient of gradients mixes classes; in eval mode an
    # untrained network's probabilities differ too little for that to matter.
    truth = torch.tensor(BATCHES[EVERY_CLASS])
    model = network(False)
    target = share(truth, model, train=False)
    assert torch.equal(recover_labels("ilrg", target, model), truth.sort().values)


@pytest.mark.parametrize("rule", ["llg", "from_grads", "yin", "ilrg", "ilrg-robust", "fedavg"])
def test_distinct_labels_of_an_untrained_network(rule: str) -> None:
    truth = torch.tensor(BATCHES["distinct"])
    model = network(False)
    assert torch.equal(recover_labels(rule, share(truth, model), model), truth.sort().values)


@pytest.mark.parametrize("label", range(CLASSES))
def test_idlg_is_exact_for_one_sample(label: int) -> None:
    model = network(False)
    assert recover_labels("idlg", share(torch.tensor([label]), model), model).tolist() == [label]


def with_row_sums(values: list[float], batch_size: int, bias: bool = True) -> Target:
    """A target whose last layer has the given row sums (and bias gradients)."""
    model = network(False)
    target = share(torch.tensor([0]), model)
    gradient = dict(target.gradient)
    weight = torch.zeros_like(gradient[f"{NAME}.weight"])
    weight[:, 0] = torch.tensor(values, dtype=weight.dtype)
    gradient |= {f"{NAME}.weight": weight, f"{NAME}.bias": weight[:, 0].clone()}
    if not bias:
        del gradient[f"{NAME}.bias"]
    return dataclasses.replace(target, gradient=gradient, batch_size=batch_size)


class TestLlg:
    """By hand: n = 10, K = 6, g = (-5, -2, 1, ...), m = -7 / 6 * 1.1 = -1.2833."""

    SUMS = (-5.0, -2.0, 1.0, *[2.0] * 7)

    def test_by_hand(self) -> None:
        # After one each: -3.717, -0.717. Then class 0 (-2.433), 0 (-1.15), 0 (0.13), 1 (0.567).
        found = recover_labels("llg", with_row_sums([*self.SUMS], 6))
        assert found.tolist() == [0, 0, 0, 0, 1, 1]

    def test_original_code_divides_by_the_negative_classes(self) -> None:
        target = with_row_sums([-2.0, -1.0, *[2.0] * 8], 4)
        # The paper's m = -0.825 leaves -1.175, -0.175; then class 0 (-0.35), and 0 again.
        assert recover_labels("llg", target).tolist() == [0, 0, 0, 1]
        # The code's m = -1.125 leaves -0.875, 0.125; then class 0 (0.25), and class 1.
        assert recover_labels("llg-negatives", target).tolist() == [0, 0, 1, 1]

    def test_stale_index_differs(self) -> None:
        # The impact always goes to class 1, so class 0 stays the lowest.
        found = recover_labels("llg-stale", with_row_sums([*self.SUMS], 6))
        assert found.tolist() == [0, 0, 0, 0, 0, 1]

    def test_never_more_labels_than_samples(self) -> None:
        target = with_row_sums([-1.0, -3.0, -2.0, *[1.0] * 7], 2)
        assert recover_labels("llg", target).tolist() == [1, 2]

    def test_no_negative_row(self) -> None:
        found = recover_labels("llg", with_row_sums([3.0, 1.0, *[2.0] * 8], 2))
        assert found.tolist() == [1, 1]

    def test_needs_no_bias(self) -> None:
        assert len(recover_labels("llg", with_row_sums([*self.SUMS], 6, bias=False))) == 6


def test_from_grads_fills_up_by_the_most_negative() -> None:
    target = with_row_sums([-1.0, -3.0, *[1.0] * 8], 5)
    assert recover_labels("from_grads", target).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("steps", [(1, 1), (4, 1), (2, 4)])
@pytest.mark.parametrize("labels", ["distinct", "four each", "uneven"])
def test_fedavg_beats_chance_over_several_steps(steps: tuple[int, int], labels: str) -> None:
    truth = torch.tensor(BATCHES[labels])
    local = LocalTraining(epochs=steps[0], batches=steps[1], lr=0.02)
    model = network(False)
    found = recover_labels("fedavg", share(truth, model, local=local), model)
    assert len(found) == len(truth)
    assert label_accuracy(found, truth) >= 0.75


def test_fedavg_without_bias_and_without_touching_the_model() -> None:
    truth = torch.tensor(BATCHES["four each"])
    model = network(False)
    target = share(truth, model, local=LocalTraining(epochs=3, lr=0.02))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = {k: v for k, v in target.gradient.items() if k != f"{NAME}.bias"}
    found = recover_labels("fedavg", dataclasses.replace(target, gradient=gradient), model)
    assert label_accuracy(found, truth) >= 0.5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rule", [r for r in rule_names() if r not in (*NO_CLASS_RULES, "idlg")])
def test_every_rule_gives_k_classes_under_heavy_noise(rule: str) -> None:
    truth = torch.tensor(BATCHES["distinct"])
    model = network(True)
    target = share(truth, model)
    torch.manual_seed(5)
    gradient = {k: v + torch.randn_like(v) for k, v in target.gradient.items()}
    found = recover_labels(rule, dataclasses.replace(target, gradient=gradient), model)
    assert found.shape == (4,)
    assert found.dtype == torch.int64
    assert ((found >= 0) & (found < CLASSES)).all()


class TestErrors:
    def test_unknown_rule(self) -> None:
        with pytest.raises(InputError, match="known, llg"):
            recover_labels("guess", with_row_sums([0.0] * 10, 1))

    def test_known_needs_a_grant(self) -> None:
        target = with_row_sums([0.0] * 10, 2)
        with pytest.raises(InputError, match="not granted"):
            recover_labels("known", target)
        with pytest.raises(InputError, match="3 known labels"):
            recover_labels("known", target, truth_labels=torch.zeros(3))
        assert recover_labels("known", target, truth_labels=torch.tensor([4, 1])).tolist() == [4, 1]

    def test_other_rules_never_look_at_the_truth(self) -> None:
        target = with_row_sums([-1.0, *[1.0] * 9], 1)
        assert recover_labels("llg", target, truth_labels=torch.tensor([4])).tolist() == [0]

    def test_ilrg_without_bias(self) -> None:
        with pytest.raises(InputError, match="needs the bias gradient"):
            recover_labels("ilrg", with_row_sums([-1.0] * 10, 2, bias=False))

    @pytest.mark.parametrize("rule", [r for r in rule_names() if r not in NO_CLASS_RULES])
    def test_a_zero_gradient_says_nothing(self, rule: str) -> None:
        with pytest.raises(InputError, match="last layer fc is zero everywhere"):
            recover_labels(rule, with_row_sums([0.0] * 10, 1))

    def test_no_negative_bias_gradient(self) -> None:
        with pytest.raises(InputError, match="no class"):
            recover_labels("ilrg-robust", with_row_sums([1.0] * 10, 2))

    def test_a_gradient_that_is_no_number(self) -> None:
        with pytest.raises(InputError, match="last layer fc is not finite"):
            recover_labels("exact", with_row_sums([float("nan")] * 10, 2))

    def test_last_layer_kept_private(self) -> None:
        target = with_row_sums([-1.0] * 10, 2)
        gradient = {k: v for k, v in target.gradient.items() if not k.startswith(NAME)}
        with pytest.raises(InputError, match=rf"{NAME}\.weight, which the client did not share"):
            recover_labels("llg", dataclasses.replace(target, gradient=gradient))

    def test_rules_outside_their_assumptions(self) -> None:
        with pytest.raises(InputError, match="one sample"):
            recover_labels("idlg", with_row_sums([-1.0] * 10, 2))
        with pytest.raises(InputError, match="without repetition"):
            recover_labels("yin", with_row_sums([-1.0] * 10, 11))

    def test_a_name_is_taken_once(self) -> None:
        with pytest.raises(ValueError, match="registered already"):
            register_rule("llg")(lambda target, model, last: torch.zeros(1))


def test_capabilities() -> None:
    assert rule_requires("known") == {Capability.LABELS}
    assert rule_requires("llg") == {Capability.BATCH_SIZE}
    assert Capability.LOCAL_TRAINING in rule_requires("fedavg")


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [([1, 2, 2], [2, 1, 2], 1.0), ([1, 1, 1], [1, 2, 3], 1 / 3), ([0], [1], 0.0)],
)
def test_accuracy_is_multiset_overlap(found: list[int], truth: list[int], expected: float) -> None:
    assert label_accuracy(torch.tensor(found), torch.tensor(truth)) == pytest.approx(expected)


def test_of_recovered_probabilities_the_likeliest_classes_count() -> None:
    found = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    assert label_accuracy(found, torch.tensor([1, 2])) == 0.5
