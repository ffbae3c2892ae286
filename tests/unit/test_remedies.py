"""Remedies: an update under defenses, weakest first, up to the first that is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import nn

import gradinvbench as gib
from attack.knowledge.known_defenses import adapt
from attack.metrics import ncc
from attack.settings import InversionConfig
from audit import remedies
from audit.record import RemedySection, UntriedSection
from audit.remedies import epsilon_of, find_remedies, remaking
from core.local_training import LocalTraining
from core.target import Target, Truth
from gradients.client import update_cosine
from gradients.private_gradient import PrivacySettings

LEAKS, NOTHING = "leaks", "no leak found"


def client(
    norm: bool = True, local: str = "sgd lr=0.1 epochs=2 batch-size=2"
) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4) if norm else nn.Identity()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), layer, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)
    )
    images = torch.rand(8, 1, 8, 8)
    return gib.share(model.train(), images, torch.arange(8) % 2, local=local)


def leaks_above(cosine: float, target: Target, seen: list[Target]) -> remedies.Measure:
    """An attack that finds something where enough of the update's direction is left."""

    def measure(update: Target) -> tuple[float, str]:
        seen.append(update)
        found = update_cosine(update.gradient, target.gradient) > cosine
        return (0.01, LEAKS) if found else (0.6, NOTHING)

    return measure


def of_kind(found: Sequence[RemedySection | UntriedSection], kind: str) -> list[RemedySection]:
    return [r for r in found if isinstance(r, RemedySection) and r.defense == kind]


def test_each_kind_goes_up_to_the_first_strength_that_is_enough() -> None:
    (target, truth), seen = client(), list[Target]()
    found = list(
        find_remedies(target, leaks_above(0.7, target, seen), remake=remaking(target, truth))
    )
    kinds = {result.defense for result in found}
    # BatchNorm mixes the images: nothing is private, and what mixes them is not tried.
    assert kinds == {"running-statistics", "clip", "shared-layers", "noise", "batch-size"}
    for kind in kinds:
        *weaker, last = of_kind(found, kind)
        assert not any(result.enough for result in weaker)
        assert [result.verdict for result in weaker] == [LEAKS] * len(weaker)
        assert last.enough == (last.verdict == NOTHING)
        strengths = [result.strength for result in (*weaker, last)]
        assert strengths == sorted(strengths, reverse=kind == "shared-layers")
    # What costs nothing comes first, and of what is next always the cheapest.
    assert {result.defense for result in found[:2]} == {"running-statistics", "clip"}
    noise = of_kind(found, "noise")
    assert len(noise) < len(remedies.NOISE_LEVELS)
    assert noise[-1].enough
    assert noise[-1].cosine < 0.7 < noise[-2].cosine


def without_times(found: list[RemedySection | UntriedSection]) -> list[object]:
    return [dataclasses.replace(r, seconds=0.0) for r in found if isinstance(r, RemedySection)]


def test_an_interrupted_search_goes_on_where_it_was() -> None:
    (target, truth), seen = client(), list[Target]()
    measure, remake = leaks_above(0.7, target, seen), remaking(target, truth)
    whole = list(find_remedies(target, measure, remake=remake))
    seen.clear()
    rest = list(find_remedies(target, measure, remake=remake, done=whole[:5]))
    assert without_times(whole[:5] + rest) == without_times(whole)
    assert len(seen) == len(rest)


def test_no_measurement_begins_that_the_budget_cannot_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, _ = client()
    clock = [0.0]
    monkeypatch.setattr(remedies.time, "perf_counter", lambda: clock[0])

    def slow(update: Target) -> tuple[float, str]:
        clock[0] += 10
        return 0.01, LEAKS

    # The fourth would end after 40 seconds.
    found = list(find_remedies(target, slow, budget=35))
    assert [type(result) for result in found[:4]] == [RemedySection] * 3 + [UntriedSection]
    # How long one takes is known before the first.
    assert {type(r) for r in find_remedies(target, slow, budget=35, longest=40)} == {UntriedSection}


def test_says_what_the_budget_left_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind that has not come to its end the next strength, and nothing else."""
    target, _ = client()
    clock = [0.0]
    monkeypatch.setattr(remedies.time, "perf_counter", lambda: clock[0])
    order = [(r.defense, r.setting) for r in find_remedies(target, never_enough(clock, 0))]
    found = list(find_remedies(target, never_enough(clock, 10), budget=35))
    measured = [(r.defense, r.setting) for r in found if isinstance(r, RemedySection)]
    left = [(r.defense, r.setting) for r in found if isinstance(r, UntriedSection)]
    assert measured == order[:3]
    waiting = order[3:]
    assert dict(left) == {kind: next(s for k, s in waiting if k == kind) for kind, _ in waiting}
    assert len(left) == len(dict(left)) >= 2


def never_enough(clock: list[float], seconds: float) -> remedies.Measure:
    def measure(update: Target) -> tuple[float, str]:
        clock[0] += seconds
        return 0.01, LEAKS

    return measure


def test_strengths_are_given_as_a_site_sets_them() -> None:
    """Each number by a computation of its own, from the weights that are sent."""
    target, truth = client(norm=False)
    remake = remaking(target, truth)
    found = list(find_remedies(target, leaks_above(-1, target, []), remake=remake))
    settings = {(r.defense, r.strength): r.setting for r in found if isinstance(r, RemedySection)}
    # theta_0 - theta_K, after 8 steps of 0.1.
    sent = 0.8 * torch.cat([g.flatten() for g in target.gradient.values()])
    level = 0.3 * np.percentile(sent[sent != 0].abs().numpy(), 95)
    assert f"standard deviation {level:.3g} " in settings["noise", 0.3]
    assert "sigma0 0.3" in settings["noise", 0.3]
    (clip,) = of_kind(found, "clip")
    assert (
        f"at most {0.1 * float(sent.norm()):.3g} (it is {float(sent.norm()):.3g})" in clip.setting
    )
    assert settings["shared-layers", 1.0] == "the last 1 of 2 layers with parameters (4)"
    assert settings["batch-size", 4.0] == "4 images in a local step (now 2)"
    (private,) = [r for r in of_kind(found, "dp-sgd") if r.strength == 1.0]
    assert private.setting.startswith("noise multiplier 1, clipping norm 1 per image: epsilon")
    assert f"epsilon {private.epsilon:.3g} at delta 1e-05" in private.setting


def test_what_an_attack_sees_of_each_kind() -> None:
    (target, truth), seen = client(), list[Target]()
    measure = leaks_above(-1, target, seen)
    found = list(find_remedies(target, measure, remake=remaking(target, truth)))
    update = {(r.defense, r.strength): u for r, u in zip(found, seen, strict=True)}
    by_kind = {kind: of_kind(found, kind) for kind in ("clip", "shared-layers", "batch-size")}

    kept = update["running-statistics", 1.0]
    assert target.running_after is not None
    assert kept.running_after is None
    assert all(torch.equal(kept.gradient[n], g) for n, g in target.gradient.items())

    (clip,) = by_kind["clip"]
    sent = 0.1 * 8 * torch.cat([g.flatten() for g in target.gradient.values()]).norm()
    assert clip.strength == pytest.approx(0.1 * float(sent), rel=1e-5)
    assert clip.cosine == pytest.approx(1)

    (last,) = by_kind["shared-layers"]
    assert last.strength == 1
    assert list(update["shared-layers", 1.0].gradient) == ["4.weight", "4.bias"]

    assert [result.strength for result in by_kind["batch-size"]] == [4, 8]
    model = target.build_model()
    other, _ = gib.share(model, truth.images, truth.labels, local="sgd lr=0.1 epochs=2")
    made = update["batch-size", 8.0]
    assert all(torch.equal(made.gradient[name], g) for name, g in other.gradient.items())

    # Whoever knows the defenses has an answer to each.
    for defended in seen:
        notes = adapt(defended, InversionConfig()).notes
        assert not any("nothing is known" in note for note in notes)


def test_private_training_costs_more_the_smaller_its_epsilon() -> None:
    (target, truth), seen = client(norm=False), list[Target]()
    measure = leaks_above(-1, target, seen)
    found = of_kind(list(find_remedies(target, measure, remake=remaking(target, truth))), "dp-sgd")
    assert len(found) == len(remedies.NOISE_MULTIPLIERS)
    budgets = [result.epsilon for result in found]
    assert budgets == sorted(budgets, reverse=True)
    assert found[0].cosine > found[-1].cosine
    assert ("dp-sgd:3:1",) in [update.defenses for update in seen]


def test_epsilon_against_the_accountant_of_opacus() -> None:
    pytest.importorskip("opacus")
    from training.privacy import Accountant

    target, _ = client(norm=False)
    privacy = PrivacySettings(noise_multiplier=1.0)
    # Two epochs, in each of which every image is in one of four steps.
    expected = Accountant(1.0, 1.0, privacy.delta).planned(2)
    assert epsilon_of(target, privacy) == pytest.approx(expected.value, rel=0.02)


def exact(model: nn.Module, image: torch.Tensor) -> remedies.Measure:
    """An input of a linear layer is a row of its weights' gradient over that of its bias."""

    def measure(update: Target) -> tuple[float, str]:
        if "1.weight" not in update.gradient:
            return 1.0, NOTHING
        bias = update.gradient["1.bias"]
        row = int(bias.abs().argmax())
        found = update.gradient["1.weight"][row] / bias[row]
        leaked = float(ncc(found.view(1, -1), image.view(1, -1))) > 0.9
        return (0.05, LEAKS) if leaked else (0.5, NOTHING)

    return measure


def test_the_smallest_noise_that_hides_an_image_from_a_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
    image = torch.rand(1, 1, 8, 8)
    target, _ = gib.share(model, image, torch.tensor([1]))
    found = list(find_remedies(target, exact(model, image)))
    enough = {result.defense: result.strength for result in found if result.enough}
    assert set(enough) == {"shared-layers", "noise"}
    assert 0.1 <= enough["noise"] <= 3
    # Clipping changes no direction and hides nothing.
    assert not of_kind(found, "clip")[0].enough


def test_nothing_is_tried_that_changes_nothing() -> None:
    """One batch cannot grow, and a network without BatchNorm has no statistics to keep."""
    target, truth = client(norm=False, local="sgd lr=0.1")
    found: Iterator[RemedySection] = find_remedies(
        target, leaks_above(-1, target, []), remake=remaking(target, truth)
    )
    assert {r.defense for r in found} == {"clip", "shared-layers", "noise", "dp-sgd"}
    assert LocalTraining().steps == target.local.steps
