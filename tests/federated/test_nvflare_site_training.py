"""A site's local training and what it says about its updates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import InputError
from federated.flare.site_training import (
    SiteSettings,
    SiteTraining,
    TrainingDiverged,
    TrainingStopped,
    scores,
)
from federated.phantoms.data_set import LIST_PREFIX, make_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, scale=0.02, size=32)
    return folder


def settings(phantoms: Path, site: int = 1, **more: Any) -> SiteSettings:
    given = {"model_name": "cnn", "image_size": 32, "batch_size": 3, "lr": 0.05, **more}
    return SiteSettings(str(phantoms), str(phantoms / f"{LIST_PREFIX}{site}.json"), **given)


def site(phantoms: Path, number: int = 1, **more: Any) -> SiteTraining:
    # A network's first weights are those of the random numbers that a neighbour left.
    torch.manual_seed(0)
    return SiteTraining(settings(phantoms, number, **more), torch.device("cpu"))


def test_the_update_is_that_of_plain_sgd(phantoms: Path) -> None:
    local = site(phantoms)
    start = local.weights()
    change = local.train(start, 2)
    other = site(phantoms)
    other.load(start)
    other.model.train()
    optimizer = torch.optim.SGD(other.model.parameters(), 0.05)
    (order,) = local.orders(2)
    images, labels = other.train_images.images(), other.train_images.labels()
    for first in range(0, 8, 3):
        chosen = list(order[first : first + 3])
        optimizer.zero_grad()
        outputs = other.model(other.data.normalize(images[chosen]))
        torch.nn.functional.cross_entropy(outputs, labels[chosen]).backward()
        optimizer.step()
    for name, value in other.weights().items():
        np.testing.assert_allclose(change[name], value - start[name], atol=1e-6)


def test_the_simulated_local_training_explains_the_update(phantoms: Path) -> None:
    """What the inverter is told is what happened: the true images explain the update.

    Trained and simulated in float64: in float32 rounding tips single ReLUs, by how much of
    the update depends on the weights and on the processor (3 % were seen).
    """
    from tests.federated.sites import simulate

    local = site(phantoms, aggregation_epochs=2)
    local.model.double()
    start = local.weights()
    update = local.local_update(local.train(start, 1), start, 1)
    inputs = local.data.normalize(local.train_images.images()).double()
    simulated, _ = simulate(update, inputs, local.train_images.labels(), torch.float64)
    found = torch.cat([g.flatten() for g in simulated])
    expected = torch.cat([g.flatten() for g in update.gradient.values()])
    # The update is handed on in float32, as differences of weights over the learning rate.
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_update_of_a_site_with_adamw_is_explained_as_well(phantoms: Path) -> None:
    from tests.federated.sites import simulate

    local = site(
        phantoms,
        aggregation_epochs=2,
        lr=1e-3,
        optimizer="adamw weight-decay=0.1 eps=1e-3 clip-norm=0.5",
    )
    local.model.double()
    start = local.weights()
    update = local.local_update(local.train(start, 1), start, 1)
    inputs = local.data.normalize(local.train_images.images()).double()
    labels = local.train_images.labels()
    expected = torch.cat([g.flatten() for g in update.gradient.values()])
    simulated, _ = simulate(update, inputs, labels, torch.float64)
    found = torch.cat([g.flatten() for g in simulated])
    assert (found - expected).norm() < 1e-4 * expected.norm()
    plain = dataclasses.replace(update, optimiser=None)
    other = torch.cat([g.flatten() for g in simulate(plain, inputs, labels, torch.float64)[0]])
    assert (other - expected).norm() > 0.5 * expected.norm()


def test_the_inverter_is_told_of_fedprox(phantoms: Path) -> None:
    local = site(phantoms, fedproxloss_mu=2.0)
    start = local.weights()
    assert local.local_update(local.train(start, 1), start, 1).proximal == 2.0


def test_rounds_are_seeded_and_differ(phantoms: Path) -> None:
    first, second = site(phantoms), site(phantoms)
    assert first.orders(1) == second.orders(1)
    assert first.orders(1) != first.orders(2)
    assert site(phantoms, seed=1).orders(1) != first.orders(1)
    start = first.weights()
    for name, value in first.train(start, 0).items():
        np.testing.assert_array_equal(value, second.train(start, 0)[name])


def test_the_learning_rate_falls_after_forty_epochs(phantoms: Path) -> None:
    local = site(phantoms, aggregation_epochs=2)
    assert local.learning_rate(19) == pytest.approx(0.05)
    assert local.learning_rate(20) == pytest.approx(0.005)


def test_fedprox_keeps_the_local_model_near(phantoms: Path) -> None:
    near, free = site(phantoms, fedproxloss_mu=10.0), site(phantoms)
    start = free.weights()

    def distance(local: SiteTraining) -> float:
        change = local.train(start, 0)
        names = [name for name, _ in local.model.named_parameters()]
        return sum(float(np.square(change[name]).sum()) for name in names)

    assert distance(near) < distance(free)


def test_a_site_with_one_image_trains(phantoms: Path) -> None:
    local = site(phantoms, 9)
    assert (local.batch_size, local.steps_per_epoch) == (1, 1)
    change = local.train(local.weights(), 0)
    assert all(np.asarray(change[name]).any() for name, _ in local.model.named_parameters())
    assert local.evaluate(local.train_images).auc is None


def test_another_network_is_refused(phantoms: Path) -> None:
    local = site(phantoms)
    weights = local.weights()
    name = next(iter(weights))
    with pytest.raises(InputError, match=name):
        local.load({key: value for key, value in weights.items() if key != name})
    with pytest.raises(InputError, match="shape"):
        local.load({**weights, name: np.zeros(3)})


def test_divergence_and_interruption_are_told(phantoms: Path) -> None:
    local = site(phantoms, lr=1e30)
    with pytest.raises(TrainingDiverged, match="diverged"):
        local.train(local.weights(), 0)
    calm = site(phantoms)
    with pytest.raises(TrainingStopped):
        calm.train(calm.weights(), 0, lambda: True)
    with pytest.raises(TrainingStopped):
        calm.evaluate(calm.valid_images, lambda: True)


def test_a_diverged_network_has_scores_that_can_be_written() -> None:
    broken = scores(torch.full((4, 2), float("nan")), torch.tensor([0, 1, 1, 1]))
    assert (broken.accuracy, broken.auc, broken.count) == (0.0, None, 4)
    half = torch.tensor([[0.9, 0.1], [float("nan"), float("nan")]])
    assert scores(half, torch.tensor([0, 0])).accuracy == 0.5


def test_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    positive = (torch.rand(200, generator=generator) * 20).round() / 20
    labels = (torch.rand(200, generator=generator) < 0.4).long()
    found = scores(torch.stack([1 - positive, positive], 1), labels)
    assert found.auc == pytest.approx(roc_auc_score(labels, positive))
    assert found.accuracy == pytest.approx(
        float(((positive > 0.5) == labels.bool()).float().mean())
    )
    assert "undefined" in str(scores(torch.ones(3, 2), torch.ones(3).long()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"aggregation_epochs": 0},
        {"lr": 0.0},
        {"model_name": "nothing"},
        {"data_root": "nowhere"},
        {"dataset_json": "nowhere.json"},
        {"optimizer": "adamx"},
        {"optimizer": "adam lr=0.2"},
    ],
)
def test_impossible_settings_are_named(phantoms: Path, arguments: dict[str, Any]) -> None:
    good = {"data_root": str(phantoms), "dataset_json": str(phantoms / f"{LIST_PREFIX}1.json")}
    with pytest.raises(InputError, match=next(iter(arguments))):
        SiteSettings(**{**good, **arguments})


def test_a_label_without_class_is_refused(phantoms: Path, tmp_path: Path) -> None:
    image = json.loads((phantoms / f"{LIST_PREFIX}9.json").read_text())["training"][0]["image"]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": image, "label": 2}]}))
    local = SiteTraining(SiteSettings(str(phantoms), str(path), "cnn", image_size=32))
    with pytest.raises(InputError, match="label 2"):
        _ = local.train_images
