"""The simulated local training against real SGD, and what an update says of its batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.loop.inversion import running_statistics
from audit.inversion import granted_to_the_auditor
from audit.local_simulation import LocalSimulation
from audit.updates import LocalUpdate, target_from_update
from core.errors import InputError
from core.models.building import build_model
from gradients.batch_statistics import collect_batch_statistics
from tests.federated.sites import update_of, victims

CPU = torch.device("cpu")


def relative_error(update: LocalUpdate) -> tuple[float, float]:
    """Of the simulated update and of the simulated statistics at the true images."""
    data = victims().data
    inputs = data.normalize(victims().images[: update.n_images])
    labels = victims().labels[: update.n_images]
    found = LocalSimulation(update, CPU, torch.float64)(inputs.double(), labels)
    sent = update.gradient.values()
    simulated = [g.detach() for g in found.gradient]
    wrong = sum(float((a - b).square().sum()) for a, b in zip(simulated, sent, strict=True))
    size = sum(float(b.double().square().sum()) for b in sent)
    change = update.running_change
    assert change is not None
    bn = sum(
        float((a.detach() - b).square().mean())
        for name in change
        for a, b in zip(found.statistics[name], change[name], strict=True)
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
    found = LocalSimulation(update, CPU)(inputs, victims().labels)
    scale = update.learning_rate * len(update.steps)
    for name, gradient in zip(update.gradient, found.gradient, strict=True):
        assert torch.allclose(-scale * gradient, update.weight_diff[name], atol=1e-6)


def test_order_of_batches_matters_and_is_followed() -> None:
    order = ((0, 1, 2, 3), (3, 1, 0, 2))
    update = update_of(4, 2, 2, learning_rate=0.1, order=order)
    assert update.steps == [[0, 1], [2, 3], [3, 1], [0, 2]]
    assert relative_error(update)[0] < 1e-4
    assert relative_error(dataclasses.replace(update, batch_order=None))[0] > 0.05


def test_simulation_leaves_the_random_numbers_and_the_update_alone() -> None:
    update = update_of(4, 4)
    before = {name: value.clone() for name, value in update.global_weights.items()}
    inputs, labels = torch.rand(4, 3, 24, 24), torch.tensor([0, 1, 0, 1])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    LocalSimulation(update, CPU)(inputs, labels)
    assert torch.equal(torch.rand(1), expected)
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
    assert dataclasses.replace(update, weight_diff=bare).running_change is None


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


def test_stage_three_attacks_refuse_batches_they_cannot_split() -> None:
    with pytest.raises(InputError, match="7 images in batches of 5"):
        target_from_update(update_of(7, 5))
    with pytest.raises(InputError, match="order"):
        target_from_update(update_of(4, 2, 2, order=((0, 1, 2, 3), (2, 3, 0, 1))))
    assert target_from_update(update_of(8, 4, 2)).bn_statistics is None


def test_stage_three_attacks_refuse_fedprox_of_several_steps() -> None:
    with pytest.raises(InputError, match="FedProx"):
        target_from_update(dataclasses.replace(update_of(4, 2), proximal=1.0))
    # The first step starts where the proximal term vanishes.
    target_from_update(dataclasses.replace(update_of(4, 4), proximal=1.0))


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
    found = LocalSimulation(update, CPU, torch.float64)(inputs, victims().labels[:4]).gradient
    for simulated, real in zip(found, prox_update(2.0), strict=True):
        torch.testing.assert_close(simulated, real, atol=1e-10, rtol=1e-8)
    free = prox_update(0.0)
    assert any(not torch.allclose(a, b, rtol=0.01) for a, b in zip(found, free, strict=True))
