"""The simulated local training against real SGD, and what an update says of its batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.loop.inversion import running_statistics
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.priors.shared_statistics import average_statistics
from audit.inversion import granted_to_the_auditor
from audit.updates import LocalUpdate, numbered_by_place, target_from_update
from core.errors import InputError
from core.models.building import build_model
from gradients.batch_statistics import collect_batch_statistics
from tests.federated.sites import simulate, update_of, victims

CPU = torch.device("cpu")


def relative_error(update: LocalUpdate) -> tuple[float, float]:
    """Of the simulated update and of the simulated statistics at the true images."""
    data = victims().data
    inputs = data.normalize(victims().images[: update.n_images])
    labels = victims().labels[: update.n_images]
    found, statistics = simulate(update, inputs.double(), labels, torch.float64)
    sent = update.gradient.values()
    wrong = sum(float((a - b).square().sum()) for a, b in zip(found, sent, strict=True))
    size = sum(float(b.double().square().sum()) for b in sent)
    change = average_statistics(target_from_update(update))
    bn = sum(
        float((a - b).square().mean())
        for name in change
        for a, b in zip(statistics[name], change[name], strict=True)
    )
    return (wrong / size) ** 0.5, bn


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "training"),
    [
        (1, 1, 1, {}),
        (8, 4, 1, {}),
        (4, 4, 3, {"momentum": 0.9, "weight_decay": 1e-2}),
        (7, 3, 2, {"momentum": 0.5}),
    ],
)
def test_simulation_is_real_training(
    n: int, batch: int, epochs: int, training: dict[str, float]
) -> None:
    gradient, bn = relative_error(update_of(n, batch, epochs, learning_rate=0.05, **training))
    # The update itself is a difference of float32 weights.
    assert gradient < 1e-4
    assert bn < 1e-6


def test_two_steps_of_four_give_the_real_difference() -> None:
    update = update_of(8, 4, learning_rate=0.05)
    inputs = victims().data.normalize(victims().images)
    found, _ = simulate(update, inputs, victims().labels)
    scale = update.learning_rate * len(update.steps)
    for name, gradient in zip(update.gradient, found, strict=True):
        assert torch.allclose(-scale * gradient, update.weight_diff[name], atol=1e-6)


def test_order_of_batches_matters_and_is_followed() -> None:
    order = ((0, 1, 2, 3), (3, 1, 0, 2))
    update = update_of(4, 2, 2, learning_rate=0.1, order=order)
    assert update.steps == [[0, 1], [2, 3], [3, 1], [0, 2]]
    assert relative_error(update)[0] < 1e-4
    assert relative_error(dataclasses.replace(update, batch_order=None))[0] > 0.05


def test_simulation_leaves_the_update_alone() -> None:
    update = update_of(4, 4)
    before = {name: value.clone() for name, value in update.global_weights.items()}
    simulate(update, torch.rand(4, 3, 24, 24), torch.tensor([0, 1, 0, 1]))
    assert all(torch.equal(before[name], value) for name, value in update.global_weights.items())


def test_statistics_of_one_step_are_those_of_the_batch() -> None:
    update = update_of(4, 4)
    model = build_model(update.model)
    model.load_state_dict(dict(update.global_weights))
    inputs = victims().data.normalize(victims().images[:4])
    real = collect_batch_statistics(model.train(), inputs)
    target = target_from_update(update)
    assert target.bn_statistics is not None
    for name, (mean, variance) in target.bn_statistics[0].items():
        assert torch.allclose(mean, real[name][0], atol=1e-4)
        assert torch.allclose(variance, real[name][1], atol=1e-4)
    # They are not what the global model held before.
    assert not torch.allclose(running_statistics(model)["bn1"][1], real["bn1"][1], atol=1e-2)


def test_updates_without_buffers_have_no_statistics() -> None:
    update = update_of(4, 4)
    named = {n for n, _ in build_model(update.model).named_parameters()}
    bare = {n: v for n, v in update.weight_diff.items() if n in named}
    assert dataclasses.replace(update, weight_diff=bare).running_after is None


def test_impossible_updates_are_refused() -> None:
    update = update_of(4, 4)
    for changes in (
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"proximal": -1.0},
        {"batch_order": ((0, 0, 1, 2),)},
    ):
        with pytest.raises(InputError):
            dataclasses.replace(update, **changes)
    missing = {n: v for n, v in update.weight_diff.items() if n != "conv1.weight"}
    with pytest.raises(InputError, match=r"conv1\.weight"):
        _ = dataclasses.replace(update, weight_diff=missing).gradient
    broken = {n: v * float("nan") for n, v in update.weight_diff.items()}
    with pytest.raises(InputError, match="finite"):
        _ = dataclasses.replace(update, weight_diff=broken).gradient


@pytest.mark.parametrize(
    ("case", "order", "mu"),
    [
        ((7, 5, 1), None, 0.0),
        ((4, 2, 2), ((0, 1, 2, 3), (2, 3, 0, 1)), 0.0),
        ((4, 2, 2), ((3, 1, 0, 2), (0, 1, 2, 3)), 0.0),
        ((4, 2, 2), None, 2.0),
    ],
    ids=["a short last batch", "other batches first", "mixed epochs", "FedProx"],
)
def test_attacks_of_stage_three_follow_any_local_training(
    case: tuple[int, int, int], order: tuple[tuple[int, ...], ...] | None, mu: float
) -> None:
    update = update_of(*case, learning_rate=0.05, order=order)
    if mu:
        sent = dict(zip(update.gradient, prox_update(mu), strict=True))
        lr = 0.1 * len(update.steps)
        moved = {name: (-lr * value).float() for name, value in sent.items()}
        update = dataclasses.replace(
            update, weight_diff={**update.weight_diff, **moved}, proximal=mu, learning_rate=0.1
        )
    target = numbered_by_place(target_from_update(update))
    assert target.local.order is None or order is not None or update.n_images == 7
    matcher = GradientMatcher(Replica(target, CPU, torch.float64), Cosine(), "exact")
    inputs = victims().data.normalize(victims().images[: update.n_images]).double()
    assert float(matcher.value(inputs, victims().labels[: update.n_images])) < 1e-8
    assert float(matcher.value(inputs.roll(1, 0), victims().labels[: update.n_images])) > 1e-4


def test_one_order_for_all_epochs_only_numbers_the_images() -> None:
    order = ((3, 1, 0, 2), (3, 1, 0, 2))
    target = target_from_update(update_of(4, 2, 2, order=order))
    assert target.local.order == ((3, 1), (0, 2), (3, 1), (0, 2))
    assert numbered_by_place(target).local.order is None


def test_statistics_of_several_steps_are_known_on_average_only() -> None:
    target = target_from_update(update_of(8, 4, 2))
    assert target.bn_statistics is None
    assert target.running_after is not None


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "order", "granted"),
    [
        (1, 1, 3, None, False),
        (4, 4, 2, ((0, 1, 2, 3), (3, 2, 1, 0)), False),
        (4, 2, 1, ((3, 1, 0, 2),), False),
        (4, 2, 2, None, False),
        (4, 2, 2, ((0, 1, 2, 3), (1, 0, 3, 2)), False),
        (4, 2, 2, ((0, 1, 2, 3), (3, 1, 0, 2)), True),
        (4, 2, 2, ((0, 1, 2, 3), (2, 3, 0, 1)), True),
    ],
)
def test_only_mixing_over_epochs_is_more_than_a_server_sees(
    n: int, batch: int, epochs: int, order: tuple[tuple[int, ...], ...] | None, granted: bool
) -> None:
    update = dataclasses.replace(update_of(n, batch), local_epochs=epochs, batch_order=order)
    assert update.order_granted is granted
    said = "which images shared which local steps" in granted_to_the_auditor(update)
    assert said is granted


def prox_update(mu: float) -> list[torch.Tensor]:
    """(theta_0 - theta_K) / (lr K) of FedProx, by plain autograd in float64."""
    update = update_of(4, 2, 2, learning_rate=0.1)
    model = build_model(update.model).double().train()
    model.load_state_dict(dict(update.global_weights))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), update.learning_rate)
    inputs = victims().data.normalize(victims().images).double()
    for step in update.steps:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[step]), victims().labels[step])
        pairs = zip(model.parameters(), start, strict=True)
        (loss + mu / 2 * sum((p - q).square().sum() for p, q in pairs)).backward()
        optimizer.step()
    scale = update.learning_rate * len(update.steps)
    return [(q - p.detach()) / scale for p, q in zip(model.parameters(), start, strict=True)]


def test_simulation_follows_fedprox() -> None:
    update = dataclasses.replace(update_of(4, 2, 2, learning_rate=0.1), proximal=2.0)
    inputs = victims().data.normalize(victims().images[:4]).double()
    found, _ = simulate(update, inputs, victims().labels[:4], torch.float64)
    for simulated, real in zip(found, prox_update(2.0), strict=True):
        torch.testing.assert_close(simulated, real, atol=1e-10, rtol=1e-8)
    free = prox_update(0.0)
    assert any(not torch.allclose(a, b, rtol=0.01) for a, b in zip(found, free, strict=True))
