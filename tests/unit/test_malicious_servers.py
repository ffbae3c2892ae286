"""Servers that tell clients apart, need no block of their own, or poison the whole model."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

from attack.attacks import OptimizationAttack, get_attack
from attack.attacks.ares import Ares
from attack.metrics import assign, psnr
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.models.malicious import KINDS, OF_TEXT_ALONE, malice_of
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.malicious_server import sent_to_clients, tamper
from gradients.servers import Means, get_server, server_names
from gradients.servers.ares import hidden_layer, inputs_at
from gradients.servers.eggv import Projector
from gradients.sums import Aggregation, share_sum
from tests.targets import data_spec, smooth_images

SIZE = 8
DATA = data_spec(SIZE)
MLP = ModelSpec("mlp", 10, SIZE, width=32)
CPU = torch.device("cpu")


def sent(spec: ModelSpec, malicious: str, batch: int) -> tuple[ModelSpec, torch.nn.Module]:
    """The malicious architecture and model, in float64."""
    torch.manual_seed(0)
    model = build_model(spec).double()
    spec = dataclasses.replace(spec, malicious=malicious)
    public = DATA.normalize(smooth_images(400, SIZE, seed=7)).double()
    return spec, tamper(model, spec, public, batch_size=batch)


def summed(
    malicious: str,
    clients: int,
    each: int,
    local: LocalTraining,
    participants: tuple[int, ...] = (),
) -> tuple[Target, Truth]:
    spec, model = sent(MLP, malicious, clients * each)
    aggregation = Aggregation(clients, participants)
    n = len(aggregation.present) * each
    truth = Truth(smooth_images(n, SIZE, seed=3), torch.arange(n) % 10)
    settings = ClientSettings(train_mode=False, local=local)
    models = sent_to_clients(model, spec)
    target = share_sum(models, spec, DATA, truth.images, truth.labels, settings, aggregation)
    return target, truth


def recovered(name: str, target: Target, truth: Truth, least: float = 30.0) -> int:
    """Images that come out at a PSNR of `least` or better."""
    found = get_attack(name)().reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    quality = psnr(found.images[assign(found.images, truth.images)], truth.images)
    return int((quality > least).sum())


def test_every_kind_is_a_server_that_says_where_it_comes_from() -> None:
    assert set(server_names()) == KINDS.keys() - {OF_TEXT_ALONE}
    for name in server_names():
        assert "https://arxiv.org/abs/" in str(get_server(name).__doc__)


def test_clients_are_told_apart_in_their_sum() -> None:
    one_step = LocalTraining()
    apart, truth = summed("loki:48:5", 5, 4, one_step)
    mixed, _ = summed("imprint:48", 5, 4, one_step)
    told = recovered("loki", apart, truth)
    assert told >= 16
    assert recovered("robbing-the-fed", mixed, truth) <= told - 4


def test_images_stand_where_their_clients_do() -> None:
    target, truth = summed("loki:200:4", 4, 2, LocalTraining(), participants=(3, 1))
    found = get_attack("loki")().reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    assert found.details["solved"] == 4
    for client in (0, 1):
        own = slice(2 * client, 2 * client + 2)
        places = assign(found.images[own], truth.images[own])
        assert (psnr(found.images[own][places], truth.images[own]) > 30).all()


def test_the_distance_of_a_sum_is_that_of_every_client_s_own_model() -> None:
    target, truth = summed("loki:200:4", 4, 1, LocalTraining(), participants=(3, 1))
    found = get_attack("loki")().reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    assert found.objective < 1e-3
    swapped = get_attack("loki")().reconstruct(
        target, labels=truth.labels.flip(0), device=CPU, seed=0
    )
    assert swapped.objective > 0.1


@pytest.mark.parametrize("clients", [1, 4])
def test_local_steps_are_no_obstacle_where_clients_are_told_apart(clients: int) -> None:
    local = LocalTraining(epochs=2, batches=2, lr=1e-4)
    target, truth = summed(f"loki:100:{clients}", clients, 4, local)
    assert recovered("loki", target, truth, 25.0) >= 4 * clients - 2


def test_more_clients_than_the_model_was_made_for() -> None:
    with pytest.raises(InputError, match="made for 2 clients, and client 2 takes part"):
        summed("loki:16:2", 3, 1, LocalTraining())
    spec, model = sent(MLP, "loki:16", 2)
    truth = Truth(smooth_images(2, SIZE), torch.arange(2))
    target = share_update(model, spec, DATA, truth.images, truth.labels, ClientSettings())
    assert target is not None
    assert malice_of(target.model) == "loki:16"
    assert recovered("loki", target, truth) == 2
    honest = share_update(build_model(MLP), MLP, DATA, truth.images, truth.labels, ClientSettings())
    assert honest is not None
    with pytest.raises(InputError, match="tells no clients apart"):
        get_attack("loki")().reconstruct(honest, labels=truth.labels, device=CPU, seed=0)


CNN = ModelSpec("fedavg_cnn", 10, 16, width=32)


def hidden(
    spec: ModelSpec, malicious: str, batch: int, local: LocalTraining
) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    model = build_model(spec).double()
    data = data_spec(spec.image_size)
    spec = dataclasses.replace(spec, malicious=malicious)
    public = data.normalize(smooth_images(300, spec.image_size, seed=7)).double()
    sent = tamper(model, spec, public, batch_size=batch)
    truth = Truth(smooth_images(batch, spec.image_size, seed=3), torch.arange(batch) % 10)
    settings = ClientSettings(train_mode=False, local=local)
    target = share_update(sent, spec, data, truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


def test_activations_of_a_hidden_layer_come_apart_exactly() -> None:
    target, truth = hidden(CNN, "ares:200", 4, LocalTraining())
    model = target.build_model()
    name, _, _ = hidden_layer(model)
    seen = inputs_at(model, name, target.data.normalize(truth.images)).detach().double()
    found = Ares()._activations(target, CPU)
    nearest = torch.cdist(seen, found).min(1).values / seen.norm(dim=1)
    assert (nearest < 1e-6).sum() >= 3


def test_images_are_found_behind_activations_where_the_differences_count() -> None:
    target, truth = hidden(CNN, "ares:200", 2, LocalTraining())
    quality = {}
    for weight in (0.0, 2e-3):
        attack = Ares(weight=weight, rounds=200)
        found = attack.reconstruct(target, labels=truth.labels, device=CPU, seed=0)
        places = assign(found.images, truth.images)
        quality[weight] = float(psnr(found.images[places], truth.images).mean())
    assert quality[2e-3] > 20
    assert quality[2e-3] > quality[0.0] + 5


@pytest.mark.parametrize("steps", [1, 4])
def test_a_dense_first_layer_gives_the_images_themselves(steps: int) -> None:
    local = LocalTraining(batches=steps, lr=1e-4)
    target, truth = hidden(ModelSpec("mlp", 10, 8, width=256), "ares:200", 8, local)
    assert recovered("ares", target, truth, 60 if steps == 1 else 25) >= 6


def test_a_hidden_layer_is_needed() -> None:
    with pytest.raises(InputError, match="hidden fully connected layer"):
        sent(ModelSpec("cnn", 10, SIZE, width=4), "ares:8", 1)
    with pytest.raises(InputError, match="has 32 neurons"):
        sent(MLP, "ares:33", 1)


LENET = ModelSpec("lenet", 10, SIZE, width=8)


@functools.cache
def poisoned(steps: int) -> tuple[torch.nn.Module, torch.nn.Module, Means]:
    """An honest model, the same poisoned, and what it was poisoned with."""
    torch.manual_seed(0)
    model = build_model(LENET).eval()
    spec = dataclasses.replace(LENET, malicious=f"eggv:{steps}")
    means = Means(spec, DATA.normalize(smooth_images(600, SIZE, 7)), torch.arange(600) % 10, 2)
    return model, get_server("eggv")().send(model, means), means


def movements(model: torch.nn.Module) -> torch.Tensor:
    """Of another projection than the server's, on batches that no model has seen."""
    torch.manual_seed(5)
    projector = Projector.of(model)
    images, classes = DATA.normalize(smooth_images(40, SIZE, 77)), torch.arange(40) % 10
    pairs = zip(images.split(2), classes.split(2), strict=True)
    return torch.cat([projector.movements(model, x, y)[0].detach() for x, y in pairs])


def test_gradients_of_a_poisoned_model_move_with_every_image() -> None:
    honest, model, _ = poisoned(60)
    before, after = movements(honest), movements(model)
    assert after.log().mean() > before.log().mean() + 0.2
    assert after.min() > before.min()


def noisy_quality(model: torch.nn.Module, spec: ModelSpec, seed: int) -> float:
    """Mean PSNR of two images out of a gradient with a tenth of noise."""
    truth = Truth(smooth_images(2, SIZE, seed=30 + seed), torch.tensor([4, 9]))
    settings = ClientSettings(train_mode=False)
    target = share_update(
        copy.deepcopy(model), spec, DATA, truth.images, truth.labels, settings
    )  # fmt: skip
    assert target is not None
    size = torch.cat([g.flatten() for g in target.gradient.values()]).square().mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    noisy = {
        name: g + 0.1 * size * torch.randn(g.shape, generator=generator)
        for name, g in target.gradient.items()
    }
    kind = get_attack("eggv" if spec.malicious else "spectral")
    assert issubclass(kind, OptimizationAttack)
    attack = kind(kind.published.changed(iterations=100))
    found = attack.reconstruct(
        dataclasses.replace(target, gradient=noisy), labels=truth.labels, device=CPU, seed=0
    )
    return float(psnr(found.images[assign(found.images, truth.images)], truth.images).mean())


def test_noise_hides_less_of_a_poisoned_model_s_batches() -> None:
    honest, model, means = poisoned(60)
    gains = [
        noisy_quality(model, means.spec, seed) - noisy_quality(honest, LENET, seed)
        for seed in (0, 1)
    ]
    assert sum(gains) / 2 > 0.7


def test_an_honest_model_is_no_target_of_it() -> None:
    truth = Truth(smooth_images(2, SIZE), torch.arange(2))
    honest = share_update(build_model(MLP), MLP, DATA, truth.images, truth.labels, ClientSettings())
    assert honest is not None
    with pytest.raises(InputError, match="trains it to leak"):
        get_attack("eggv")().reconstruct(honest, labels=truth.labels, device=CPU, seed=0)


def test_a_server_without_classes_cannot_poison() -> None:
    with pytest.raises(InputError, match="whose classes are known"):
        sent(LENET, "eggv:2", 2)
