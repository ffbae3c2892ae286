"""Refiner and the shadow defense: what they train on, and the attackers who take it back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack.attacks.spectral import Spectral
from attack.knowledge.answers.refiner import disturbance
from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.noised_inputs import denoised, disturbed
from attack.metrics import assign, psnr
from core.data.embedded import photo_patches
from core.errors import InputError
from core.losses import DEFAULT_LOSS
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from gradients.client import ClientSettings, generator, share_update
from gradients.defenses import ClientView, parse_defenses
from gradients.defenses.refiner import KeyGradient, Refiner, semantic_gap
from gradients.defenses.shadow import Shadow, sensitivity
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")
LENET = ModelSpec("lenet", 10, 16, width=8)
CNN = ModelSpec("cnn", 10, 16, width=16)
WORDS = ("refiner", "shadow")


def model(spec: ModelSpec = LENET) -> nn.Module:
    torch.manual_seed(0)
    return build_model(spec)


def photographs() -> torch.Tensor:
    """Two images of the embedded photographs."""
    pixels = torch.from_numpy(photo_patches("photo-patches").images[[40, 200]]).float() / 255
    return F.interpolate(pixels, size=(16, 16), mode="area")


@functools.cache
def shared(
    words: str, spec: ModelSpec = LENET, images: Callable[[], torch.Tensor] | None = None
) -> tuple[Target, Truth]:
    """What is shared of two images under a defense."""
    chosen = smooth_images(2, 16) if images is None else images()
    truth = Truth(chosen, torch.tensor([3, 7]))
    settings = ClientSettings(defenses=parse_defenses(words), train_mode=False)
    target = share_update(model(spec), spec, data_spec(16), truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


def view(images: torch.Tensor | None = None) -> ClientView:
    """The client of `shared`, before it trains."""
    images = smooth_images(2, 16) if images is None else images
    inputs = data_spec(16).normalize(images)
    labels = torch.tensor([3, 7])[: len(images)]
    return ClientView(model(), inputs, labels, generator(0, 2), data=data_spec(16))


@functools.cache
def trained_on(words: str) -> torch.Tensor:
    """In pixels of [0, 1]."""
    (defense,) = parse_defenses(words)
    inputs, labels = defense.encode(view())
    assert labels.tolist() == [3, 7]
    return data_spec(16).denormalize(inputs)


def quality(images: torch.Tensor, truth: torch.Tensor) -> float:
    return float(psnr(images[assign(images, truth)], truth).mean())


@pytest.mark.parametrize("words", WORDS)
def test_what_is_shared_is_the_gradient_of_the_disturbed_images(words: str) -> None:
    target, _ = shared(words)
    network = target.build_model()
    loss = target.loss(network(data_spec(16).normalize(trained_on(words))), torch.tensor([3, 7]))
    for g, s in zip(
        torch.autograd.grad(loss, list(network.parameters())), target.gradient.values(), strict=True
    ):
        torch.testing.assert_close(g, s, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("words", WORDS)
def test_a_client_is_left_as_it_was(words: str) -> None:
    client = view()
    before = {name: value.clone() for name, value in client.model.state_dict().items()}
    images, modes = client.images.clone(), [m.training for m in client.model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    parse_defenses(words)[0].encode(client)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(client.images, images, rtol=0, atol=0)
    assert [m.training for m in client.model.modules()] == modes
    for name, value in client.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("words", WORDS)
def test_only_images_are_disturbed(words: str) -> None:
    bare = ClientView(model(), smooth_images(1, 16), torch.zeros(1), torch.Generator())
    with pytest.raises(InputError, match="these are none"):
        parse_defenses(words)[0].encode(bare)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("refiner:-1", "must not be negative"),
        ("refiner:1:-2", "must not be negative"),
        ("refiner:1:2:1", "must lie in"),
        ("shadow:-0.1", "must not be negative"),
        ("shadow:0.1:0", "must lie in"),
    ],
)
def test_impossible_words_are_refused(words: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_defenses(words)


# -- Refiner -----------------------------------------------------------------------


def test_the_descent_brings_the_key_gradient_nearer_and_the_image_farther() -> None:
    client, private = view(), smooth_images(2, 16)
    kept = KeyGradient(client)
    start, robust = trained_on("refiner:0.2:0"), trained_on("refiner:0.2:30")
    distances = [float(distance_from(kept, x)) for x in (start, robust)]
    assert distances[1] < 0.8 * distances[0]
    assert float(semantic_gap(robust, private)) > 0.3
    # Without the gap the descent stays where the gradient takes it.
    alike = trained_on("refiner:0:30")
    assert float(semantic_gap(robust, private)) > float(semantic_gap(alike, private))


def distance_from(kept: KeyGradient, images: torch.Tensor) -> torch.Tensor:
    return kept.distance(data_spec(16).normalize(images)).detach()


def test_the_distance_is_that_of_significant_elements() -> None:
    kept = KeyGradient(view())
    assert float(distance_from(kept, smooth_images(2, 16))) == pytest.approx(0, abs=1e-6)
    assert all(float(w.min()) >= 0 and float(w.max()) == 1 for w in kept.weights)
    network = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    client = ClientView(network, torch.tensor([[1.0, 3.0]]), torch.tensor([0]), torch.Generator())
    other = KeyGradient(client)
    # The second input of the first class has a parameter of zero: its gradient is free.
    expected = (network.weight.detach() * other.own[0]).abs()
    torch.testing.assert_close(other.weights[0], expected / expected.max())
    assert float(other.weights[0][0, 1]) == 0
    changed = other.distance(torch.tensor([[1.0, 3.0]]) + torch.tensor([[0.5, 0.0]]))
    assert float(changed.detach()) > 0


def test_the_evaluation_network_sees_structure_and_not_brightness() -> None:
    images = smooth_images(2, 16) * 0.5
    assert float(semantic_gap(images, images)) == pytest.approx(0, abs=1e-5)
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(semantic_gap(noise, images)) > 3 * float(semantic_gap(images + 0.1, images))


def test_the_stated_disturbance_is_the_one_that_clients_add() -> None:
    defense = Refiner()
    mean, variance = disturbance(defense)
    found = trained_on("refiner") - (1 - defense.share) * smooth_images(2, 16)
    assert float(found.mean()) == pytest.approx(mean, abs=0.1)
    assert 0.3 * variance < float(found.var()) < 2 * variance


# -- Shadow defense ----------------------------------------------------------------


def test_noise_lies_where_the_model_is_sensitive() -> None:
    client, defense = view(), Shadow(0.1, 0.25)
    size = defense.noise_size(client.model, client.images, client.labels)
    found = sensitivity(client.model, client.images, client.labels, DEFAULT_LOSS)
    assert size.shape == (2, 1, 16, 16)
    for noise, places in zip(size.flatten(1), found.flatten(1), strict=True):
        assert float((noise > 0).float().mean()) == pytest.approx(0.25, abs=0.01)
        assert float(noise.max()) == pytest.approx(0.1)
        assert float(places[noise > 0].min()) >= float(places[noise == 0].max())
    change = (trained_on("shadow:0.1:0.25") - smooth_images(2, 16)).abs().amax(1, keepdim=True)
    assert float(change[size == 0].max()) < 1e-5
    assert float(change[size > 0].mean()) > 0.02


def test_sensitivity_is_that_of_the_loss() -> None:
    class LeftHalf(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = x[..., : x.shape[-1] // 2].mean((1, 2, 3))
            return torch.stack([left, -left], dim=1)

    found = sensitivity(LeftHalf(), torch.zeros(1, 3, 16, 16), torch.tensor([0]), DEFAULT_LOSS)
    assert bool((found[..., :7] > 0.99).all())
    assert bool((found[..., 10:] == 0).all())


def test_noise_is_drawn_anew_for_every_batch() -> None:
    client = view()
    first, second = (Shadow().encode(client)[0] for _ in range(2))
    assert float((first - second).abs().max()) > 0.1


# -- The attackers -----------------------------------------------------------------


def test_what_is_behind_noise_of_known_size_is_found() -> None:
    images = smooth_images(4, 16)
    variance = torch.zeros(1, 1, 16, 16)
    variance[..., 8:] = 0.04
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    observed = (images + variance.sqrt() * noise).clamp(0, 1)
    found = denoised(observed, variance)
    errors = [(x - images)[..., 8:].square().mean() for x in (found, observed)]
    assert float(errors[0]) < 0.4 * float(errors[1])
    # Where there is no noise, the observation holds.
    assert float((found - images)[..., :6].abs().max()) < 0.05


@pytest.mark.parametrize("words", WORDS)
def test_the_told_objective_is_met_by_the_truth(words: str) -> None:
    target, truth = shared(words)
    share = 0.5 if words == "refiner" else 1.0
    told = disturbed(target, share, trained_on(words) - share * truth.images)
    assert isinstance(told.model, EncodedArchitecture)
    network = told.build_model()
    gradients = []
    for images in (truth.images, truth.images.flip(3)):
        loss = told.loss(network(data_spec(16).normalize(images)), truth.labels)
        found = torch.autograd.grad(loss, list(network.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    given = torch.cat([g.flatten() for g in target.gradient.values()])
    cosines = [float(F.cosine_similarity(g, given, dim=0)) for g in gradients]
    assert cosines[0] > 0.9999 > cosines[1]


@pytest.mark.parametrize(("words", "gain"), [("refiner", 2.0), ("shadow", 1.0)])
def test_who_is_told_sees_more(words: str, gain: float) -> None:
    target, truth = shared(words, CNN, photographs)
    found = {}
    for adaptive in (True, False):
        config = Spectral.published.changed(iterations=100, race=0, adaptive=adaptive)
        attacked = Spectral(config).reconstruct(target, labels=truth.labels, device=CPU, seed=0)
        found[adaptive] = quality(attacked.images, truth.images)
        if adaptive:
            assert "candidates" in attacked.details["adaptations"][0]
    assert found[True] > found[False] + gain


def test_several_steps_are_not_taken_apart() -> None:
    for words in WORDS:
        target, truth = shared(words)
        several = dataclasses.replace(target, local=dataclasses.replace(target.local, batches=2))
        config = Spectral.published.changed(iterations=2, race=0, adaptive=True)
        found = Spectral(config).reconstruct(several, labels=truth.labels, device=CPU, seed=0)
        assert "are matched" in found.details["adaptations"][0]
