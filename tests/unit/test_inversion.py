"""The optimisation loop: what it recovers, and that the same seed gives the same numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attack.loop.inversion import InterruptedInversion, Inversion, Restart
from attack.matching.match import Match
from attack.metrics import psnr
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.errors import InputError
from core.models.building import ModelSpec
from core.target import LocalTraining, Target, Truth
from tests.targets import make_target

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 8, width=8)
CNN = ModelSpec("cnn", 10, 8, width=4)
FAST = InversionConfig(
    iterations=12, signed=False, tv=0.01, coordinates="dct", double=True, hvp="exact"
)


@pytest.fixture(scope="module")
def lenet() -> tuple[Target, Truth]:
    return make_target(LENET, 2)


def test_an_attacker_may_match_several_local_steps_as_one() -> None:
    steps = LocalTraining(batches=2, lr=0.5)
    target, truth = make_target(LENET, 4, local=steps)
    unaware = invert((target, truth), change(local_steps="one"))
    # By hand: the same gradient, said to be that of one step on the whole batch.
    one_step = dataclasses.replace(target, local=LocalTraining(lr=0.5))
    expected = invert((one_step, truth))
    assert torch.equal(unaware.images, expected.images)
    assert unaware.objective == expected.objective
    at_truth = {
        how: _objective_at(target, truth, change(local_steps=how)) for how in ("unroll", "one")
    }
    assert at_truth["unroll"] < 1e-10 < 1e-4 < at_truth["one"]


def _objective_at(target: Target, truth: Truth, config: InversionConfig) -> float:
    inversion = Inversion(target, truth.labels, config, device=CPU)
    inputs = target.data.normalize(truth.images).to(torch.float64)
    return float(inversion.matcher.value(inputs, truth.labels))


def test_one_step_is_all_there_is_to_unroll(lenet: tuple[Target, Truth]) -> None:
    found, plain = invert(lenet, change(local_steps="one")), invert(lenet)
    assert torch.equal(found.images, plain.images)


def interrupted(made: tuple[Target, Truth], at: int, **run: Any) -> Reconstruction:
    def stop(iteration: int, objective: float) -> None:
        if iteration == at:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedInversion) as caught:
        invert(made, change(lr=0.5), print_every=1, report=stop, **run)
    return caught.value.reconstruction


def test_an_interrupted_attack_has_its_best_so_far(lenet: tuple[Target, Truth]) -> None:
    found = interrupted(lenet, 7)
    assert (found.status, found.iterations) == ("interrupted", 8)
    seen = [entry["last"] for entry in found.trace]
    assert len(seen) == 8
    assert found.objective == min(seen)
    # Computed anew at the images: what is returned is the iterate of that objective.
    inversion = Inversion(lenet[0], lenet[1].labels, change(), device=CPU)
    inputs = lenet[0].data.normalize(found.images.double())
    value = float(inversion.matcher.value(inputs, lenet[1].labels))
    assert value == pytest.approx(found.objective, rel=1e-3)


def test_an_interrupted_attack_goes_on_as_if_it_had_not_been(
    lenet: tuple[Target, Truth], tmp_path: Path
) -> None:
    state = {"state_file": tmp_path / "state.pt", "save_every": 3}
    interrupted(lenet, 7, **state)
    resumed = invert(lenet, change(lr=0.5), print_every=1, **state)
    whole = invert(lenet, change(lr=0.5), print_every=1)
    assert torch.equal(resumed.images, whole.images)
    assert resumed.iterations == whole.iterations == 12


def test_the_trace_has_the_losses_by_term(cnn: tuple[Target, Truth]) -> None:
    config = change(
        bn=0.3, input_norm=1e-3, gradient_weight=2.0, iterations=1, coordinates="pixels"
    )
    (entry,) = invert(cnn, config, print_every=1).trace
    target, truth = cnn
    inversion = Inversion(target, truth.labels, config, device=CPU)
    start = inversion.problem.inputs(inversion.restarts[0])
    rows, columns = start.diff(dim=2).abs().mean((1, 2, 3)), start.diff(dim=3).abs().mean((1, 2, 3))
    assert entry["gradient term"] == pytest.approx(2 * entry["last"])
    assert entry["AnisotropicTV term"] == pytest.approx(0.01 * float((rows + columns).mean()))
    norm = float(start.flatten(1).norm(dim=1).mean())
    assert entry["InputNorm term"] == pytest.approx(1e-3 * norm)
    assert entry["statistics term"] > 0


@pytest.fixture(scope="module")
def cnn() -> tuple[Target, Truth]:
    return make_target(CNN, 2, train_mode=True)


def invert(
    made: tuple[Target, Truth], config: InversionConfig = FAST, *, seed: int = 0, **run: Any
) -> Reconstruction:
    target, truth = made
    return Inversion(target, truth.labels, config, device=CPU, seed=seed).run(**run)


def change(**fields: Any) -> InversionConfig:
    return FAST.changed(**fields)


def test_beats_a_flat_colour_by_five_decibels() -> None:
    made = make_target(LENET, 1)
    found = invert(made, change(iterations=200, tv=0.0)).images
    truth = made[1].images
    flat = truth.mean((2, 3), keepdim=True).expand_as(truth)
    assert float(psnr(found.float(), truth).mean()) > float(psnr(flat, truth).mean()) + 5


@pytest.mark.parametrize("objective", ["sim", "L2"])
def test_polish_is_exact_on_one_image_in_float64(objective: str) -> None:
    target, truth = make_target(LENET, 1)
    config = change(
        objective=objective, iterations=60, tv=0.0, lr_min=0.01, polish=600
    )  # about 100 dB
    found = invert((target, truth), config)
    error = float((found.images - truth.images).square().mean())
    assert -10 * math.log10(error) > 60
    assert found.objective < 1e-9


@pytest.mark.parametrize(
    "config",
    [
        FAST,
        change(coordinates="pixels", signed=True, box=True),
        change(input_noise=0.2, restarts=2),
        change(hvp="auto", double=False),
        change(balance=0.5, balance_end=0.05),
    ],
    ids=["dct", "signed", "noise", "float32", "balanced"],
)
def test_same_seed_same_numbers(lenet: tuple[Target, Truth], config: InversionConfig) -> None:
    first, second = invert(lenet, config), invert(lenet, config)
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, invert(lenet, config, seed=1).images)


@pytest.mark.parametrize("hvp", ["exact", "difference"])
def test_a_restart_does_not_depend_on_its_neighbours(lenet: tuple[Target, Truth], hvp: str) -> None:
    target, truth = lenet
    # One after the other: a batched call rounds differently.
    config = change(restarts=3, hvp=hvp, input_noise=0.1, restarts_at_once=1)
    together = Inversion(target, truth.labels, config, device=CPU)
    together.run()
    for chosen in range(3):
        alone = Inversion(target, truth.labels, config, device=CPU)
        alone.restarts = [alone.restarts[chosen]]
        found = alone.run()
        expected = together.restarts[chosen]
        assert found.objective == pytest.approx(expected.best_value, rel=1e-6)
        assert expected.best_inputs is not None
        images = target.data.denormalize(expected.best_inputs).clamp(0, 1).float()
        torch.testing.assert_close(found.images, images, rtol=0, atol=1e-6)


def test_batched_restarts_reconstruct_what_single_ones_do(lenet: tuple[Target, Truth]) -> None:
    target, truth = lenet
    # Signs, and Adam's first steps, would make a flipped rounding error visible.
    config = change(
        restarts=3,
        hvp="difference",
        iterations=15,
        signed=False,
        optimizer="SGD",
        input_noise=0.1,
    )
    found = []
    for at_once in (1, 2, 3):
        batched = config.changed(restarts_at_once=at_once)
        inversion = Inversion(target, truth.labels, batched, device=CPU)
        inversion.run()
        found.append([r.best_value for r in inversion.restarts])
    assert len(set(found[0])) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_restarts_that_do_not_fit_in_one_call_are_halved(lenet: tuple[Target, Truth]) -> None:
    target, truth = lenet
    config = change(restarts=5, hvp="difference", iterations=3, optimizer="SGD")
    calls: list[int] = []

    def limited(inversion: Inversion) -> Inversion:
        several = inversion.matcher.several

        def narrow(inputs: torch.Tensor, labels: torch.Tensor) -> list[Match]:
            calls.append(len(inputs))
            if len(inputs) > 2:
                raise torch.cuda.OutOfMemoryError("no room")
            return several(inputs, labels)

        inversion.matcher.several = narrow  # type: ignore[method-assign]
        return inversion

    found = limited(Inversion(target, truth.labels, config, device=CPU)).run()
    assert calls == [5, *[2, 2, 1] * 3]
    plain = Inversion(target, truth.labels, config, device=CPU).run()
    assert found.objective == pytest.approx(plain.objective, rel=1e-4)


def test_halving_keeps_the_best_by_objective(lenet: tuple[Target, Truth]) -> None:
    target, truth = lenet
    inversion = Inversion(target, truth.labels, change(restarts=4, halving=True), device=CPU)
    seen: dict[int, dict[int, float]] = {}

    def watch(iteration: int, _: float) -> None:
        seen[iteration] = {r.index: r.best_value for r in inversion.restarts}

    inversion.run(print_every=1, report=watch)
    assert [len(seen[i]) for i in (0, 1, 2, 3, 11)] == [4, 2, 2, 1, 1]
    assert set(seen[1]) == set(sorted(seen[0], key=seen[0].__getitem__)[:2])
    assert set(seen[3]) == {min(seen[2], key=seen[2].__getitem__)}


def test_boxing_keeps_the_valid_range(lenet: tuple[Target, Truth]) -> None:
    target, truth = lenet
    for coordinates, slack in (("pixels", 0.0), ("dct", 1e-9)):
        config = change(coordinates=coordinates, lr=1.0, smallest_loss=False)
        inversion = Inversion(target, truth.labels, config, device=CPU)
        inversion.run()
        restart = inversion.restarts[0]
        images = target.data.denormalize(
            inversion.problem.coordinates.decode(restart.variable.detach())
        )
        assert images.min() >= -slack - 1e-7
        assert images.max() <= 1 + slack + 1e-7
        free = Inversion(target, truth.labels, config.changed(box=False), device=CPU)
        free.run()
        outside = target.data.denormalize(
            free.problem.coordinates.decode(free.restarts[0].variable.detach())
        )
        assert outside.min() < -0.01


def test_smallest_loss_is_the_best_iterate_and_otherwise_the_last(
    lenet: tuple[Target, Truth],
) -> None:
    rough = {"lr": 20.0, "schedule": "constant", "coordinates": "pixels", "signed": True}
    best = invert(lenet, change(**rough), print_every=1)
    last = invert(lenet, change(**rough, smallest_loss=False), print_every=1)
    values = [entry["last"] for entry in best.trace]
    assert best.objective == min(values)
    assert last.objective == values[-1]
    assert last.objective > best.objective


def test_target_tv_stops_once_total_variation_has_fallen(lenet: tuple[Target, Truth]) -> None:
    smoothing = {"iterations": 60, "tv": 10.0, "coordinates": "pixels", "target_tv": 1.0}
    stopped = invert(lenet, change(**smoothing))
    assert stopped.status == "target-tv"
    assert 1 < stopped.iterations < 60
    # A flat start has not fallen below anything.
    assert invert(lenet, change(start="zeros", target_tv=0.28)).iterations > 1


@pytest.mark.parametrize("smallest_loss", [True, False])
def test_patience_and_time_budget(lenet: tuple[Target, Truth], smallest_loss: bool) -> None:
    stuck = change(
        iterations=50, lr=1e-30, patience=4, smallest_loss=smallest_loss, coordinates="pixels"
    )
    result = invert(lenet, stuck)
    assert result.status == "patience"
    assert result.iterations < 10
    assert invert(lenet, change(time_budget=0.0)).status == "time"


@pytest.mark.parametrize("signed", [True, False])
def test_after_a_nan_it_goes_on_from_the_last_good_iterate(
    lenet: tuple[Target, Truth], signed: bool
) -> None:
    target, truth = lenet
    inversion = Inversion(target, truth.labels, change(signed=signed), device=CPU)
    seen: list[torch.Tensor] = []
    matcher = inversion.matcher

    class FailsOnce:
        def __getattr__(self, name: str) -> Any:
            return getattr(matcher, name)

        def __call__(self, inputs: torch.Tensor, *args: Any, **options: Any) -> Match:
            seen.append(inputs.clone())
            match = matcher(inputs, *args, **options)
            if len(seen) == 6:
                return dataclasses.replace(match, value=torch.tensor(math.nan))
            return match

    inversion.evaluation.matcher = FailsOnce()  # type: ignore[assignment]
    found = inversion.run(print_every=1)
    assert found.status == "finished"
    assert found.details["events"] == ["restart 0 diverged at iteration 5"]
    torch.testing.assert_close(seen[6], seen[4], rtol=1e-6, atol=1e-6)
    assert inversion.restarts[0].shrink == 0.5
    assert torch.isfinite(found.images).all()
    assert found.objective < found.trace[0]["objective"]


def test_an_attack_that_never_sees_a_number_ends_as_diverged() -> None:
    target, truth = make_target(LENET, 2)
    inversion = Inversion(target, truth.labels, change(polish=5), device=CPU)
    inversion.replica.target_gradient[0].fill_(math.nan)
    result = inversion.run()
    assert result.status == "diverged"
    assert len(result.details["events"]) == 5


@pytest.mark.parametrize("start", ["normal", "uniform", "zeros", "pattern"])
def test_starts(lenet: tuple[Target, Truth], start: str) -> None:
    target, truth = lenet
    config = change(start=start, coordinates="pixels")
    inputs = Inversion(target, truth.labels, config, device=CPU).restarts[0].variable.detach()
    assert inputs.shape == (2, 3, 8, 8)
    if start == "zeros":
        assert not inputs.any()
    if start == "pattern":
        assert torch.equal(inputs[..., :4, :4], inputs[..., 4:, 4:])
        assert inputs.std() > 0.1
    if start == "uniform":
        images = target.data.denormalize(inputs)
        assert images.min() >= -1e-6
        assert images.max() <= 1 + 1e-6
        assert abs(float(images.mean()) - 0.5) < 0.05


def test_prior_images_replace_the_start(lenet: tuple[Target, Truth]) -> None:
    target, truth = lenet
    inversion = Inversion(target, truth.labels, FAST, device=CPU, prior=truth.images)
    assert inversion.run().objective < 1e-10


def test_group_consistency_draws_restarts_together(lenet: tuple[Target, Truth]) -> None:
    target, truth = lenet

    def spread(group: float) -> float:
        config = change(restarts=3, group=group, iterations=40, coordinates="pixels")
        inversion = Inversion(target, truth.labels, config, device=CPU)
        inversion.run()
        return float(torch.stack([r.variable.detach() for r in inversion.restarts]).std(0).mean())

    assert spread(100.0) < 0.5 * spread(0.0)


def test_combination_runs_three_stages_and_ends_from_the_newest_fusion(
    lenet: tuple[Target, Truth],
) -> None:
    target, truth = lenet
    config = change(iterations=20, restarts=3, combine=True, combine_every=2, group=0.01)
    inversion = Inversion(target, truth.labels, config, device=CPU)
    restarts, fused = [], []
    fuse = inversion.consensus.fuse

    def watched(candidates: Sequence[Restart]) -> torch.Tensor:
        fused.append((inversion.progress.iteration, fuse(candidates)))
        return fused[-1][1]

    inversion.consensus.fuse = watched  # type: ignore[method-assign]
    first: list[torch.Tensor] = []
    step = inversion.stepper.step

    def stepping(restart: Any, iteration: int, *rest: Any) -> None:
        if iteration == 12:
            first.append(inversion.problem.coordinates.decode(restart.variable.detach()).clone())
        step(restart, iteration, *rest)

    inversion.stepper.step = stepping  # type: ignore[method-assign]
    result = inversion.run(
        print_every=1, report=lambda i, v: restarts.append(len(inversion.restarts))
    )
    assert [iteration for iteration, _ in fused] == [6, 8, 10, 12]
    assert restarts == [3] * 12 + [1] * 8
    torch.testing.assert_close(first[0], fused[-1][1])
    fused_value = float(inversion.matcher.value(fused[-1][1], truth.labels))
    assert result.objective <= fused_value * (1 + 1e-9)


def test_joint_labels_are_recovered_on_one_image() -> None:
    target, _ = make_target(LENET, 1, seed=3)
    truth = Truth(torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    config = change(objective="L2", joint_labels=True, iterations=150, tv=0.0)
    wrong = torch.tensor([7])
    found = Inversion(target, wrong, config, device=CPU).run()
    assert found.labels.tolist() == truth.labels.tolist()


def test_batch_norm_penalty_needs_what_it_matches(
    lenet: tuple[Target, Truth], cnn: tuple[Target, Truth]
) -> None:
    without = (dataclasses.replace(cnn[0], bn_statistics=None), cnn[1])
    with pytest.raises(InputError, match=r"priors\.exact_bn"):
        invert(without, change(bn=0.1, exact_bn=True))
    with pytest.raises(InputError, match="no BatchNorm layer"):
        invert(lenet, change(bn=0.1))
    exact = invert(cnn, change(bn=0.1, exact_bn=True)).images
    assert not torch.equal(exact, invert(cnn, change(bn=0.1)).images)


@pytest.mark.parametrize(
    "config",
    [
        FAST,
        change(restarts=2, group=0.1, input_noise=0.1, coordinates="pixels", signed=True),
        change(restarts=3, combine=True, combine_every=2),
        change(objective="L2", joint_labels=True, hvp="auto"),
    ],
    ids=["plain", "group and noise", "combination", "joint labels"],
)
def test_resumed_ends_as_uninterrupted(
    lenet: tuple[Target, Truth], config: InversionConfig, tmp_path: Path
) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill(iteration: int, _: float) -> None:
        if iteration == 8:
            raise Killed

    expected = invert(lenet, config)
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        invert(lenet, config, print_every=1, report=kill, state_file=state, save_every=3)
    assert state.exists()
    seen: list[int] = []
    resumed = invert(
        lenet, config, print_every=1, report=lambda i, _: seen.append(i), state_file=state
    )
    assert seen[0] == 6
    assert torch.equal(resumed.images, expected.images)
    assert torch.equal(resumed.labels, expected.labels)
    assert resumed.objective == expected.objective


@pytest.mark.parametrize(("hold", "fallen"), [(0.0, 12), (1e9, 0)])
def test_the_balance_stays_where_the_gradient_is_matched_well(
    lenet: tuple[Target, Truth], hold: float, fallen: int
) -> None:
    config = change(balance=0.5, balance_end=0.05, balance_hold=hold)
    inversion = Inversion(lenet[0], lenet[1].labels, config, device=CPU)
    inversion.run()
    restart = inversion.restarts[0]
    assert restart.fallen == fallen
    assert inversion.stepper.direction.balance(restart) == pytest.approx(0.05 if fallen else 0.5)


def test_a_small_smooth_network_gives_its_image_away_exactly() -> None:
    made = make_target(ModelSpec("lenet", 10, 16, width=12), 1)
    config = change(
        objective="L2", iterations=300, lr=0.1, tv=1.0, tv_kind="double-opponents",
        balance=0.3, balance_end=0.0, polish=300,
    )  # fmt: skip
    found = invert(made, config)
    assert float(psnr(found.images, made[1].images)) > 60
