"""Defenses that change what a client trains on, and the attackers who take it back."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from attack.attacks.spectral import Spectral
from attack.knowledge.answers.ats import taken_back
from attack.knowledge.answers.instahide import decoded, shares_of_mixtures
from attack.metrics import assign, psnr
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.target import Target, Truth
from gradients.client import ClientSettings, generator, share_update
from gradients.defenses import ClientView, parse_defenses
from gradients.defenses.ats import ATS, transformed
from gradients.defenses.instahide import LARGEST_SHARE, InstaHide
from tests.targets import data_spec, smooth_images

CPU = torch.device("cpu")
LENET8 = ModelSpec("lenet", 10, 8, width=8)
LENET = ModelSpec("lenet", 10, 16, width=8)


@functools.cache
def shared(words: str, seed: int = 0) -> tuple[Target, Truth]:
    """What is shared of two images under a defense."""
    torch.manual_seed(0)
    truth = Truth(smooth_images(2, 16), torch.tensor([3, 7]))
    settings = ClientSettings(defenses=parse_defenses(words), seed=seed)
    target = share_update(
        build_model(LENET), LENET, data_spec(16), truth.images, truth.labels, settings
    )
    assert target is not None
    return target, truth


def encoded(words: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the client of `shared` trained on: network inputs and labels."""
    _, truth = shared(words, seed)
    (defense,) = parse_defenses(words)
    spec = data_spec(16)
    torch.manual_seed(0)
    inputs = spec.normalize(truth.images)
    numbers = generator(seed, 2)
    view = ClientView(build_model(LENET), inputs, truth.labels, numbers, data=spec)
    return defense.encode(view)


def attacked(words: str, adaptive: bool, seed: int = 0, **changes: object) -> float:
    """Mean PSNR of an attack with known labels."""
    target, truth = shared(words, seed)
    config = Spectral.published.changed(iterations=120, race=0, adaptive=adaptive, **changes)
    found = Spectral(config).reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    return float(psnr(found.images[assign(found.images, truth.images)], truth.images).mean())


# -- ATS ---------------------------------------------------------------------------


def picture() -> tuple[torch.Tensor, Image.Image]:
    """The same 8-bit image as a tensor and as Pillow has it."""
    pixels = (smooth_images(1, 12)[0] * 255).round().to(torch.uint8)
    return pixels[None].float() / 255, Image.fromarray(pixels.permute(1, 2, 0).numpy())


def moved(image: Image.Image, x: float, y: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


@pytest.mark.parametrize(
    ("step", "pillow"),
    [
        (("translateX", 0.3), lambda image: moved(image, 0.3 * 12, 0)),
        (("translateY", -0.1), lambda image: moved(image, 0, -0.1 * 12)),
        (("contrast", 0.4), lambda image: ImageEnhance.Contrast(image).enhance(1.4)),
        (("contrast", -0.3), lambda image: ImageEnhance.Contrast(image).enhance(0.7)),
        (("color", 0.5), lambda image: ImageEnhance.Color(image).enhance(1.5)),
        (("brightness", -0.2), lambda image: ImageEnhance.Brightness(image).enhance(0.8)),
        (("sharpness", 0.5), lambda image: ImageEnhance.Sharpness(image).enhance(1.5)),
        (("invert", 0), ImageOps.invert),
        (("posterize", 5), lambda image: ImageOps.posterize(image, 6)),
        (("solarize", 4), lambda image: ImageOps.solarize(image, 256 - 256 * 4 / 9)),
        (("autocontrast", 1), ImageOps.autocontrast),
    ],
    # Names of functions hold addresses, which differ between the processes of a run.
    ids=lambda given: "-".join(map(str, given)) if isinstance(given, tuple) else "pillow",
)
def test_operations_are_those_of_pillow(step: tuple[str, float], pillow: object) -> None:
    tensor, image = picture()
    assert callable(pillow)
    expected = np.asarray(pillow(image)).astype(float).transpose(2, 0, 1) / 255
    found = transformed(tensor, (step,))[0].numpy()
    # Pillow rounds to 8 bits, and a mean of greys before.
    assert np.abs(found - expected).max() < 2 / 255


def test_rotations_and_shears_are_those_of_pillow_inside() -> None:
    tensor, image = picture()
    turned = image.rotate(20, Image.Resampling.BILINEAR)
    sheared = image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, 0.2, 1, 0), Image.Resampling.BILINEAR
    )
    for step, pillow in ((("rotate", 20.0), turned), (("shearY", 0.2), sheared)):
        found = transformed(tensor, (step,))[0, :, 4:8, 4:8].numpy()
        expected = np.asarray(pillow).astype(float).transpose(2, 0, 1)[:, 4:8, 4:8] / 255
        assert np.abs(found - expected).max() < 0.02


def test_equalized_images_have_every_level_as_often() -> None:
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.1
    flat = transformed(images, (("equalize", 0),)).flatten(2)
    assert float((flat.sort(2).values - torch.arange(1, 257) / 256).abs().max()) < 0.03
    ordered = flat.gather(2, images.flatten(2).argsort(2))
    assert bool((ordered.diff(dim=2) >= 0).all())


def test_every_outcome_of_a_policy_is_drawn_equally_often() -> None:
    spec = data_spec(8)
    images = smooth_images(1, 8).expand(1600, 3, 8, 8)
    defense = ATS("7+18")
    numbers = torch.Generator().manual_seed(0)
    view = ClientView(
        build_model(LENET), spec.normalize(images), torch.zeros(1600), numbers, data=spec
    )
    found = spec.denormalize(defense.encode(view)[0])
    outcomes = defense.outcomes()
    assert len(outcomes) == 4
    for steps in outcomes:
        alike = (found - transformed(images[:1], steps)).abs().amax((1, 2, 3)) < 1e-5
        # Of a binomial with 1600 draws of probability 1/4.
        assert abs(float(alike.sum()) - 400) < 4 * (1600 * 0.25 * 0.75) ** 0.5


def test_ats_is_for_images_whose_normalisation_is_known() -> None:
    view = ClientView(build_model(LENET), smooth_images(1, 16), torch.zeros(1), torch.Generator())
    with pytest.raises(InputError, match="transforms images"):
        ATS().encode(view)


@pytest.mark.parametrize("policies", ["50", "a", "3--1", "", "3-1+"])
def test_policies_that_are_none_are_refused(policies: str) -> None:
    with pytest.raises(InputError, match="policies are numbers below 50"):
        parse_defenses(f"ats:{policies}")


def test_a_transformed_image_betrays_its_transformation() -> None:
    images, outcomes = smooth_images(4, 16), ATS("3-1-7").outcomes()
    drawn = [0, 5, 6, 3]
    seen = torch.cat([transformed(images[i : i + 1], outcomes[n]) for i, n in enumerate(drawn)])
    found, before = taken_back(seen, outcomes)
    assert sum(f == outcomes[n] for f, n in zip(found, drawn, strict=True)) >= 3
    again = [transformed(x, steps) for x, steps in zip(before.split(1), found, strict=True)]
    assert float((torch.cat(again) - seen).square().mean()) < 2e-3


def test_who_takes_transformations_back_sees_the_private_image() -> None:
    words = "ats:3-1-7"
    target, _ = shared(words)
    inputs, _ = encoded(words)
    # The gradient is that of the transformed images.
    model = target.build_model()
    outputs = target.loss(model(inputs), torch.tensor([3, 7]))
    gradient = torch.autograd.grad(outputs, list(model.parameters()))
    for g, s in zip(gradient, target.gradient.values(), strict=True):
        torch.testing.assert_close(g, s, rtol=1e-4, atol=1e-6)
    assert attacked(words, True) > attacked(words, False) + 3


def test_several_steps_are_not_taken_apart() -> None:
    target, truth = shared("ats")
    several = dataclasses.replace(target, local=dataclasses.replace(target.local, batches=2))
    config = Spectral.published.changed(iterations=2, race=0, adaptive=True)
    found = Spectral(config).reconstruct(several, labels=truth.labels, device=CPU, seed=0)
    assert "are matched, and not taken back" in found.details["adaptations"][0]


# -- InstaHide ---------------------------------------------------------------------


def test_an_encoding_is_a_mixture_with_random_signs() -> None:
    spec, images = data_spec(8), smooth_images(3, 8)
    view = ClientView(
        build_model(LENET8),
        spec.normalize(images),
        torch.tensor([2, 0, 1]),
        torch.Generator().manual_seed(0),
    )
    found, labels = InstaHide(2).encode(view)
    assert labels.shape == (3, 10)
    # The labels say which images are in a mixture, and how much of each.
    weights = labels[:, [2, 0, 1]]
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert float(weights.max()) <= LARGEST_SHARE + 1e-6
    assert bool(((weights > 0).sum(1) == 2).all())
    assert bool((weights.diagonal() > 0).all())
    mixtures = torch.einsum("ij,jchw->ichw", weights, view.images)
    torch.testing.assert_close(found.abs(), mixtures.abs(), atol=1e-6, rtol=1e-5)
    signs = (found * mixtures).sign()
    assert abs(float(signs.mean())) < 4 / signs.numel() ** 0.5


def test_an_image_alone_has_only_its_signs_hidden() -> None:
    inputs, labels = encoded_alone()
    torch.testing.assert_close(inputs.abs(), data_spec(8).normalize(smooth_images(1, 8)).abs())
    assert labels.tolist() == [[0, 0, 0, 1, *[0] * 6]]


def encoded_alone() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = data_spec(8).normalize(smooth_images(1, 8))
    numbers = torch.Generator().manual_seed(0)
    return InstaHide().encode(ClientView(build_model(LENET8), inputs, torch.tensor([3]), numbers))


@pytest.mark.parametrize("seed", range(3))
def test_the_last_layer_says_the_shares_of_both_mixtures(seed: int) -> None:
    target, truth = shared("instahide", seed)
    _, labels = encoded("instahide", seed)
    found = shares_of_mixtures(target, truth.labels)
    # Which of the two mixtures is the first image's is a matter of words.
    ordered, true = (one[one[:, 0].argsort()] for one in (found, labels[:, [3, 7]].double()))
    torch.testing.assert_close(ordered, true, atol=0.002, rtol=0)


def test_encodings_of_several_rounds_give_the_images() -> None:
    spec, images = data_spec(8), smooth_images(2, 8)
    defense, numbers = InstaHide(), torch.Generator().manual_seed(0)
    inputs = spec.normalize(images)
    weights = torch.cat([defense.weights(2, numbers) for _ in range(10)])
    mixtures = torch.einsum("ij,jchw->ichw", weights, inputs.double()).float()
    signs = torch.randint(0, 2, mixtures.shape, generator=numbers) * 2 - 1
    found = decoded(spec, signs * mixtures, weights)
    # The sign that a place has in both images stays open.
    ours = spec.normalize(found)
    alike, opposite = ((ours - sign * inputs).square().sum(0) for sign in (1, -1))
    error = torch.minimum(alike, opposite).mean()
    assert float(error) < 0.05 * float(inputs.square().sum(0).mean())


def test_who_decodes_sees_more_than_who_does_not() -> None:
    target, truth = shared("instahide")
    config = Spectral.published.changed(iterations=30, race=0, adaptive=True)
    found = Spectral(config).reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    assert "mixed and signed" in found.details["adaptations"][0]
    magnitudes = encoded("instahide")[0].abs()
    weights = shares_of_mixtures(target, truth.labels).float()
    again = torch.einsum("ij,jchw->ichw", weights, data_spec(16).normalize(found.images))
    untold = Spectral(config.changed(adaptive=False)).reconstruct(
        target, labels=truth.labels, device=CPU, seed=0
    )
    plain = data_spec(16).normalize(untold.images)
    errors = [float((one.abs() - magnitudes).square().mean()) for one in (again, plain)]
    assert errors[0] < errors[1]
