"""An attacker who is told of the defense is no worse, and where it matters much better."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from attack.adaptive import Adaptation, adapt, adapted_defenses
from attack.attacks import Spectral
from attack.inversion import Inversion
from attack.metrics import assign, psnr
from attack.objectives import L2, Cosine
from attack.settings import InversionConfig
from gradients.checkpoint import Target, Truth
from gradients.defenses import ClientView, apply_defenses, defense_names, parse_defenses
from tests.targets import make_target
from training.models import ModelSpec

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
    config = dataclasses.replace(Spectral.published, iterations=150, adaptive=adaptive)
    config = dataclasses.replace(config, **changes)
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
    ["clip:1", "gaussian:0.01", "laplace:0.01", "percentile:0.5:95", "freeze:2", "quantize:16"],
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
    assert ours <= set(adapted_defenses())
    assert {"dp-sgd", "dp-batch"} <= set(adapted_defenses())


def test_an_unclipped_update_keeps_its_scale() -> None:
    target, _ = defended("clip:1e6")
    assert adapt(target, InversionConfig(objective="L2")).config.objective == "L2"


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
