"""Compiled passes, few bits and other layouts: the same gradient, or a fall back and a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attack.loop.inversion import Inversion
from attack.matching.acceleration import (
    LOW_ACCEPTED_COSINE,
    AcceleratedMatcher,
    CapturedPass,
    lowered,
    product_precision,
)
from attack.matching.matcher import GradientMatcher, cosine_of_images
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.priors.regularizers import TOTAL_VARIATIONS, AnisotropicTV
from attack.settings import InversionConfig, SpeedSettings, told_by_flag
from core.errors import InputError
from core.models.building import ModelSpec
from core.target import LocalTraining, Target
from tests.targets import make_target

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 8, width=8)
CNN = ModelSpec("cnn", 10, 8, width=4)
FAST = InversionConfig(iterations=12, signed=False, tv=0.01, coordinates="dct")
TRACED = SpeedSettings(trace=True)


class WithoutCompiler(AcceleratedMatcher):
    def _faster(self, graph: Any, arguments: Any, changing: range) -> Any:
        raise RuntimeError("there is no C++ compiler\nand here is what to install")


def matcher_on(
    target: Target,
    acceleration: SpeedSettings = TRACED,
    kind: type[AcceleratedMatcher] = AcceleratedMatcher,
    hvp: str = "difference",
    dtype: torch.dtype = torch.float64,
    joint: bool = False,
) -> AcceleratedMatcher:
    return kind(Replica(target, CPU, dtype, joint), Cosine(), hvp, acceleration)


def candidate(target: Target) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((target.batch_size, *target.data.shape), generator=generator).double()


MODELS = [
    (LENET, False),
    (CNN, False),
    (CNN, True),
    (ModelSpec("resnet18", 10, 16, "cifar", width=4), True),
    (ModelSpec("resnet18", 10, 32, width=4), False),
]


@pytest.mark.parametrize(("spec", "train_mode"), MODELS, ids=lambda v: getattr(v, "arch", str(v)))
def test_traced_passes_are_the_passes(spec: ModelSpec, train_mode: bool) -> None:
    target, truth = make_target(spec, 2, train_mode=train_mode)
    plain = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "difference", False)
    traced = matcher_on(target)
    for shift in (0.0, 0.1):
        inputs = candidate(target) + shift
        expected, found = plain(inputs, truth.labels), traced(inputs, truth.labels)
        torch.testing.assert_close(found.value, expected.value)
        scale = float(expected.input_gradient.abs().max())
        torch.testing.assert_close(
            found.input_gradient, expected.input_gradient, rtol=0, atol=1e-6 * scale
        )
    assert traced.notes["trace"]
    assert not traced.notes["compile"]
    assert not traced.events
    assert len(traced._graphs) == 1


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torch.cuda a graph that runs its function again into the same memory."""
    nothing = contextlib.nullcontext()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake: dict[str, Any] = {"Stream": lambda: stream, "current_stream": lambda: stream}
    fake |= {"stream": lambda _: nothing, "graph": lambda _: nothing, "CUDAGraph": Replay}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)


class Replay:
    captured: CapturedPass

    def replay(self) -> None:
        with torch.no_grad():
            found = self.captured._function(*self.captured._held)
        for mine, now in zip(self.captured._results, found, strict=True):
            mine.copy_(now)


class CapturingMatcher(AcceleratedMatcher):
    def _faster(self, graph: Any, arguments: Any, changing: range) -> Any:
        captured = CapturedPass(graph, arguments, changing)
        captured._graph.captured = captured  # type: ignore[attr-defined]
        return captured


def test_captured_passes_keep_their_memory_to_themselves(replaying: None) -> None:
    target, truth = make_target(CNN, 2, train_mode=True)
    plain = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "difference", False)
    captured = matcher_on(target, kind=CapturingMatcher)
    given = [candidate(target) + shift for shift in (0.0, 0.1, 0.2)]
    before = [inputs.clone() for inputs in given]
    found = [captured(inputs, truth.labels).input_gradient for inputs in given]
    for inputs, gradient in zip(given, found, strict=True):
        expected = plain(inputs, truth.labels).input_gradient
        assert cosine_of_images(gradient, expected) > 0.999999
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert not captured.events
    for mine, shared in zip(captured.replica.parameters, plain.replica.parameters, strict=True):
        assert torch.equal(mine, shared)


def test_labels_and_penalties_ride_along_in_a_graph() -> None:
    target, truth = make_target(CNN, 2, train_mode=True)
    logits = torch.eye(10).double()[truth.labels]

    def penalty(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        seen: list[torch.Tensor] = []
        last = list(model.modules())[-1]
        handle = last.register_forward_pre_hook(lambda _, x: seen.append(x[0].square().mean()))

        def total() -> torch.Tensor:
            handle.remove()
            return seen[0]

        return total

    replica = Replica(target, CPU, torch.float64, joint=True)
    plain = GradientMatcher(replica, Cosine(), "difference", False)
    traced = matcher_on(target, joint=True)
    for apart in (False, True):
        more: Any = {"weight": 2.0, "penalty": penalty, "apart": apart}
        expected = plain(candidate(target), logits, **more)
        found = traced(candidate(target), logits, **more)
        for name in ("value", "input_gradient", "label_gradient", "penalty", "penalty_gradient"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not traced.events


@pytest.mark.parametrize("kind", TOTAL_VARIATIONS)
@pytest.mark.parametrize("balance", [None, 0.5])
def test_an_attack_of_traced_passes_and_priors_is_the_attack(
    kind: str, balance: float | None
) -> None:
    target, truth = make_target(CNN, 2, train_mode=True)
    # Two neighbours at the box's border are equal or not by rounding, and absolute differences
    # have a sign then.
    config = FAST.changed(tv_kind=kind, balance=balance, double=True, iterations=6, box=False)
    found, expected = (
        Inversion(target, truth.labels, config.changed(trace=trace), device=CPU, seed=3).run()
        for trace in (True, False)
    )
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    assert found.details["acceleration"]["trace"]
    for mine, theirs in zip(found.trace, expected.trace, strict=True):
        terms = [name for name in theirs if name.endswith("term")]
        assert {name: mine[name] for name in terms} == pytest.approx(
            {name: theirs[name] for name in terms}, rel=1e-6
        )


def test_a_prior_that_looks_at_values_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Choosy(AnisotropicTV):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__(images) * (2 if float(images.sum()) > 0 else 3)

    monkeypatch.setitem(TOTAL_VARIATIONS, "anisotropic", Choosy)
    target, truth = make_target(LENET, 1)
    config = FAST.changed(double=True, iterations=4, box=False)
    found, expected = (
        Inversion(target, truth.labels, config.changed(trace=trace), device=CPU, seed=3).run()
        for trace in (True, False)
    )
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith("--trace leaves the priors as they are: ")


@pytest.mark.slow
def test_the_compiler_itself_keeps_the_gradient() -> None:
    target, truth = make_target(LENET, 1, double=False)
    config = FAST.changed(compile=True, iterations=4)
    inversion = Inversion(target, truth.labels, config, device=CPU)
    found = inversion.run()
    notes = found.details["acceleration"]
    assert notes["compile"] or "is not used" in notes["events"][0]
    assert notes["compile_seconds"] > 0
    plain = config.changed(compile=False)
    expected = Inversion(target, truth.labels, plain, device=CPU).run()
    assert found.objective == pytest.approx(expected.objective, rel=1e-2)
    assert "acceleration" not in expected.details


def test_without_a_compiler_the_attack_goes_on_with_a_sentence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target, truth = make_target(LENET, 1)
    asked = SpeedSettings(trace=True, compile=True)
    failing = matcher_on(target, asked, WithoutCompiler, "auto")
    plain = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "auto", False)
    found = failing(candidate(target), truth.labels)
    assert torch.equal(found.input_gradient, plain(candidate(target), truth.labels).input_gradient)
    assert caplog.messages == ["--trace and --compile are not used: there is no C++ compiler"]
    assert not failing.notes["compile"]
    assert not failing.notes["trace"]
    failing(candidate(target), truth.labels)
    assert len(caplog.messages) == 1


def test_a_graph_that_parts_from_the_exact_gradient_is_given_up() -> None:
    class Wrong(AcceleratedMatcher):
        def _faster(self, graph: Any, arguments: Any, changing: range) -> Any:
            return lambda *given: [t + 1 for t in graph(*given)]

    target, truth = make_target(LENET, 1)
    wrong = matcher_on(target, kind=Wrong, hvp="auto")
    exact = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "exact")
    inputs = candidate(target)
    found = wrong(inputs, truth.labels).input_gradient
    assert cosine_of_images(found, exact(inputs, truth.labels).input_gradient) > 0.9999
    assert "part from the exact gradient" in wrong.events[0]
    assert not wrong.traced


def test_bf16_is_used_where_it_keeps_the_gradient_and_parameters_stay_float32() -> None:
    target, truth = make_target(CNN, 2, double=False)
    matcher = matcher_on(target, SpeedSettings(precision="bf16"), AcceleratedMatcher, "auto",
                         torch.float32)  # fmt: skip
    exact = GradientMatcher(Replica(target, CPU), Cosine(), "exact")
    inputs = candidate(target).float()
    found, expected = (m(inputs, truth.labels).input_gradient for m in (matcher, exact))
    cosine = cosine_of_images(found, expected)
    assert cosine > LOW_ACCEPTED_COSINE - 0.005
    assert (matcher.precision == "bf16") == (cosine < 0.9999)
    assert all(p.dtype == torch.float32 for p in matcher._moved)
    assert found.dtype == torch.float32


def test_few_bits_are_given_up_where_they_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attack.matching.acceleration.LOW_ACCEPTED_COSINE", 0.99999)
    target, truth = make_target(CNN, 2, double=False)
    config = FAST.changed(precision="bf16")
    found = Inversion(target, truth.labels, config, device=CPU).run()
    notes = found.details["acceleration"]
    assert notes["precision"] == "float32"
    assert "float32 is used" in notes["events"][0]
    plain = FAST.changed(precision="float32")
    expected = Inversion(target, truth.labels, plain, device=CPU).run()
    assert torch.equal(found.images, expected.images)


def test_channels_last_is_the_same_gradient() -> None:
    target, truth = make_target(CNN, 2, train_mode=True)
    layout = SpeedSettings(channels_last=True)
    for hvp in ("exact", "difference"):
        matcher = matcher_on(target, layout, AcceleratedMatcher, hvp)
        plain = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), hvp)
        inputs = candidate(target)
        found, expected = matcher(inputs, truth.labels), plain(inputs, truth.labels)
        torch.testing.assert_close(found.value, expected.value)
        torch.testing.assert_close(
            found.input_gradient, expected.input_gradient, rtol=1e-4, atol=1e-7
        )
        assert found.input_gradient.is_contiguous()


def test_settings_of_the_process_are_put_back() -> None:
    settings: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in settings]
    with product_precision("float32"):
        assert not any(each.allow_tf32 for each in settings)
        with lowered("tf32", "cpu"):
            assert all(each.allow_tf32 for each in settings)
        assert not any(each.allow_tf32 for each in settings)
    assert [each.allow_tf32 for each in settings] == before


def test_resumed_ends_as_uninterrupted(tmp_path: Path) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill(iteration: int, _: float) -> None:
        if iteration == 8:
            raise Killed

    target, truth = make_target(CNN, 2, double=False)
    config = FAST.changed(precision="bf16", channels_last=True)
    invert = [Inversion(target, truth.labels, config, device=CPU) for _ in range(3)]
    expected = invert[0].run()
    with pytest.raises(Killed):
        invert[1].run(print_every=1, report=kill, state_file=tmp_path / "state.pt", save_every=3)
    resumed = invert[2].run(state_file=tmp_path / "state.pt")
    assert torch.equal(resumed.images, expected.images)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cuda_graphs": True}, "--cuda-graphs needs a CUDA GPU, and this run is on cpu"),
        ({"precision": "tf32"}, "--precision tf32 needs a CUDA GPU"),
        ({"precision": "int8"}, "--precision int8: choose one of float32, tf32, bf16"),
        ({"precision": "bf16", "double": True}, "--double and --precision bf16"),
        ({"compile": True, "hvp": "exact"}, "--compile speeds up .* not with --hvp exact"),
        ({"trace": True, "hvp": "exact"}, "--trace speeds up .* not with --hvp exact"),
        ({"trace": True, "images_at_once": 1}, "--images-at-once: not with --trace"),
        ({"compile": True, "restarts_at_once": 2}, "not with --restarts-at-once"),
    ],
)
def test_what_excludes_each_other_is_refused(changes: dict[str, Any], sentence: str) -> None:
    target, truth = make_target(LENET, 1)
    with pytest.raises(InputError, match=sentence), told_by_flag():
        Inversion(target, truth.labels, FAST.changed(**changes), device=CPU)


def test_local_steps_have_no_difference_to_compile() -> None:
    target, truth = make_target(LENET, 2, local=LocalTraining(epochs=2, lr=0.05))
    with pytest.raises(InputError, match=r"speed\.compile speeds up the difference"):
        Inversion(target, truth.labels, FAST.changed(compile=True), device=CPU)
