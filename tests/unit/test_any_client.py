"""Clients of every kind: their gradient and its matching against plain autograd, in float64."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

import gradinvbench as gib
from attack.knowledge.labels import recover_labels
from attack.loop.inversion import Inversion
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.metrics.information_ratio import gradient_information
from core.errors import InputError
from gradients.inspect import format_report

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose, by one and the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 6)
        self.outer.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.sigmoid(self.inner(x)))


class Unused(nn.Module):
    """A layer that no pass reads, beside one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(6, 3)
        self.before.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.before(x)))


class Heads(nn.Module):
    """Two outputs, packed as asked."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.pack = pack

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.pack(self.main(h), self.aux(h))


def as_tuple(main: torch.Tensor, aux: torch.Tensor) -> Any:
    return main, aux


def as_dictionary(main: torch.Tensor, aux: torch.Tensor) -> Any:
    return {"aux": aux, "logits": main}


def as_object(main: torch.Tensor, aux: torch.Tensor) -> Any:
    return SimpleNamespace(hidden_states=None, logits=main)


def mlp(features: int, outputs: int) -> nn.Module:
    hidden = nn.Linear(features, 12), nn.Linear(12, 10)
    return nn.Sequential(
        nn.Flatten(), hidden[0], nn.Sigmoid(), hidden[1], nn.Tanh(), nn.Linear(10, outputs)
    )


def volume_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 2, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv3d(2, 2, 3, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 3, 1))


def signal_network() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 5), nn.Tanh(), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
                         nn.Linear(16, 2))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A client, and its loss as a textbook has it.

    Attributes:
        build: Makes the model.
        inputs: N x ...
        targets: N x ...
        loss: As given to `share`.
        textbook: From what the model gives and the targets to the loss.
        options: Of `share`.
    """

    build: Callable[[], nn.Module]
    inputs: torch.Tensor
    targets: torch.Tensor
    loss: Any
    textbook: Callable[[Any, torch.Tensor], torch.Tensor]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


def binary(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    p = outputs.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def soft(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * outputs.log_softmax(1)).sum(1).mean()


def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[targets]
    each = -outputs.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return (weights * each).sum() / weights.sum()


def quartic(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).pow(4).sum().sqrt()


ROWS, CLASSES = numbers(2, 6), torch.tensor([2, 0])
CASES = {
    "own module, MSE": Case(lambda: mlp(16, 4), numbers(2, 1, 4, 4), numbers(2, 4, seed=1), "mse",
                            squares),
    "one output": Case(lambda: mlp(16, 1), numbers(2, 1, 4, 4), numbers(2, 1, seed=1), nn.MSELoss(),
                       squares),
    "volume": Case(volume_network, numbers(1, 1, 16, 16, 16), torch.tensor([1]), None,
                   F.cross_entropy),
    "signal": Case(signal_network, numbers(2, 2, 20), torch.tensor([0, 1]), None, F.cross_entropy),
    "table": Case(lambda: mlp(6, 2), 5 * numbers(3, 6) - 2, numbers(3, 2, seed=1), "mae",
                  lambda o, t: (o - t).abs().mean(),
                  {"bounds": None, "mean": [0.5] * 6, "std": [2.0] * 6}),
    "several labels": Case(lambda: mlp(16, 5), numbers(2, 1, 4, 4), numbers(2, 5, seed=1).round(),
                           "binary-cross-entropy", binary),
    "one label": Case(lambda: mlp(16, 1), numbers(2, 1, 4, 4), torch.tensor([1, 0]),
                      "binary-cross-entropy", lambda o, t: binary(o, t[:, None])),
    "segmentation": Case(segmenter, numbers(2, 2, 6, 5), (3 * numbers(2, 6, 5, seed=1)).long(),
                         "pixel-cross-entropy",
                         lambda o, t: -o.log_softmax(1).gather(1, t[:, None]).mean()),
    "soft labels": Case(lambda: mlp(6, 3), ROWS, numbers(2, 3, seed=1).softmax(1), None, soft),
    "class weights": Case(lambda: mlp(6, 3), ROWS, CLASSES,
                          gib.CrossEntropy(weights=[1, 2, 5]), weighted),
    "given function": Case(lambda: mlp(6, 3), ROWS, numbers(2, 3, seed=1), quartic, quartic),
    "last layer": Case(lambda: mlp(6, 3), ROWS, CLASSES, None, F.cross_entropy,
                       {"shared": "5.*"}),
    "tied": Case(Tied, ROWS, numbers(2, 6, seed=1), "mse", squares),
    "unused and frozen": Case(Unused, ROWS, CLASSES, None, F.cross_entropy),
    "tuple": Case(lambda: Heads(as_tuple), ROWS, CLASSES, None,
                  lambda o, t: F.cross_entropy(o[0], t)),
    "dictionary": Case(lambda: Heads(as_dictionary), ROWS, CLASSES, None,
                       lambda o, t: F.cross_entropy(o["logits"], t)),
    "object": Case(lambda: Heads(as_object), ROWS, CLASSES, None,
                   lambda o, t: F.cross_entropy(o.logits, t)),
    "two heads": Case(lambda: Heads(as_tuple), ROWS, CLASSES, gib.SumOfHeads({0: 1.0, 1: 0.4}),
                      lambda o, t: F.cross_entropy(o[0], t) + 0.4 * F.cross_entropy(o[1], t)),
}  # fmt: skip


def shared(case: Case, **more: Any) -> tuple[gib.Target, gib.Truth, nn.Module]:
    model = seeded(case.build)
    options = {"loss": case.loss, **case.options, **more}
    target, truth = gib.share(model, case.inputs, case.targets, **options)
    return target, truth, model


@pytest.mark.parametrize("name", CASES)
def test_what_is_shared_is_the_gradient_of_the_textbook_loss(name: str) -> None:
    case = CASES[name]
    target, truth, model = shared(case)
    loss = case.textbook(model(target.data.normalize(case.inputs)), case.targets)
    named = {n: p for n, p in model.named_parameters() if n in target.gradient}
    exact = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    assert list(named) == list(target.gradient)
    for found, expected in zip(target.gradient.values(), exact, strict=True):
        torch.testing.assert_close(found, expected)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert list(target.gradient) == (trained if name != "last layer" else ["5.weight", "5.bias"])
    assert torch.equal(truth.inputs, case.inputs)


@pytest.mark.parametrize("hvp", ["exact", "difference"])
@pytest.mark.parametrize("name", CASES)
def test_matching_is_differentiated_as_plain_autograd_does(name: str, hvp: str) -> None:
    case = CASES[name]
    target, truth, model = shared(case)
    generator = torch.Generator().manual_seed(3)
    candidate = torch.randn(case.inputs.shape, generator=generator, dtype=torch.float64)
    x = candidate.clone().requires_grad_()
    named = dict(model.named_parameters())
    loss = case.textbook(model(x), case.targets)
    gradient = torch.autograd.grad(
        loss, [named[n] for n in target.gradient], create_graph=True, materialize_grads=True
    )
    dot = sum((a * b).sum() for a, b in zip(gradient, target.gradient.values(), strict=True))
    lengths = [sum(t.square().sum() for t in tensors) for tensors in
               (gradient, target.gradient.values())]  # fmt: skip
    distance = 1 - dot / (lengths[0] * lengths[1]).sqrt()  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(distance, x)
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), hvp)
    match = matcher(candidate, truth.targets)
    assert float(match.value) == pytest.approx(float(distance.detach()), abs=1e-10)
    cosine = F.cosine_similarity(match.input_gradient.flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 1 - (1e-10 if hvp == "exact" else 1e-6)
    solved = matcher.value(target.data.normalize(truth.inputs), truth.targets)
    assert float(solved) < 1e-10


@pytest.mark.parametrize("name", ["own module, MSE", "table", "several labels", "segmentation",
                                  "given function"])  # fmt: skip
def test_several_restarts_are_those_of_one_after_the_other(name: str) -> None:
    target, truth, _ = shared(CASES[name])
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "difference")
    batches = numbers(2, *truth.inputs.shape, seed=4)
    for found, one in zip(matcher.several(batches, truth.targets), batches, strict=True):
        expected = matcher(one, truth.targets)
        torch.testing.assert_close(found.value, expected.value)
        torch.testing.assert_close(found.input_gradient, expected.input_gradient, rtol=1e-4,
                                   atol=1e-7)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "relaxed"),
    [
        ("own module, MSE", lambda v: v),
        ("several labels", torch.sigmoid),
        ("last layer", lambda v: v.softmax(1)),
        ("segmentation", lambda v: v.softmax(1)),
    ],
)
@pytest.mark.parametrize("hvp", ["exact", "difference"])
def test_optimised_targets_have_a_derivative(name: str, relaxed: Any, hvp: str) -> None:
    case = CASES[name]
    target, _, model = shared(case)
    replica = Replica(target, CPU, torch.float64, joint=True)
    n = len(case.inputs)
    y = numbers(n, *replica.variables_shape(), seed=6).requires_grad_()
    x = numbers(*case.inputs.shape, seed=7)
    named = dict(model.named_parameters())
    outputs = model(target.data.normalize(x))
    loss = soft(outputs, relaxed(y)) if name == "last layer" else (
        -(relaxed(y) * outputs.log_softmax(1)).sum(1).mean() if name == "segmentation"
        else case.textbook(outputs, relaxed(y))
    )  # fmt: skip
    gradient = torch.autograd.grad(loss, [named[k] for k in target.gradient], create_graph=True)
    distance = Cosine().distance(list(gradient), list(target.gradient.values()))
    (expected,) = torch.autograd.grad(distance, y)
    match = GradientMatcher(replica, Cosine(), hvp)(target.data.normalize(x), y.detach())
    assert match.label_gradient is not None
    cosine = F.cosine_similarity(match.label_gradient.flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 1 - 1e-6


@pytest.mark.parametrize("steps", [1, 3])
def test_local_steps_are_those_of_torch(steps: int) -> None:
    case = CASES["several labels"]
    local = gib.LocalTraining(epochs=steps, lr=0.3, momentum=0.5)
    target, truth, model = shared(case, local=local)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        case.textbook(model(case.inputs), case.targets).backward()
        optimizer.step()
    for name, after in model.named_parameters():
        expected = (before[name] - after.detach()) / (0.3 * steps)
        torch.testing.assert_close(target.gradient[name], expected)
    solved = GradientMatcher(Replica(target, CPU, torch.float64), Cosine()).value(
        truth.inputs, truth.targets
    )
    assert float(solved) < 1e-10


def test_an_own_module_with_mse_gives_its_inputs_away() -> None:
    model = seeded(lambda: mlp(64, 6))
    target, truth = gib.share(model, numbers(1, 1, 8, 8), numbers(1, 6, seed=1), loss="mse")
    found = gib.invert(
        target, attack="inverting-gradients", targets=truth.targets, double=True, iterations=60,
        polish=400, tv=0.0, progress=False,
    )  # fmt: skip
    assert gib.evaluate(found, truth).to_frame()["psnr"].min() > 60


def test_optimised_values_are_found_with_the_inputs() -> None:
    model = seeded(lambda: mlp(16, 4))
    target, truth = gib.share(model, numbers(1, 1, 4, 4), numbers(1, 4, seed=1), loss="mse")
    found = gib.invert(target, attack="dlg", targets="optimise", double=True, iterations=60,
                       restarts=2, progress=False)  # fmt: skip
    assert found.labels.shape == (1, 4)
    assert gib.evaluate(found, truth).to_frame()["psnr"].min() > 40
    torch.testing.assert_close(found.labels, truth.targets, atol=0.02, rtol=0)


@pytest.mark.parametrize("attack", ["analytic", "r-gap"])
def test_closed_forms_do_not_ask_for_the_loss(attack: str) -> None:
    model = seeded(lambda: mlp(16, 4))
    target, truth = gib.share(model, numbers(1, 1, 4, 4), numbers(1, 4, seed=1), loss="mse")
    found = gib.invert(target, attack=attack, targets=truth.targets, progress=False)
    torch.testing.assert_close(found.images.double(), truth.inputs, atol=1e-5, rtol=0)


def test_inputs_without_bounds_are_neither_boxed_nor_clamped() -> None:
    model = seeded(lambda: mlp(6, 4))
    rows = 20 * numbers(1, 6) - 10
    target, truth = gib.share(model, rows, numbers(1, 4, seed=1), loss="mse", bounds=None,
                              std=[5.0] * 6)  # fmt: skip
    found = gib.invert(target, attack="analytic", targets=truth.targets)
    torch.testing.assert_close(found.images.double(), rows, atol=1e-4, rtol=1e-5)
    assert float(found.images.max()) > 1 or float(found.images.min()) < 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_few_bits_is_computed_in_float32(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(lambda: mlp(6, 3)).to(dtype)
    with caplog.at_level(logging.WARNING):
        target, truth = gib.share(model, ROWS, CLASSES)
    assert "computed in float32" in caplog.text
    assert next(model.parameters()).dtype == dtype
    exact = model.float()
    loss = F.cross_entropy(exact(ROWS.float()), CLASSES)
    for found, expected in zip(
        target.gradient.values(), torch.autograd.grad(loss, list(exact.parameters())), strict=True
    ):
        torch.testing.assert_close(found, expected)
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "exact")
    assert float(matcher.value(ROWS, truth.labels)) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_a_file_keeps_the_client(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    target, truth, _ = shared(case)
    path = tmp_path / "target.tar"
    gib.save_target(path, target, truth, builder="own.models:build")
    given = {"loss": case.loss} if name == "given function" else {}
    read, again = gib.load_target(path, build=lambda: seeded(case.build), **given)
    assert again is not None
    assert read.loss.describe() == target.loss.describe()
    assert read.data == target.data
    torch.testing.assert_close(again.inputs.double(), truth.inputs, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.targets, truth.targets)
    inputs = target.data.normalize(truth.inputs)
    values = [
        GradientMatcher(Replica(one, CPU, torch.float64), Cosine()).value(inputs, truth.targets)
        for one in (target, read)
    ]
    assert values[0] == values[1]
    report = format_report(read, again)
    plain = target.loss.describe() == gib.CrossEntropy().describe()
    assert ("\nloss " in report) != plain
    assert f"{target.batch_size} images" in report


@pytest.mark.parametrize("name", ["own module, MSE", "segmentation", "volume"])
def test_an_interrupted_inversion_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    target, truth, _ = shared(CASES[name])
    config = gib.Settings(iterations=6, joint_labels=name != "volume", tv=0.0, signed=False)

    def run(iterations: int, state: Path | None) -> gib.Reconstruction:
        changed = config.changed(iterations=iterations, schedule="constant")
        inversion = Inversion(target, truth.targets, changed, device=CPU)
        return inversion.run(state_file=state, save_every=3)

    run(3, tmp_path / "state.pt")
    resumed, whole = run(6, tmp_path / "state.pt"), run(6, None)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.labels, whole.labels)


def test_only_files_of_other_clients_are_closed_to_earlier_readers(tmp_path: Path) -> None:
    picture = numbers(2, 1, 4, 4)
    versions = []
    for loss, targets in ((None, [0, 1]), ("mse", numbers(2, 3))):
        target, truth = gib.share(seeded(lambda: mlp(16, 3)), picture, targets, loss=loss)
        gib.save_target(tmp_path / "t.tar", target, truth, builder="own.models:build")
        raw = torch.load(tmp_path / "t.tar", weights_only=False)
        versions.append((raw["format_version"], "loss" in raw, "bounded" in raw["data"]))
    assert versions == [(1, False, False), (2, True, False)]


def test_a_given_loss_is_named_in_a_file_and_never_run_from_it(tmp_path: Path) -> None:
    case = CASES["given function"]
    target, _, _ = shared(case)
    gib.save_target(tmp_path / "t.tar", target, builder="own.models:build")
    with pytest.raises(InputError, match=r"test_any_client:quartic.*load_target\(path, loss="):
        gib.load_target(tmp_path / "t.tar", build=lambda: seeded(case.build))
    hidden = dataclasses.replace(target, loss=gib.GivenLoss(lambda o, t: quartic(o, t)))
    with pytest.raises(InputError, match="source='module:function'"):
        gib.save_target(tmp_path / "t.tar", hidden, builder="own.models:build")


class Shifted(nn.Module):
    """A deformable convolution, which torchvision gives one derivative only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        shifts, weight = x.new_zeros(n, 2, height, width), x.new_ones(1, channels, 1, 1)
        found: torch.Tensor = deform_conv2d(x, shifts, weight)
        return found


def broken_target(**changes: Any) -> gib.Target:
    target, _, _ = shared(CASES["own module, MSE"])
    return dataclasses.replace(target, **changes)


def with_gradient(change: Callable[[dict[str, torch.Tensor]], None]) -> gib.Target:
    gradient = dict(broken_target().gradient)
    change(gradient)
    return broken_target(gradient=gradient)


def share(**changes: Any) -> Any:
    case = CASES["own module, MSE"]
    given = {"inputs": case.inputs, "targets": case.targets, "loss": case.loss} | changes
    return gib.share(given.pop("model", seeded(case.build)), **given)


def invert(target: gib.Target, **options: Any) -> Any:
    return gib.invert(target, **{"iterations": 2, "progress": False, **options})


def invert_twice_derived(**options: Any) -> Any:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid(), Shifted(), mlp(16, 4))
    target, truth = share(model=model)
    return invert(target, targets=truth.targets, **options)


def rename(gradient: dict[str, torch.Tensor]) -> None:
    gradient["1.weigth"] = gradient.pop("1.weight")


def spoil(gradient: dict[str, torch.Tensor]) -> None:
    gradient["1.bias"] = gradient["1.bias"] / 0


def cut(gradient: dict[str, torch.Tensor]) -> None:
    gradient["1.weight"] = gradient["1.weight"][:2]


VALUES = numbers(2, 4)
PLAIN = {"attack": "modern", "balance": None}
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: invert(with_gradient(rename), targets=VALUES), r"1\.weigth .*nearest is 1\.weight"),
    (lambda: invert(with_gradient(spoil), targets=VALUES), r"update of 1\.bias is not finite"),
    (lambda: invert(with_gradient(cut), targets=VALUES), r"1\.weight has shape \(2, 16\).*\(12"),
    (lambda: invert(broken_target(gradient={}), targets=VALUES), "holds no parameter"),
    (lambda: invert(broken_target()), "give the targets, or optimise them"),
    (lambda: invert(broken_target(), targets=VALUES[:, :3]), "one target for each number"),
    (lambda: invert(broken_target(), targets=VALUES, labels=VALUES), "not both"),
    (lambda: invert(broken_target(), targets="optimize"), "did you mean optimise"),
    (lambda: invert(broken_target(), targets="optimise", attack="analytic"), "does not optimise"),
    (lambda: invert(broken_target(), targets="optimise", attack="e2egi"), "cannot be combined"),
    (lambda: invert(broken_target(), targets=VALUES, attack="idlg"), "idlg is made for clients"),
    (lambda: invert(broken_target(), targets=VALUES, attack="fishing"), "fishing is made for"),
    (lambda: invert(broken_target(), targets=VALUES, features=0.1, **PLAIN),
     "--features.*is for clients"),
    (lambda: invert(broken_target(), attack="auto"), "give its targets"),
    (lambda: recover_labels("llg", broken_target()), "recovery llg is for clients"),
    (lambda: gradient_information(broken_target(), share()[1]), "is defined for cross-entropy"),
    (lambda: share(loss=lambda o, t: (o - t).square()), r"scalar tensor, not Tensor of shape"),
    (lambda: share(loss=lambda o, t: (o - t).detach().mean()), "no derivative in the model's"),
    (lambda: share(loss=lambda o, t: (o @ t).mean()), "does not take the model's outputs"),
    (lambda: share(loss="msee"), "the loss msee is unknown"),
    (lambda: share(inputs=numbers(2, 1, 5, 4)), r"1 x 5 x 4: .*mat1 and mat2 shapes"),
    (lambda: share(inputs=numbers(2)), r"N x C x D x H x W.*N x F"),
    (lambda: share(bounds=(-1, 1)), r"bounds must be \(0, 1\) or None"),
    (lambda: share(inputs=numbers(2, 1, 4, 4) - 1), "bounds=None"),
    (lambda: share(inputs=numbers(2, 1, 4, 4) / 0, bounds=None), "not finite"),
    (lambda: share(shared="haed.*"), r"fits 'haed\.\*'; the nearest is"),
    (lambda: share(model=seeded(Unused), inputs=ROWS, loss=None, targets=CLASSES,
                   shared="before.bias"), "are frozen, there is nothing"),
    (lambda: share(images=VALUES), "give inputs once"),
    (lambda: share(loss=gib.CrossEntropy(weights=[1, 2, 3, 4]), targets=[0, 1], defense="clip:1",
                   local=gib.LocalTraining(), train_mode=True) and broken_target(
                       loss=gib.CrossEntropy(weights=[1, 2, 3, 4]), shards=(1, 1)),
     "cannot be spread over 2 processes"),
    (lambda: invert_twice_derived(hvp="exact"), r"the module 2 \(Shifted\) cannot be diff.*hvp="),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_used_is_refused_in_one_sentence(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_difference_needs_one_derivative_only() -> None:
    assert invert_twice_derived(hvp="difference").iterations == 2


def test_images_and_labels_are_other_names() -> None:
    case = CASES["own module, MSE"]
    one = gib.share(seeded(case.build), case.inputs, case.targets, loss="mse")[0]
    two = gib.share(seeded(case.build), images=case.inputs, labels=case.targets, loss="mse")[0]
    for name, gradient in one.gradient.items():
        assert torch.equal(gradient, two.gradient[name])


def test_every_loss_has_a_line() -> None:
    assert all(gib.losses().values())
    assert {"mse", "dice", "cross-entropy"} <= set(gib.losses())


class Detached(nn.Linear):
    """A model in a user's evaluation wrapper."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_outputs_without_a_derivative_are_one_sentence() -> None:
    inputs, labels = numbers(2, 6), [0, 1]
    with pytest.raises(InputError, match=r"Detached do not depend.*torch\.no_grad"):
        gib.share(seeded(lambda: Detached(6, 3)), inputs, labels)
    frozen = seeded(lambda: nn.Linear(6, 3)).requires_grad_(False)
    with pytest.raises(InputError, match="every parameter of the model is frozen"):
        gib.share(frozen, inputs, labels)
