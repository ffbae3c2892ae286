"""What was done to an update, told from its values; of plain updates nothing is said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from torch import nn

import gradinvbench as gib
from core.models.building import ModelSpec, build_model
from gradients.update_findings import statistics
from gradients.update_noise import law
from gradients.update_traces import Finding, Trace
from tests.targets import smooth_images


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2),
        nn.Sigmoid(),
        nn.Conv2d(12, 16, 5, 2, 2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.Sigmoid(),
        nn.Linear(32, 10),
    )


def dead_units() -> nn.Module:
    """ReLUs of which many are dead: zeros in rows, in columns, and of few images in neither."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    for layer in (model[2], model[5]):
        layer.bias.data -= 0.05  # type: ignore[operator, union-attr]
    return model


class Attention(nn.Module):
    """One block of a transformer on 4 x 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.block = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        out: torch.Tensor = self.head(self.block(tokens).mean(1))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "dead units": dead_units,
    "attention": Attention,
    "resnet": lambda: build_model(ModelSpec("resnet18", 10, 16, stem="cifar", width=8)),
    "group norm": lambda: build_model(ModelSpec("resnet18", 10, 16, "cifar", 8, norm="group")),
}
SETTINGS = [
    (1, None),
    (2, None),
    (8, None),
    (40, None),
    (8, "sgd lr=0.05 momentum=0.9 batches=2 epochs=2"),
    (8, "sgd lr=0.01 weight-decay=0.01 batches=4"),
    (8, "adamw lr=1e-3 batches=4"),
]


@cache
def shared(
    model: str, batch: int, local: str | None = None, defense: str = ""
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The state before, and the update in units of the learning rate."""
    torch.manual_seed(3)
    made = MODELS[model]()
    labels = torch.arange(batch) % 10
    target, _ = gib.share(
        made, smooth_images(batch, 16), labels, local=local, defense=defense, train_mode=False
    )
    return made.state_dict(), target.gradient


def findings(
    before: Mapping[str, torch.Tensor],
    gradient: Mapping[str, torch.Tensor],
    lr: float | None = None,
    max_norm: float | None = None,
) -> list[Finding]:
    """Of the gradient itself (no lr), or of weights after a step with it."""
    if lr is None:
        update = gib.read_update(before, gradient, kind="difference")
    else:
        after = {n: v - lr * gradient[n] if n in gradient else v for n, v in before.items()}
        update = gib.read_update(before, after, kind="weights")
    return [f for f in update.examine(max_norm) if f.trace.processing]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_said_of_plain_updates(model: str, setting: tuple[int, str | None]) -> None:
    before, gradient = shared(model, *setting)
    for lr in (None, 0.1, 1e-4):
        assert findings(before, gradient, lr) == []


# The defense, what it is found as, and the parameter that is told (of the gradient itself).
DEFENDED = [
    ("clip:1", Trace.CLIPPED_NORM, 1.0),
    ("clip:0.5", Trace.CLIPPED_NORM, 0.5),
    ("gaussian:1e-3", Trace.NOISE, 1e-3),
    ("gaussian:1e-2", Trace.NOISE, 1e-2),
    ("gaussian:0.1", Trace.NOISE, 0.1),
    ("laplace:1e-3", Trace.NOISE, math.sqrt(2) * 1e-3),
    ("laplace:0.1", Trace.NOISE, math.sqrt(2) * 0.1),
    ("percentile-noise:0.1", Trace.NOISE, None),
    ("percentile-noise:1", Trace.NOISE, None),
    ("prune:0.5", Trace.SPARSE, 0.5),
    ("prune:0.9", Trace.SPARSE, 0.9),
    ("topk:0.5", Trace.SPARSE, 0.5),
    ("topk:0.1", Trace.SPARSE, 0.9),
    ("quantize:4", Trace.QUANTISED, None),
    ("quantize:16", Trace.QUANTISED, None),
    ("quantize:64", Trace.QUANTISED, None),
    ("sign", Trace.SIGNS, None),
]


@pytest.mark.parametrize(("word", "trace", "value"), DEFENDED)
@pytest.mark.parametrize("model", ["perceptron", "convolutions"])
def test_every_defense_is_found_with_its_parameter(
    model: str, word: str, trace: Trace, value: float | None
) -> None:
    before, gradient = shared(model, 4, None, word)
    for lr in (None, 0.1):
        (found,) = findings(before, gradient, lr)
        assert found.trace is trace
        if value is not None:
            share = trace is Trace.SPARSE
            expected = value if share or lr is None else lr * value
            assert found.value == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("word", ["laplace:0.01", "gaussian:0.01"])
def test_the_shape_of_noise_is_told(word: str) -> None:
    (found,) = findings(*shared("perceptron", 4, None, word))
    assert found.certain
    assert ("Laplace" in found.evidence) == word.startswith("laplace")


def test_levels_of_quantising_are_those_of_its_definition() -> None:
    """QSGD's levels are multiples of norm / s of each tensor, computed here from the plain one."""
    (_, plain), (before, quantised) = (shared("convolutions", 4, None, w) for w in ("", "quantize"))
    (found,) = findings(before, quantised)
    norms = {float(plain[name].norm()) / 16 for name in found.tensors}
    assert found.value is not None
    assert min(abs(found.value / norm - 1) for norm in norms) < 1e-5


def test_a_stated_clipping_norm_is_compared() -> None:
    before, gradient = shared("perceptron", 4, None, "clip:0.7331")
    assert findings(before, gradient) == []
    (found,) = findings(before, gradient, max_norm=0.7331)
    assert found.certain
    assert findings(before, gradient, max_norm=0.74) == []
    (round_,) = findings(*shared("perceptron", 4, None, "clip:0.7"))
    assert not round_.certain


def test_values_cut_at_a_percentile_are_clipped_values() -> None:
    """What NVFlare's PercentilePrivacy does: small values to zero, large ones to a bound."""
    before, gradient = shared("convolutions", 4)
    flat = torch.cat([g.flatten() for g in gradient.values()]).abs()
    low, high = float(flat.quantile(0.1)), float(flat.quantile(0.99))
    cut = {n: torch.where(g.abs() < low, 0, g).clamp(-high, high) for n, g in gradient.items()}
    for lr in (None, 0.1):
        found = {f.trace: f for f in findings(before, cut, lr)}
        assert set(found) == {Trace.SPARSE, Trace.CLIPPED_VALUES}
        assert found[Trace.CLIPPED_VALUES].value == pytest.approx(high * (lr or 1), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_told_after_it_was_widened_again(dtype: torch.dtype) -> None:
    before, gradient = shared("convolutions", 4)
    rounded = {n: g.to(dtype).float() for n, g in gradient.items()}
    (found,) = findings(before, rounded)
    assert found.trace is Trace.HALF_PRECISION
    assert str(dtype).removeprefix("torch.") in found.evidence
    state = {n: (v - 0.1 * gradient[n]).to(dtype).float() for n, v in before.items()}
    update = gib.read_update(before, state, kind="weights")
    assert [f.trace for f in update.findings if f.trace.processing] == [Trace.HALF_PRECISION]


def test_the_first_step_of_adam_may_be_signs_and_nothing_else() -> None:
    cases = itertools.product(("perceptron", "attention", "group norm"), (None, 0.1, 1e-4))
    for model, lr in cases:
        (found,) = findings(*shared(model, 4, "adam lr=1e-3"), lr)
        assert found.trace is Trace.SIGNS
        assert not found.certain
        assert "Adam" in found.evidence


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_images_are_counted_by_the_rank(batch: int) -> None:
    """Against the singular values that NumPy finds, in float64."""
    import numpy

    before, gradient = shared("perceptron", batch)
    update = gib.read_update(before, gradient, kind="difference")
    (found,) = [f for f in update.findings if f.trace is Trace.STEPS]
    assert found.value == batch
    values = numpy.linalg.svd(gradient["1.weight"].double().numpy(), compute_uv=False)
    assert (values > 1e-5 * values[0]).sum() == batch
    noisy = gib.read_update(*shared("perceptron", batch, None, "gaussian:1e-4"), kind="difference")
    (under_noise,) = [f for f in noisy.findings if f.trace is Trace.STEPS]
    assert under_noise.value == batch


def test_batches_are_counted_exactly_where_batch_norm_tells() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 10))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(smooth_images(4, 16)).square().mean().backward()
        optimizer.step()
    update = gib.read_update(before, model.state_dict())
    steps = [f for f in update.findings if f.trace is Trace.STEPS and f.certain]
    assert [f.value for f in steps] == [3]
    kept = {n: v for n, v in model.state_dict().items() if "running" not in n}
    told = [f for f in gib.read_update(before, kept).findings if f.trace is Trace.STATISTICS]
    assert [f.evidence for f in told] == ["none of 2 running means and variances were sent"]
    assert told[0].tensors == ()
    assert statistics([], [], []) == []


def test_findings_are_printed_under_the_table() -> None:
    update = gib.read_update(*shared("perceptron", 4, None, "prune:0.9"), kind="difference")
    lines = str(update).splitlines()
    table = max(number for number, line in enumerate(lines) if line.startswith("+"))
    assert lines[table + 1].startswith("sparse: 90.0% of all elements")
    assert "sparse: 90.0%" in update._repr_html_()


@pytest.mark.parametrize("shape", [(16, 64), (40, 300), (64, 64)])
def test_the_law_of_noise_is_that_of_drawn_matrices(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(30, *shape, generator=generator, dtype=torch.float64)
    mean = torch.linalg.svdvals(drawn).mean(0) / math.sqrt(shape[1])
    assert float((mean - law(*shape)).abs().max()) < 0.02


def test_two_levels_near_each_other_are_no_grid() -> None:
    """Any two numbers are multiples of their difference, if it is small."""
    before = {"w": torch.zeros(40, 10), "b": torch.zeros(10)}
    signs = torch.ones(40, 10)
    signs[::2] = -1
    near = torch.where(torch.arange(10) < 5, 0.1, 0.0999725) * signs
    levels = torch.where(torch.arange(10) < 5, 0.1, 0.3) * signs
    bias = torch.linspace(0.01, 0.02, 10)
    said = [[f.trace for f in findings(before, {"w": w, "b": bias})] for w in (near, levels)]
    assert said == [[Trace.SIGNS], [Trace.QUANTISED]]


def test_a_counter_that_was_averaged_and_comes_back_as_a_whole_number_is_read() -> None:
    before = {"w": torch.ones(4, 4), "batches": torch.tensor(1.5)}
    after = {"w": torch.ones(4, 4) + 0.01, "batches": torch.tensor(3)}
    update = gib.read_update(before, after, kind="weights")
    assert float(update.change["batches"]) == 1.5
    assert update.findings is not None
