"""Models of any kind are shared and matched as plain double backward says."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import gradinvbench as gib
from attack.matching.acceleration import AcceleratedMatcher
from attack.matching.held_state import RandomNumbers
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import L2, Cosine
from attack.matching.replica import Replica
from attack.matching.second_derivative import refuse_silent_gaps
from attack.priors.regularizers import shared_features
from attack.settings import SpeedSettings
from benchmarks.models import published
from benchmarks.models.apart import _death, _within_memory
from benchmarks.models.cases import Case
from benchmarks.models.measure import (
    BATCH,
    CPU,
    ENOUGH,
    MODES,
    Agreement,
    agreement,
    agreements,
)
from benchmarks.models.own_modules import CHANNELS, N_CLASSES, OWN_MODULES, SIDE
from benchmarks.models.published import (
    Published,
    narrow_classifiers,
    timm_classifiers,
    torchvision_classifiers,
)
from benchmarks.models.record import Record
from core.models.head import head_for
from core.models.unchanged import buffers_of, in_mode, unchanged
from core.target import Target, Truth
from gradients.checkpoint import load_target, save_target

SHAPE = (CHANNELS, SIDE, SIDE)
REFUSED = {
    "checkpointed block, reentrant": "Checkpointed checkpoints a block with use_reentrant=True",
    "TorchScript": "Sequential is TorchScript",
}
MOVING = [name for name in OWN_MODULES if name.startswith(("spectral", "moving", "InstanceNorm w"))]
# Of torchvision's families those whose smallest member takes few seconds.
SMALL = (
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
WORDS = ("ropout", "noise", "depth", "DropBlock", "RReLU", "Encoder", "checkpointed block")
RANDOM = [name for name in OWN_MODULES if any(word in name for word in WORDS)]
TAKEN = [name for name in OWN_MODULES if name not in REFUSED]


def shared(name: str, train: bool = True) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    model = in_mode(OWN_MODULES[name](), train)
    return gib.share(model, torch.rand(BATCH, *SHAPE), torch.arange(BATCH))


@pytest.mark.parametrize("name", list(OWN_MODULES))
def test_an_own_module_agrees_or_says_why_not(name: str) -> None:
    for found in agreements(name, OWN_MODULES[name], SHAPE, N_CLASSES):
        if name in REFUSED:
            assert REFUSED[name] in found.refusal
            continue
        assert found.refusal == ""
        assert found.agrees, found
        assert (found.automatic or 0) >= ENOUGH, found
        assert found.chosen == "difference"


def published_models() -> list[Published]:
    """The small ones and narrow ones; with GRADINVBENCH_ALL_MODELS set, all there are."""
    everything = [*torchvision_classifiers(), *timm_classifiers()]
    if os.environ.get("GRADINVBENCH_ALL_MODELS"):
        return [*everything, *narrow_classifiers()]
    return [*(model for model in everything if model.name in SMALL), *narrow_classifiers()]


@pytest.mark.parametrize("model", published_models(), ids=lambda model: model.name)
def test_a_published_model_agrees(model: Published) -> None:
    shape = (3, model.side, model.side)
    for found in agreements(model.name, model.build, shape, published.N_CLASSES):
        assert found.refusal == ""
        assert found.agrees, found


@pytest.mark.parametrize("name", [n for n in TAKEN if n not in RANDOM])
def test_restarts_together_equal_single_ones(name: str) -> None:
    target, truth = shared(name)
    matcher = GradientMatcher(Replica(target, CPU), Cosine(), "difference")
    inputs = torch.rand(2, BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))
    for one, together in zip(inputs, matcher.several(inputs, truth.labels), strict=True):
        alone = matcher(one, truth.labels)
        torch.testing.assert_close(alone.value, together.value, rtol=1e-4, atol=1e-6)
        cosine = torch.cosine_similarity(
            alone.input_gradient.flatten(), together.input_gradient.flatten(), dim=0
        )
        assert cosine >= ENOUGH


@pytest.mark.parametrize("name", [n for n in RANDOM if n not in REFUSED])
def test_restarts_with_random_masks_run_one_by_one(name: str) -> None:
    target, truth = shared(name)
    matcher = GradientMatcher(Replica(target, CPU), Cosine(), "difference")
    inputs = torch.rand(2, BATCH, *SHAPE)
    torch.manual_seed(1)
    together = matcher.several(inputs, truth.labels)
    torch.manual_seed(1)
    for one, match in zip(inputs, together, strict=True):
        alone = matcher(one, truth.labels)
        torch.testing.assert_close(match.input_gradient, alone.input_gradient)


@pytest.mark.parametrize("hvp", ["exact", "difference", "auto"])
@pytest.mark.parametrize("name", MOVING)
def test_an_evaluation_changes_no_later_one(name: str, hvp: str) -> None:
    target, truth = shared(name)
    target_64 = {n: g.double() for n, g in target.gradient.items()}
    assert all(g.isfinite().all() for g in target_64.values())
    matcher = GradientMatcher(Replica(target, CPU), L2(), hvp)
    true = target.data.normalize(truth.images)
    candidate = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))
    first = matcher(candidate, truth.labels)
    at_truth = float(matcher.value(true, truth.labels))
    scale = sum(float(g.square().sum()) for g in target_64.values())
    assert at_truth < 1e-10 * scale
    for _ in range(5):
        again = matcher(candidate, truth.labels)
        assert torch.equal(again.input_gradient, first.input_gradient)
    assert float(matcher.value(true, truth.labels)) == at_truth


@pytest.mark.parametrize("name", MOVING)
def test_unchanged_puts_everything_back(name: str) -> None:
    torch.manual_seed(0)
    model = in_mode(OWN_MODULES[name](), True)
    x = torch.rand(2, *SHAPE)
    moved = [(each, each.tensor, each.tensor.clone()) for each in buffers_of(model)]
    model(x)
    now = [(each, each.tensor, each.tensor.clone()) for each in buffers_of(model)]
    # The test would pass for nothing if no buffer moved.
    assert any(not torch.equal(a, b) for (_, _, a), (_, _, b) in zip(moved, now, strict=True))
    with unchanged(model):
        model.eval()(x)
        model.train()(x)
    assert model.training
    for each, tensor, value in now:
        assert each.tensor is tensor
        assert torch.equal(tensor, value)


def test_a_matcher_of_a_model_that_ran_can_be_made() -> None:
    target, truth = shared("weight norm by hook")
    matcher = GradientMatcher(Replica(target, CPU), Cosine(), "difference")
    matcher(truth.images, truth.labels)
    match = matcher.exact()(truth.images, truth.labels)
    assert float(match.value) < 1e-6


def test_the_same_random_numbers_are_drawn_again() -> None:
    torch.manual_seed(0)
    numbers = RandomNumbers(CPU)
    assert not numbers.drawn
    first = torch.rand(3)
    assert numbers.drawn
    after = torch.rand(2)
    numbers.rewind()
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(2), after)


def test_graphs_are_not_used_where_masks_are_drawn() -> None:
    target, truth = shared("Dropout")
    speed = SpeedSettings(compile=True)
    matcher = AcceleratedMatcher(Replica(target, CPU), Cosine(), "auto", speed)
    candidate = torch.rand(BATCH, *SHAPE)
    torch.manual_seed(1)
    found = matcher(candidate, truth.labels)
    assert "draws random numbers" in matcher.events[0]
    assert matcher.step is not None
    torch.manual_seed(1)
    plain = GradientMatcher(Replica(target, CPU), Cosine(), "auto")(candidate, truth.labels)
    # Late layers are factored in one of them only.
    both = (found.input_gradient.flatten(), plain.input_gradient.flatten())
    assert torch.cosine_similarity(*both, dim=0) >= ENOUGH


def test_a_model_of_the_front_door_is_the_one_inside_its_wrapper() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    wrapped = torch.compile(nn.DataParallel(plain), backend="eager")
    images, labels = torch.rand(2, *SHAPE), torch.tensor([0, 1])
    expected, _ = gib.share(plain, images, labels)
    found, _ = gib.share(wrapped, images, labels)  # type: ignore[arg-type]
    assert list(found.gradient) == list(expected.gradient)
    assert all(torch.equal(g, expected.gradient[n]) for n, g in found.gradient.items())


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "lazy layers", "SyncBatchNorm"])
def test_a_file_of_it_is_read_again(name: str, tmp_path: Path) -> None:
    target, truth = shared(name)
    path = tmp_path / "update.tar"
    save_target(path, target, truth, builder="somewhere:build")
    read, _ = load_target(path, build=OWN_MODULES[name])
    assert all(torch.equal(value, target.state_dict[n]) for n, value in read.state_dict.items())
    matcher = GradientMatcher(Replica(read, CPU), Cosine(), "exact")
    assert float(matcher.value(truth.images, truth.labels)) < 1e-6


def test_a_file_whose_statistics_are_infinite_is_refused(tmp_path: Path) -> None:
    target, truth = shared("BatchNorm")
    target.state_dict["1.running_mean"][0] = float("inf")
    save_target(tmp_path / "update.tar", target, truth, builder="somewhere:build")
    with pytest.raises(gib.InputError, match=r"1.running_mean is not finite"):
        load_target(tmp_path / "update.tar", build=OWN_MODULES["BatchNorm"])


def test_soteria_and_the_feature_prior_find_the_head() -> None:
    torch.manual_seed(0)
    model = OWN_MODULES["unused parameters"]()
    images, labels = torch.rand(2, *SHAPE), torch.arange(2)
    target, _ = gib.share(model, images, labels, defense="soteria:0.5")
    assert int((target.gradient["head.weight"] == 0).all(0).sum()) == 64
    honest, _ = gib.share(model, images[:1], labels[:1])
    features = shared_features(honest, labels[:1], head_for(model, honest.data)[0])
    seen: list[torch.Tensor] = []
    model.get_submodule("head").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(images[:1])
    torch.testing.assert_close(features, seen[0].detach(), rtol=1e-3, atol=1e-5)


def test_the_page_shows_the_record() -> None:
    root = Path(__file__).resolve().parents[2]
    record = Record.read(root / "results" / "models")
    assert (root / "docs" / "models.md").read_text(encoding="utf-8") == record.page()
    # Whatever falls short says why.
    for rows in record.rows.values():
        assert all(row.agrees or row.refusal or row.avoids_the_difference for row in rows)
        short = [row for row in rows if row.automatic is not None and row.automatic < ENOUGH]
        assert all(row.plain is not None and row.distance is not None for row in short)


ONE_VALUE = {
    "vectors": (nn.Flatten(), nn.BatchNorm1d(48)),
    "maps of one pixel": (nn.Flatten(), nn.Unflatten(1, (48, 1, 1)), nn.BatchNorm2d(48)),
}


@pytest.mark.parametrize("kind", ONE_VALUE)
def test_batch_norm_of_one_value_is_calibrated_on_two_large_images(kind: str) -> None:
    # Of a batch of so many values one image is enough elsewhere; of one value there is no variance.
    def build() -> nn.Module:
        layers = (nn.AdaptiveAvgPool2d(4), *copy.deepcopy(ONE_VALUE[kind]), nn.Tanh())
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, N_CLASSES))

    for row in agreements("vectors", build, (3, 224, 224), N_CLASSES):
        assert row.agrees, row


class _Detached(torch.autograd.Function):
    """The square, whose backward pass loses what it depends on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.kept * slope


class _Squares(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Detached.apply(x)


def test_a_second_derivative_that_lacks_a_part_names_the_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), _Squares(), nn.Flatten(), nn.Linear(144, 5))
    target, _ = gib.share(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    matcher = GradientMatcher(Replica(target, CPU), Cosine(), "auto")
    with pytest.raises(gib.InputError, match=r"the module 1 \(_Squares\) has a second derivative"):
        matcher(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))


class _Once(torch.autograd.Function):
    """The square, of which torch is told that it has one derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class _OnceSquares(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Once.apply(x)


class _CubesTwice(nn.Module):
    """Of a function of its own that lacks nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Cube.apply(x)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * slope


def client_of(module: nn.Module, local: str) -> Target:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), module, nn.Flatten(), nn.Linear(144, 5))
    return gib.share(nn.Sequential(*layers), torch.rand(2, *SHAPE), [0, 1], local=local)[0]


ONE, SEVERAL, MANY = "sgd lr=0.1", "sgd lr=0.01 steps=3", "sgd lr=0.001 steps=17"


@pytest.mark.parametrize("hvp", ["auto", "exact"])
@pytest.mark.parametrize("local", [ONE, SEVERAL, MANY])
@pytest.mark.parametrize("module", [_Squares(), _OnceSquares()], ids=["detached", "once"])
def test_a_module_without_a_second_derivative_is_named(
    module: nn.Module, local: str, hvp: str
) -> None:
    name = type(module).__name__
    advice = "set hvp='difference'" if local == ONE else "several local steps need it; local_steps"
    target = client_of(module, local)
    with pytest.raises(gib.InputError) as caught:
        gib.invert(target, hvp=hvp, labels=[0, 1], iterations=1, progress=False)
    sentence = str(caught.value)
    assert sentence.startswith(f"the module 1 ({name}) ")
    assert "lacks a part" in sentence or "cannot be differentiated twice" in sentence
    assert advice in sentence
    assert "\n" not in sentence


def test_what_the_sentence_advises_works() -> None:
    for module in (_Squares(), _OnceSquares()):
        target = client_of(module, ONE)
        gib.invert(target, hvp="difference", labels=[0, 1], iterations=2, progress=False)
        target = client_of(module, SEVERAL)
        options = {"hvp": "difference", "local_steps": "one", "iterations": 2, "progress": False}
        gib.invert(target, labels=[0, 1], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("local", [ONE, SEVERAL])
def test_a_function_of_ones_own_that_lacks_nothing_is_taken(local: str) -> None:
    target = client_of(_CubesTwice(), local)
    gib.invert(target, hvp="exact", labels=[0, 1], iterations=2, progress=False)


def test_no_module_of_torch_is_said_to_lack_a_part() -> None:
    # Two that are refused before, and one that is taken out of its wrapper.
    others = ("TorchScript", "checkpointed block, reentrant", "DataParallel")
    for name, build in OWN_MODULES.items():
        if name not in others:
            torch.manual_seed(0)
            model, inputs = build().float(), torch.rand(4, CHANNELS, SIDE, SIDE)
            numbers = RandomNumbers(CPU)
            refuse_silent_gaps(model, inputs)
            # Masks of the pass that follows are those that would have come without it.
            assert not numbers.drawn


def case(build: Any) -> Case:
    return Case("own", "mine", build, SHAPE, N_CLASSES)


def test_a_model_that_outgrows_the_memory_has_a_row_that_says_so() -> None:
    def large() -> nn.Module:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    row = _within_memory(case(large), "train", 7)
    assert row.refusal == "not measured: it takes more than 7 GiB of memory"
    assert (row.model, row.mode) == ("mine", "train")

    def broken() -> nn.Module:
        raise RuntimeError("a fault of the model's own")

    with pytest.raises(RuntimeError, match="a fault of the model's own"):
        _within_memory(case(broken), "eval", 7)


def test_a_row_says_how_its_process_ended() -> None:
    assert _death(-11) == "not measured: the process ended with signal SIGSEGV"
    assert _death(1) == "not measured: the process ended with status 1"


def test_rows_that_were_not_measured_are_not_counted(tmp_path: Path) -> None:
    record = Record.read(tmp_path)
    rows = [agreement("a", OWN_MODULES["no special layer"], SHAPE, N_CLASSES, m) for m in MODES]
    record.add("own", rows)
    record.add("own", [Agreement("b", mode, SHAPE, refusal=_death(-9)) for mode in MODES])
    record.write()
    page = Record.read(tmp_path).page()
    assert "\n1 measured so far." in page
    assert "SIGKILL" in page


def test_a_strided_convolution_of_few_channels_keeps_the_plain_layout() -> None:
    # oneDNN writes outside of memory in its backward pass, see `attack.matching.replica`.
    images = torch.rand(1, 3, 16, 16)
    for kernel, plain in ((1, True), (3, False)):
        layers = (nn.Conv2d(3, 8, kernel, 2), nn.Flatten(), nn.LazyLinear(5))
        target, _ = gib.share(nn.Sequential(*layers), images, [0])
        layout = Replica(target, CPU).layout
        assert (layout == torch.contiguous_format) == plain


class _ThroughNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.from_numpy(x.detach().numpy()).flatten(1))


def test_a_model_that_cuts_the_path_to_its_inputs_is_refused_by_what_optimises() -> None:
    target, truth = gib.share(_ThroughNumpy(), torch.rand(1, 3, 8, 8), torch.tensor([1]))
    with pytest.raises(gib.InputError, match=r"do not depend on its inputs .* NumPy"):
        gib.invert(target, iterations=2, progress=False)
    # What needs no derivative still works.
    found = gib.invert(target, attack="analytic", progress=False)
    assert float(gib.evaluate(found, truth).to_frame()["psnr"].min()) > 60


class _RecomputedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, x.flatten(1), use_reentrant=False))


def test_linear_layers_in_a_checkpointed_block_agree_with_plain_autograd() -> None:
    # Their gradients are better kept as products, which a block computed again does not see.
    for row in agreements("recomputed", _RecomputedLinear, (3, 8, 8), N_CLASSES):
        assert row.agrees, row
