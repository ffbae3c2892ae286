"""Per-sample clipping, noise, and what they guarantee."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.target import LocalTraining
from gradients.local_update import Placement, local_sgd, trainable_parameters
from gradients.private_gradient import (
    PrivacySettings,
    clipped_gradient_sum,
    gaussian_epsilon,
    private_gradient,
)


def _model(norm: str = "group") -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec("cnn", n_classes=4, image_size=8, width=4, norm=norm)).double()


def _batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 4


def _one_by_one(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, max_norm: float
) -> list[torch.Tensor]:
    """The definition: every image's own gradient, clipped, summed."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        factor = min(1.0, max_norm / norm)
        total = [t + factor * g for t, g in zip(total, gradient, strict=True)]
    return total


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 1e6])
@pytest.mark.parametrize("mode", ["group norm", "eval mode"])
def test_sum_of_clipped_gradients_is_that_of_single_images(max_norm: float, mode: str) -> None:
    model = _model("group" if mode == "group norm" else "batch").train(mode == "group norm")
    images, labels = _batch()
    parameters = trainable_parameters(model)
    buffers = dict(model.named_buffers())
    for chunk in (2, 8):
        got = clipped_gradient_sum(model, parameters, buffers, images, labels, max_norm, chunk)
        for value, expected in zip(got, _one_by_one(model, images, labels, max_norm), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)


def test_resnet_with_in_place_activations() -> None:
    spec = ModelSpec("resnet18", n_classes=4, image_size=16, stem="cifar", width=4, norm="group")
    torch.manual_seed(0)
    model, (images, labels) = build_model(spec).double(), _batch(3)
    images = F.interpolate(images, scale_factor=2)
    got = clipped_gradient_sum(model, trainable_parameters(model), {}, images, labels, 0.5)
    for value, expected in zip(got, _one_by_one(model, images, labels, 0.5), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)


def test_batch_norm_in_train_mode_has_no_per_sample_gradient() -> None:
    model, (images, labels) = _model("batch").train(), _batch()
    with pytest.raises(InputError, match="--norm group, --model-eval or --dp-clipping batch"):
        clipped_gradient_sum(model, trainable_parameters(model), {}, images, labels, 1.0)


def _update(
    privacy: PrivacySettings,
    model: nn.Module | None = None,
    local: LocalTraining | None = None,
    seed: int = 0,
    shards: tuple[int, ...] = (),
) -> torch.Tensor:
    model, (images, labels) = model or _model(), _batch()
    local = local or LocalTraining()
    noise = torch.Generator().manual_seed(seed)
    placement = Placement(shards)
    gradient = private_gradient(model, images, labels, local, privacy, noise, placement)
    update = local_sgd(trainable_parameters(model), local, gradient)
    return torch.cat([g.detach().flatten() for g in update.values()])


def test_noise_is_sigma_times_norm_over_batch() -> None:
    clean = _update(PrivacySettings(0.0, 0.7))
    noise = torch.cat([_update(PrivacySettings(2.0, 0.7), seed=s) - clean for s in range(20)])
    assert float(noise.std()) == pytest.approx(2.0 * 0.7 / 5, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.28 / math.sqrt(len(noise)))


def test_the_papers_variant_clips_the_mean_gradient() -> None:
    model, (images, labels) = _model("batch").train(), _batch()
    loss = F.cross_entropy(model(images), labels)
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    clean = _update(PrivacySettings(0.0, 0.1, "batch"), model)
    torch.testing.assert_close(clean, mean * 0.1 / mean.norm())
    noise = torch.cat(
        [_update(PrivacySettings(2.0, 0.1, "batch"), model, seed=s) - clean for s in range(20)]
    )
    assert float(noise.std()) == pytest.approx(2.0 * 0.1, rel=0.02)


def test_shards_of_one_process_change_nothing_and_noise_comes_once() -> None:
    privacy = PrivacySettings(1.0, 0.5)
    torch.testing.assert_close(_update(privacy), _update(privacy, shards=(3, 2)))


def test_every_local_step_has_noise_of_its_own() -> None:
    privacy, local = PrivacySettings(1.0, 0.5), LocalTraining(epochs=4, lr=1e-9)
    clean = _update(PrivacySettings(0.0, 0.5), local=local)
    noise = torch.cat([_update(privacy, local=local, seed=s) - clean for s in range(20)])
    # The mean of four independent draws.
    assert float(noise.std()) == pytest.approx(0.5 / 5 / 2, rel=0.02)


def test_no_image_moves_the_update_by_more_than_the_norm() -> None:
    model, (images, labels) = _model(), _batch()
    parameters = trainable_parameters(model)
    with_all = clipped_gradient_sum(model, parameters, {}, images, labels, 0.5)
    without = clipped_gradient_sum(model, parameters, {}, images[1:], labels[1:], 0.5)
    moved = torch.stack([(a - b).norm() for a, b in zip(with_all, without, strict=True)]).norm()
    assert float(moved) == pytest.approx(0.5, rel=1e-6)


def test_every_image_has_a_dropout_mask_of_its_own() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(192, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.drop(x.flatten(1)))

    model = Same().double().train()
    images = torch.ones(2, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([1, 1])
    (weight, _) = clipped_gradient_sum(model, trainable_parameters(model), {}, images, labels, 1e6)
    # Equal images with equal masks would leave half of the columns zero.
    assert int((weight.abs().sum(0) > 0).sum()) > 110


def test_epsilon_of_one_gaussian_mechanism() -> None:
    # Balle and Wang's calibration: sigma for epsilon = 1, delta = 1e-5 is 3.730632 (their code).
    assert gaussian_epsilon(3.730632, 1e-5) == pytest.approx(1.0, rel=1e-4)
    assert gaussian_epsilon(2.0, 1e-5, steps=4) == pytest.approx(gaussian_epsilon(1.0, 1e-5))
    assert gaussian_epsilon(0.0, 1e-5) == math.inf
    assert 5000 < gaussian_epsilon(0.01, 1e-5) < 6000


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ((-1, 1, "per-sample", 1e-5), "--sigma"),
        ((math.nan, 1, "per-sample", 1e-5), "--sigma"),
        ((1, 0, "per-sample", 1e-5), "--max-per-sample-grad_norm"),
        ((1, 1, "layer", 1e-5), "--dp-clipping"),
        ((1, 1, "batch", 1.0), "--delta"),
    ],
)
def test_impossible_settings_are_refused(
    values: tuple[float, float, str, float], flag: str
) -> None:
    with pytest.raises(InputError, match=flag):
        PrivacySettings(*values)
