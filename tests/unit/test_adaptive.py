"""An attacker who is told of the defense is no worse, and where it matters much better."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from attack.attacks.spectral import Spectral
from attack.knowledge.known_defenses import _STEPS, Adaptation, adapt
from attack.loop.inversion import Inversion
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import L2, Cosine
from attack.matching.replica import Replica
from attack.metrics import assign, psnr
from attack.settings import InversionConfig
from core.models.building import ModelSpec, build_model, last_linear
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.defenses import ClientView, apply_defenses, defense_names, parse_defenses
from gradients.private_gradient import PrivacySettings
from tests.targets import data_spec, make_target, smooth_images

CPU = torch.device("cpu")


@functools.cache
def undefended() -> tuple[Target, Truth]:
    return make_target(ModelSpec("cnn", 10, 16, width=16), 1, double=False)


def defended(words: str) -> tuple[Target, Truth]:
    target, truth = undefended()
    defenses = parse_defenses(words)
    view = ClientView(
        model=target.build_model(),
        images=target.data.normalize(truth.images),
        labels=truth.labels,
        generator=torch.Generator().manual_seed(0),
    )
    shared = apply_defenses(defenses, target.gradient, view)
    stated = tuple(defense.word for defense in defenses)
    return dataclasses.replace(target, gradient=shared, defenses=stated), truth


def attack(words: str, adaptive: bool, **changes: object) -> float:
    """Mean PSNR of a short inversion with known labels."""
    target, truth = defended(words)
    config = Spectral.published.changed(iterations=150, race=0, adaptive=adaptive)
    config = config.changed(**changes)
    images = Inversion(target, truth.labels, config, device=CPU).run().images
    return float(psnr(images[assign(images, truth.images)], truth.images).mean())


# Margin in dB by which knowing the defense pays.
PAYS = [("sign", 3), ("soteria:0.8", 3), ("prune:0.9", 3), ("quantize:4", 0.5), ("topk:0.01", -0.5)]


@pytest.mark.parametrize(("words", "margin"), PAYS, ids=str)
def test_knowing_the_defense_pays(words: str, margin: float) -> None:
    assert attack(words, True) > attack(words, False) + margin


def test_differences_are_of_no_use_after_clipping() -> None:
    naive = {"objective": "L2", "balance": None, "balance_end": None, "tv": 1e-3}
    assert attack("clip:0.1", True, **naive) > attack("clip:0.1", False, **naive) + 1


@pytest.mark.parametrize(
    "words",
    [
        "clip:1",
        "gaussian:0.01",
        "laplace:0.01",
        "percentile-noise:0.5:95",
        "freeze:2",
        "quantize:16",
    ],
)
def test_where_nothing_helps_nothing_changes(words: str) -> None:
    target, _ = defended(words)
    adaptation = adapt(target, Spectral.published)
    assert adaptation.config == Spectral.published
    inner = Cosine()
    assert adaptation.objective(inner) is inner
    assert len(adaptation.notes) == 1


def test_every_defense_has_an_answer() -> None:
    from gradients import defenses

    # Other tests register defenses of their own.
    ours = {path.stem for path in Path(defenses.__path__[0]).glob("*.py")} - {"__init__", "base"}
    assert ours == ours & set(defense_names())
    assert ours <= set(_STEPS)
    assert {"dp-sgd", "dp-batch"} <= set(_STEPS)


def test_an_unclipped_update_keeps_its_scale() -> None:
    target, _ = defended("clip:1e6")
    assert adapt(target, InversionConfig(objective="L2")).config.matching.objective == "L2"


def test_an_unknown_defense_is_noted() -> None:
    target, _ = undefended()
    told = dataclasses.replace(target, defenses=("homemade:3",))
    assert adapt(told, InversionConfig()).notes == ["homemade:3: nothing is known against it"]


@pytest.mark.parametrize("words", ["sign", "prune:0.9", "soteria:0.5", "quantize:8", "topk:0.2"])
@pytest.mark.parametrize("inner", [Cosine(), L2()], ids=["sim", "L2"])
def test_the_seed_is_the_derivative_of_the_value(words: str, inner: Cosine | L2) -> None:
    target, _ = defended(words)
    shared = [g.double() for g in target.gradient.values()]
    objective = adapt(target, InversionConfig()).objective(inner)
    generator = torch.Generator().manual_seed(1)
    at, along = (
        [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in shared]
        for _ in range(2)
    )
    _, seed = objective.value_and_seed(at, shared)
    slope = sum(float((s * d).sum()) for s, d in zip(seed, along, strict=True))
    h = 1e-6
    moved = ([a + k * d for a, d in zip(at, along, strict=True)] for k in (h, -h))
    high, low = (float(objective.value_and_seed(gradient, shared)[0]) for gradient in moved)
    assert slope == pytest.approx((high - low) / (2 * h), rel=2e-3, abs=1e-9)


def test_the_true_gradient_fits_what_pruning_left_of_it() -> None:
    target, _ = defended("prune:0.9")
    true = [g.double() for g in undefended()[0].gradient.values()]
    shared = [g.double() for g in target.gradient.values()]
    knowing = adapt(target, InversionConfig()).objective(Cosine())
    assert float(knowing.value_and_seed(true, shared)[0]) < 1e-9
    assert float(Cosine().value_and_seed(true, shared)[0]) > 1e-2


def test_without_a_defense_the_objective_is_the_plain_one() -> None:
    target, _ = undefended()
    inner = Cosine()
    assert Adaptation.none(target, InversionConfig()).objective(inner) is inner
    assert adapt(target, InversionConfig()).objective(inner) is inner


# -- Per-sample clipping ----------------------------------------------------------


@functools.cache
def private(batch: int = 3, sigma: float = 0.0) -> tuple[Target, Truth]:
    """What DP-SGD shares of a model in whose eyes the images differ in difficulty."""
    spec = ModelSpec("lenet", 10, 8, width=8)
    torch.manual_seed(0)
    model = build_model(spec).double()
    with torch.no_grad():
        last_linear(model)[1].weight.mul_(20)
    truth = Truth(smooth_images(batch, 8), torch.arange(batch))
    settings = ClientSettings(privacy=PrivacySettings(noise_multiplier=sigma, max_norm=0.5))
    target = share_update(model, spec, data_spec(8), truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


def test_the_truth_fits_the_mean_of_clipped_gradients() -> None:
    target, truth = private()
    replica = Replica(target, CPU, torch.float64)
    inputs = target.data.normalize(truth.images.double())
    told = adapt(target, InversionConfig())
    blind = GradientMatcher(replica, Cosine(), "exact")
    knowing = GradientMatcher(replica, Cosine(), "exact", clipping=told.clipping(replica))
    assert float(knowing.value(inputs, truth.labels)) < 1e-9
    assert float(blind.value(inputs, truth.labels)) > 1e-4


@pytest.mark.parametrize("optimised", [False, True], ids=["labels", "logits"])
def test_the_derivative_goes_through_the_clipping(optimised: bool) -> None:
    target, truth = private()
    replica = Replica(target, CPU, torch.float64, joint=optimised)
    clipping = adapt(target, InversionConfig()).clipping(replica)
    matcher = GradientMatcher(replica, Cosine(), clipping=clipping)
    generator = torch.Generator().manual_seed(0)
    x, along = torch.randn((2, *truth.images.shape), generator=generator, dtype=torch.float64)
    labels = torch.randn((3, 10), generator=generator).double() if optimised else truth.labels
    match = matcher(x, labels)
    h = 1e-5
    high, low = (float(matcher.value(x + k * along, labels)) for k in (h, -h))
    slope = float((match.input_gradient * along).sum())
    assert slope == pytest.approx((high - low) / (2 * h), rel=1e-5)
    assert (match.label_gradient is not None) == optimised


def test_restarts_are_clipped_one_by_one() -> None:
    target, truth = private()
    replica = Replica(target, CPU, torch.float64)
    clipping = adapt(target, InversionConfig()).clipping(replica)
    matcher = GradientMatcher(replica, Cosine(), clipping=clipping)
    batches = torch.randn((2, *truth.images.shape), dtype=torch.float64)
    for found, inputs in zip(matcher.several(batches, truth.labels), batches, strict=True):
        torch.testing.assert_close(found, matcher(inputs, truth.labels))


def test_being_told_of_the_clipping_pays() -> None:
    target, truth = private()

    def gained(adaptive: bool) -> float:
        config = Spectral.published.changed(iterations=150, race=0, adaptive=adaptive)
        images = Inversion(target, truth.labels, config, device=CPU).run().images
        return float(psnr(images[assign(images, truth.images)], truth.images).mean())

    assert gained(True) > gained(False) + 1


def test_one_image_and_local_steps_are_not_clipped_alone() -> None:
    several = dataclasses.replace(private()[0], local=LocalTraining(epochs=2))
    assert adapt(private(1)[0], InversionConfig()).sample_norm is None
    assert adapt(several, InversionConfig()).sample_norm is None
    assert adapt(private()[0], InversionConfig()).sample_norm == 0.5


def test_steps_in_pixels_stay_as_they_are() -> None:
    target, _ = make_target(ModelSpec("cnn", 10, 16, width=4, pool_kernel=19), 1)
    assert adapt(target, InversionConfig()).config == InversionConfig()
    assert (
        adapt(target, Spectral.published).config.optimiser.lr == 4 * Spectral.published.optimiser.lr
    )
