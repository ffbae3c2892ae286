"""Starts that compete for the iterations of one."""

import pytest
import torch

from attack.attacks import get_attack
from attack.loop.inversion import Inversion
from attack.loop.race import plan_race
from attack.loop.restarts import thin_out
from attack.settings import InversionConfig
from core.models.building import ModelSpec
from tests.targets import make_target

CPU = torch.device("cpu")


@pytest.mark.parametrize("iterations", [1, 50, 99, 100, 250, 500, 2000, 24000])
@pytest.mark.parametrize("starts", [0, 1, 2, 3, 8, 11])
def test_a_race_costs_what_one_start_costs(iterations, starts):
    race = plan_race(iterations, starts)
    running, evaluations = race.starts, 0
    for iteration in range(race.iterations):
        running = dict(race.halvings).get(iteration, running)
        evaluations += running
    assert evaluations == iterations
    assert running == 1
    assert race.iterations >= 0.8 * iterations - 1


def test_more_time_lets_more_start():
    assert [plan_race(n, 8).starts for n in (10, 100, 500, 2000)] == [1, 2, 4, 8]
    assert plan_race(2000, 8).halvings == ((20, 4), (40, 2), (60, 1))


@pytest.mark.parametrize("iterations", [50, 120, 190, 300, 500, 2000, 2100, 24000])
def test_eight_halved_restarts_cost_less_than_three(iterations):
    config = CONFIG.changed(iterations=iterations, restarts=8, halving=True)
    running = inversion(config)
    restarts, evaluations = running.restarts, 0
    for iteration in range(running.config.optimiser.iterations):
        restarts = running.race.thin_out(restarts, iteration)
        restarts = thin_out(restarts, iteration, running.config)
        evaluations += len(restarts)
    assert len(restarts) == 1
    assert evaluations <= 3 * iterations


def inversion(config: InversionConfig, seed: int = 0, first_restart: int = 0) -> Inversion:
    target, truth = make_target(ModelSpec("lenet", 10, 16), 2, double=False)
    return Inversion(
        target, truth.labels, config, device=CPU, seed=seed, first_restart=first_restart
    )


CONFIG = get_attack("spectral").published.changed(iterations=300)


def test_the_best_start_goes_on():
    running = inversion(CONFIG)
    halvings = dict(running.race.halvings)
    for iteration in range(max(halvings)):
        running._iterate(iteration)
    best = min(running.restarts, key=lambda r: r.best_value).index
    running._iterate(max(halvings))
    assert [r.index for r in running.restarts] == [best]


def test_every_other_start_is_faint():
    strengths = [float(r.variable.detach().std()) for r in inversion(CONFIG).restarts]
    assert strengths == pytest.approx([1, 0.1, 1, 0.1], rel=0.1)
    # The first of a second restart's race is strong again, and so is a start alone.
    second = inversion(CONFIG, first_restart=1).restarts
    assert [float(r.variable.detach().std()) > 0.5 for r in second] == [True, False] * 2
    alone = inversion(CONFIG.changed(race=0)).restarts
    assert float(alone[0].variable.detach().std()) > 0.5


def test_every_restart_has_a_race_of_its_own():
    exact = CONFIG.changed(iterations=150, hvp="exact", double=True)
    both = inversion(exact.changed(restarts=2)).run()
    apart = [inversion(exact, first_restart=r).run() for r in (0, 1)]
    best = min(apart, key=lambda r: r.objective)
    assert both.objective == pytest.approx(best.objective, rel=1e-6)
    assert both.details["restart"] == best.details["restart"]


def test_a_given_start_does_not_race():
    assert inversion(CONFIG.changed(start="zeros")).race.starts == 1


def test_resumed_in_the_middle_of_a_race(tmp_path):
    whole = inversion(CONFIG).run()
    state = tmp_path / "state.tar"

    def stop(iteration: int, objective: float) -> None:
        if iteration >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inversion(CONFIG).run(state_file=state, save_every=25, report=stop)
    resumed = inversion(CONFIG).run(state_file=state, save_every=25)
    assert torch.equal(resumed.images, whole.images)
