"""The losses of clients against torch's own formulas, and what they say of themselves."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core import losses
from core.errors import InputError
from core.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    GivenLoss,
    Loss,
    MeanAbsoluteError,
    MeanSquaredError,
    PixelCrossEntropy,
    SumOfHeads,
    Targets,
    as_loss,
    is_default,
    loss_from,
    loss_names,
    main_output,
    register_loss,
)

N = 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def indices(*shape: int, classes: int = 4) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(5))


LOGITS, VALUES, MAPS = numbers(N, 4), numbers(N, 5, 2), numbers(N, 4, 6, 5)
SOFT = numbers(N, 4, seed=1).softmax(1)
FINDINGS = (numbers(N, 4, seed=2) > 0).double()
CLASSES, PIXELS = indices(N), indices(N, 6, 5)
WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def log_likelihood(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Of every sample's or pixel's class."""
    return logits.log_softmax(1).gather(1, classes[:, None])[:, 0]


def textbook_dice(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    values = []
    for p, t in zip(logits.softmax(1), classes, strict=True):
        for c in range(logits.shape[1]):
            common = p[c][t == c].sum()
            values.append((2 * common + 1) / (p[c].sum() + (t == c).sum() + 1))
    return 1 - torch.stack(values).mean()


def smoothed() -> torch.Tensor:
    true = 0.8 * F.one_hot(CLASSES, 4) + 0.2 / 4
    return -(true * LOGITS.log_softmax(1)).sum(1).mean()


def weighted(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[classes]
    return -(weights * log_likelihood(logits, classes)).sum() / weights.sum()


def binary(positive: float) -> torch.Tensor:
    p = LOGITS.sigmoid()
    return -(positive * FINDINGS * p.log() + (1 - FINDINGS) * (1 - p).log()).mean()


OTHER = numbers(N, 5, 2, seed=3)
CASES: list[tuple[Loss, torch.Tensor, torch.Tensor, torch.Tensor]] = [
    (CrossEntropy(), LOGITS, CLASSES, -log_likelihood(LOGITS, CLASSES).mean()),
    (CrossEntropy(), LOGITS, SOFT, -(SOFT * LOGITS.log_softmax(1)).sum(1).mean()),
    (CrossEntropy(0.2), LOGITS, CLASSES, smoothed()),
    (CrossEntropy(weights=WEIGHTS), LOGITS, CLASSES, weighted(LOGITS, CLASSES)),
    (BinaryCrossEntropy(), LOGITS, FINDINGS, binary(1.0)),
    (BinaryCrossEntropy([3.0]), LOGITS, FINDINGS, binary(3.0)),
    (MeanSquaredError(), VALUES, OTHER, (VALUES - OTHER).square().mean()),
    (MeanAbsoluteError(), VALUES, OTHER, (VALUES - OTHER).abs().mean()),
    (PixelCrossEntropy(), MAPS, PIXELS, -log_likelihood(MAPS, PIXELS).mean()),
    (PixelCrossEntropy(WEIGHTS), MAPS, PIXELS, weighted(MAPS, PIXELS)),
    (Dice(), MAPS, PIXELS, textbook_dice(MAPS, PIXELS)),
]
IDS = [repr(loss) for loss, *_ in CASES]


@pytest.mark.parametrize(("loss", "outputs", "targets", "expected"), CASES, ids=IDS)
def test_a_loss_is_the_textbook_one(
    loss: Loss, outputs: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor
) -> None:
    torch.testing.assert_close(loss(outputs, loss.fitted(outputs, targets)), expected)


@pytest.mark.parametrize(("loss", "outputs", "targets", "expected"), CASES, ids=IDS)
def test_a_mean_over_samples_is_one(
    loss: Loss, outputs: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor
) -> None:
    each = torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(N)])
    assert torch.allclose(each.mean(), expected) == loss.mean_over_samples
    if loss.mean_over_samples:
        torch.testing.assert_close(loss.total(outputs, targets), N * expected)


@pytest.mark.parametrize(("loss", "outputs", "targets", "expected"), CASES, ids=IDS)
def test_a_description_makes_the_same_loss(
    loss: Loss, outputs: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor
) -> None:
    again = loss_from(loss.describe())
    assert again.describe() == loss.describe()
    assert (type(again), again.targets) == (type(loss), loss.targets)
    assert again.mean_over_samples == loss.mean_over_samples
    torch.testing.assert_close(again(outputs, targets), expected)


@pytest.mark.parametrize(("loss", "outputs", "targets", "expected"), CASES, ids=IDS)
def test_a_loss_runs_batched_over_restarts(
    loss: Loss, outputs: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor
) -> None:
    several = torch.stack([outputs, 2 * outputs])
    found = torch.func.vmap(loss, in_dims=(0, None))(several, targets)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], loss(2 * outputs, targets))


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        (CrossEntropy(), LOGITS),
        (BinaryCrossEntropy(), LOGITS),
        (MeanSquaredError(), VALUES),
        (PixelCrossEntropy(), MAPS),
        (Dice(), MAPS),
        (Dice(), MAPS[:, :1]),
    ],
)
def test_optimised_targets_are_targets_that_the_loss_takes(
    loss: Loss, outputs: torch.Tensor
) -> None:
    variables = (3 * numbers(*outputs.shape, seed=9)).requires_grad_()
    relaxed = loss.relaxed(variables)
    loss.fitted(outputs, relaxed.detach())
    (slope,) = torch.autograd.grad(loss(outputs, relaxed), variables)
    assert slope.abs().max() > 0
    decided = loss.decided(variables.detach())
    assert len(loss.fitted(outputs, decided)) == N


def test_what_belongs_to_no_sample_is_no_part_of_dice() -> None:
    one = MAPS[:, :1]
    two = torch.cat([torch.zeros_like(one), one], 1)
    target = PIXELS % 2
    p = one.sigmoid()[:, 0]
    common, sizes = (p * target).sum((1, 2)), p.sum((1, 2)) + target.sum((1, 2))
    torch.testing.assert_close(Dice()(one, target), 1 - ((2 * common + 1) / (sizes + 1)).mean())
    assert two.softmax(1)[:, 1].sub(p).abs().max() < 1e-12


def test_heads_by_number_name_and_attribute() -> None:
    main, aux = LOGITS, numbers(N, 4, seed=8)
    expected = F.cross_entropy(main, CLASSES) + 0.4 * F.cross_entropy(aux, CLASSES)
    by_number = SumOfHeads({0: 1.0, 1: 0.4})
    by_name = SumOfHeads({"logits": 1.0, "aux": 0.4})
    torch.testing.assert_close(by_number((main, aux), CLASSES), expected)
    torch.testing.assert_close(by_name({"logits": main, "aux": aux}, CLASSES), expected)
    torch.testing.assert_close(by_name(SimpleNamespace(logits=main, aux=aux), CLASSES), expected)
    torch.testing.assert_close(by_name.total({"logits": main, "aux": aux}, CLASSES), N * expected)
    # In eval mode models with auxiliary heads give the main output alone.
    torch.testing.assert_close(by_name(main, CLASSES), F.cross_entropy(main, CLASSES))
    again = loss_from(by_name.describe())
    torch.testing.assert_close(again({"logits": main, "aux": aux}, CLASSES), expected)
    with pytest.raises(InputError, match="no head aux"):
        by_name({"logits": main}, CLASSES)
    of_values = SumOfHeads({0: 2.0}, of="mse")
    assert of_values.targets is Targets.VALUES
    torch.testing.assert_close(of_values((VALUES,), OTHER), 2 * F.mse_loss(VALUES, OTHER))


def test_the_main_output_is_found() -> None:
    for outputs in (LOGITS, (LOGITS, VALUES), [LOGITS], {"x": VALUES, "logits": LOGITS},
                    SimpleNamespace(logits=LOGITS), {"out": LOGITS}):  # fmt: skip
        assert main_output(outputs) is LOGITS
    with pytest.raises(InputError, match=r"gives a dict.*no tensor is the main output"):
        main_output({"features": LOGITS})


def own_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).pow(4).mean()


def test_what_a_user_means_by_a_loss() -> None:
    assert is_default(as_loss(None))
    assert is_default(as_loss("cross-entropy"))
    assert isinstance(as_loss("mse"), MeanSquaredError)
    given = CrossEntropy(0.1)
    assert as_loss(given) is given
    found = as_loss(own_loss)
    assert isinstance(found, GivenLoss)
    assert found.source.endswith("test_losses:own_loss")
    assert not found.mean_over_samples
    with pytest.raises(InputError, match=r"huber is unknown; known are binary-cross-entropy"):
        as_loss("huber")
    with pytest.raises(InputError, match="needs arguments"):
        as_loss("sum-of-heads")
    with pytest.raises(InputError, match="int is no function"):
        as_loss(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "outputs", "targets", "name"),
    [
        (nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=0.1), LOGITS, CLASSES, 0),
        (nn.CrossEntropyLoss(), LOGITS, CLASSES, 0),
        (F.cross_entropy, LOGITS, CLASSES, 0),
        (nn.MSELoss(), VALUES, OTHER, 1),
        (F.mse_loss, VALUES, OTHER, 1),
        (nn.L1Loss(), VALUES, OTHER, 2),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])), LOGITS, FINDINGS, 3),
        (nn.MSELoss(reduction="sum"), VALUES, OTHER, 4),
        (nn.HuberLoss(), VALUES, OTHER, 4),
    ],
)
def test_torchs_own_losses_are_the_ready_ones(
    given: Any, outputs: torch.Tensor, targets: torch.Tensor, name: int
) -> None:
    kinds = (CrossEntropy, MeanSquaredError, MeanAbsoluteError, BinaryCrossEntropy, GivenLoss)
    found = as_loss(given)
    assert type(found) is kinds[name]
    copy = given.double() if isinstance(given, nn.Module) else given
    torch.testing.assert_close(found(outputs, targets), copy(outputs, targets), rtol=1e-6, atol=0)


WRONG: list[tuple[Any, str]] = [
    (lambda: CrossEntropy(1.0), r"label_smoothing must lie in \[0, 1\)"),
    (lambda: CrossEntropy(weights=[1.0, -1.0]), "weights must be finite and not negative"),
    (lambda: CrossEntropy(weights=[1.0]).fitted(LOGITS, CLASSES), "1 class weights for 4 classes"),
    (lambda: CrossEntropy().fitted(LOGITS, 2 * SOFT), "probabilities that sum to 1"),
    (lambda: CrossEntropy().fitted(LOGITS, CLASSES + 3), r"must lie in 0\.\.3"),
    (lambda: CrossEntropy().fitted(LOGITS[:, :1], CLASSES), "two classes or more"),
    (lambda: BinaryCrossEntropy().fitted(LOGITS, FINDINGS[:, :2]), "one target for each number"),
    (lambda: BinaryCrossEntropy().fitted(LOGITS, 2 * FINDINGS), r"must lie in \[0, 1\]"),
    (lambda: MeanSquaredError().fitted(VALUES, CLASSES), "one target for each number"),
    (lambda: MeanSquaredError().fitted(VALUES, VALUES / 0), "is not finite"),
    (lambda: PixelCrossEntropy().fitted(LOGITS, CLASSES), "N x classes x spatial"),
    (lambda: PixelCrossEntropy().fitted(MAPS, PIXELS[:, :2]), "one class index for each"),
    (lambda: Dice().fitted(MAPS, PIXELS + 3), r"must lie in 0\.\.3"),
    (lambda: SumOfHeads({}), "needs finite weights"),
    (lambda: GivenLoss(lambda o, t: o)(LOGITS, CLASSES), r"a scalar tensor, not Tensor of shape"),
    (lambda: GivenLoss(lambda o, t: 1.0)(LOGITS, CLASSES), "a scalar tensor, not float"),
    (lambda: GivenLoss(own_loss).relaxed(LOGITS), "cannot be optimised"),
    (lambda: loss_from({"loss": "nothing"}), "the loss nothing is unknown"),
    (lambda: loss_from({"loss": "mse", "x": 1}), "description of the loss mse is broken"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_a_loss_cannot_use_is_refused_in_one_sentence(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_missing_last_dimension_is_no_square_of_pairs() -> None:
    outputs, targets = numbers(N, 1), numbers(N, seed=4)
    fitted = MeanSquaredError().fitted(outputs, targets)
    expected = (outputs[:, 0] - targets).square().mean()
    torch.testing.assert_close(MeanSquaredError()(outputs, fitted), expected)


def test_a_plugin_adds_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOSSES", copy.copy(losses._LOSSES))

    @register_loss
    class Quartic(Loss):
        """The fourth power of the error."""

        name = "quartic-of-a-test"
        targets = Targets.VALUES

        def __call__(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
            return (main_output(outputs) - targets).pow(4).mean()

    assert "quartic-of-a-test" in loss_names()
    assert isinstance(loss_from({"loss": "quartic-of-a-test"}), Quartic)
    with pytest.raises(ValueError, match="registered already"):
        register_loss(Quartic)


def test_whole_numbers_with_a_single_one_are_class_indices() -> None:
    logits, indices = torch.randn(4, 3), torch.tensor([2, 0, 1, 2])
    for one_hot in (F.one_hot(indices, 3), F.one_hot(indices, 3).bool()):
        assert torch.equal(CrossEntropy().fitted(logits, one_hot), indices)
    with pytest.raises(InputError, match="one class index for each"):
        CrossEntropy().fitted(logits, 2 * F.one_hot(indices, 3))
    with pytest.raises(InputError, match="numbers from -1 of shape"):
        CrossEntropy().fitted(logits, torch.tensor([[1.0, 1.0, -1.0]] * 4))
