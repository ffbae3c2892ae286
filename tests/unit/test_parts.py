"""The parts of an inversion: given ones are used, and those that a configuration names."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from attack.loop.inversion import Inversion, Parts
from attack.loop.parts import make_matcher
from attack.loop.problem import InversionProblem
from attack.loop.restarts import Starter
from attack.matching.clipping import SampleClipping
from attack.matching.match import Matcher
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.settings import InversionConfig
from audit.update_matcher import UpdateMatcher
from core.models.building import ModelSpec
from core.target import LocalTraining
from tests.targets import make_target

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 8, width=8)
CONFIG = InversionConfig(iterations=4, signed=False, tv=0.01, hvp="exact")


class Watched(GradientMatcher):
    """Writes down what the loop tells it."""

    told: list[tuple[int, int]]

    def at(self, iteration: int, iterations: int) -> bool:
        self.told.append((iteration, iterations))
        return iteration == 2


def watched(problem: InversionProblem) -> Watched:
    matcher = Watched(problem.replica, Cosine(), "exact")
    matcher.told = []
    return matcher


def test_the_matcher_is_told_of_every_iteration() -> None:
    target, truth = make_target(LENET, 1)
    inversion = Inversion(target, truth.labels, CONFIG, device=CPU, parts=Parts(matcher=watched))
    found = inversion.run()
    assert isinstance(inversion.matcher, Watched)
    assert inversion.matcher.told == [(i, 4) for i in range(4)]
    plain = Inversion(target, truth.labels, CONFIG, device=CPU).run()
    assert torch.equal(found.images, plain.images)


def test_values_of_another_objective_are_forgotten() -> None:
    target, truth = make_target(LENET, 1)
    inversion = Inversion(target, truth.labels, CONFIG, device=CPU, parts=Parts(matcher=watched))
    inversion.run()
    assert inversion.restarts[0].best_iteration >= 2


def test_penalties_regularizers_and_starts_are_parts() -> None:
    target, truth = make_target(LENET, 1)

    def none(problem: InversionProblem) -> list[Any]:
        return []

    parts = Parts(penalties=none, regularizers=none, starter=partial(Starter, noise=0.5))
    bare = Inversion(target, truth.labels, CONFIG, device=CPU, parts=parts)
    full = Inversion(target, truth.labels, CONFIG, device=CPU)
    assert not bare.evaluation.regularizers
    assert len(full.evaluation.regularizers) == 1
    difference = bare.restarts[0].variable - full.restarts[0].variable
    assert 0.3 < float(difference.detach().std()) < 0.7
    # Grey: the same in all channels.
    assert torch.allclose(difference[:, :1], difference[:, 1:2], atol=1e-6)


def test_a_candidate_is_clipped_from_a_share_of_the_iterations_on() -> None:
    target, _ = make_target(LENET, 2)
    replica = Replica(target, CPU)
    clipping = SampleClipping(replica.model, replica.names, 1.0, 2)
    matcher = GradientMatcher(replica, Cosine(), "exact", clipping=clipping, clipped_from=0.25)
    assert [matcher.at(i, 8) for i in range(4)] == [False, False, True, False]
    assert matcher.clipping is clipping
    assert matcher.exact().clipping is clipping


def test_an_updates_matcher_is_a_gradient_matcher_of_its_steps() -> None:
    """Without softening, one term and several steps, both compute the same."""
    local = LocalTraining(epochs=2, batches=2, lr=0.05)
    target, truth = make_target(ModelSpec("cnn", 10, 8, width=4), 4, train_mode=True, local=local)
    replica = Replica(target, CPU, torch.float64)
    matchers: list[Matcher] = [
        GradientMatcher(replica, Cosine(), "exact"),
        UpdateMatcher(replica, Cosine()),
    ]
    inputs = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    one, two = (matcher(inputs, truth.labels, weight=2.0) for matcher in matchers)
    torch.testing.assert_close(one.input_gradient, two.input_gradient)
    assert float(two.value) == pytest.approx(2 * float(one.value))
    values = [float(matcher.value(inputs, truth.labels)) for matcher in matchers]
    assert values[0] == pytest.approx(values[1])


def test_softening_falls_to_nothing_in_the_exact_matcher() -> None:
    target, _ = make_target(LENET, 1)
    matcher = UpdateMatcher(Replica(target, CPU), Cosine(), 0.5, 0.01)
    widths = []
    for iteration in range(3):
        assert not matcher.at(iteration, 3)
        widths.append(matcher.width)
    assert widths == pytest.approx([0.5, 0.0707, 0.01], rel=1e-3)
    assert matcher.exact().width == 0


def test_the_default_matcher_is_what_the_configuration_says() -> None:
    target, truth = make_target(LENET, 1)
    inversion = Inversion(target, truth.labels, CONFIG, device=CPU)
    assert make_matcher(inversion.problem).hvp == "exact"
    assert inversion.matcher.details().keys() == {"hvp_agreement", "hvp_step"}
