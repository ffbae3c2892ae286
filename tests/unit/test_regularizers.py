"""Penalties on images, against values worked out by hand and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attack.priors.regularizers import (
    TOTAL_VARIATIONS,
    AnisotropicTV,
    BatchNormPenalty,
    ColourPrior,
    EpochOrderPrior,
    FeaturePenalty,
    GroupConsistency,
    InputNorm,
    IsotropicTV,
    PatchPrior,
    Regularizer,
    shared_features,
    weighted_penalty,
)
from core.models.building import ModelSpec
from tests.targets import make_target

SMOOTH_AT_0 = 1e-3  # The isotropic variants are smoothed under the root by 1e-8.


def ramp() -> torch.Tensor:
    """One image, 1 x 1 x 3 x 3: 3 more to the right, 4 more downwards."""
    step = torch.arange(3.0, dtype=torch.float64)
    return (4 * step.view(3, 1) + 3 * step.view(1, 3)).view(1, 1, 3, 3)


def random_images(n: int = 2, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(2)).double()


def test_total_variation_of_a_ramp() -> None:
    assert float(AnisotropicTV()(ramp())) == pytest.approx(3 + 4)
    # Both differences at four pixels, one at the last column's and row's, none at the corner.
    expected = (4 * 5 + 2 * 4 + 2 * 3) / 9
    assert float(IsotropicTV()(ramp())) == pytest.approx(expected, abs=SMOOTH_AT_0)


@pytest.mark.parametrize("name", TOTAL_VARIATIONS)
def test_no_pixel_is_free(name: str) -> None:
    images = random_images(1).requires_grad_()
    (gradient,) = torch.autograd.grad(TOTAL_VARIATIONS[name]()(images).sum(), images)
    assert (gradient.abs().sum(1) > 0).all()


def test_double_opponents_are_pairs_of_whatever_channels_there_are() -> None:
    images = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    plain, opponents = IsotropicTV(), IsotropicTV(double_opponents=True)
    for channels, pairs in ((1, []), (2, [(0, 1)]), (4, [(0, 3), (1, 0), (2, 1), (3, 2)])):
        some = images[:, :channels]
        differences = [some[:, [a]] - some[:, [b]] for a, b in pairs]
        expected = plain(torch.cat([some, *differences], dim=1))
        torch.testing.assert_close(opponents(some), expected)


def test_patches_end_at_their_own_borders_where_images_are_not_square() -> None:
    images = torch.zeros(1, 1, 4, 8)
    images[..., 4:] = 1
    # One column of jumps of 1 along the only border across; no border down.
    assert float(PatchPrior(4)(images)) == pytest.approx(1)
    assert float(PatchPrior(4)(images.mT)) == pytest.approx(1)


def test_double_opponents_count_edges_of_colour() -> None:
    grey = ramp().expand(1, 3, 3, 3)
    one_channel = float(IsotropicTV()(ramp()))
    # Three channels alike, three differences that are flat.
    expected = (3 * one_channel + 3 * math.sqrt(1e-8)) / 6
    assert float(IsotropicTV(double_opponents=True)(grey)) == pytest.approx(expected)
    red = torch.cat([ramp(), torch.zeros(1, 2, 3, 3, dtype=torch.float64)], dim=1)
    # Red itself and its differences with green and with blue.
    found = float(IsotropicTV(double_opponents=True)(red))
    assert found == pytest.approx(3 * one_channel / 6, abs=SMOOTH_AT_0)


def test_input_norm_colour_patch_and_group() -> None:
    images = ramp()
    assert float(InputNorm()(images)) == pytest.approx(float(images.norm()))
    assert float(ColourPrior()(images)) == pytest.approx(7**2)
    assert float(GroupConsistency(images + 2)(images)) == pytest.approx(4)
    assert float(GroupConsistency(images + 2, squared=False)(images)) == pytest.approx(6)
    assert float(PatchPrior(2)(images)) == pytest.approx(3**2 + 4**2)
    assert float(PatchPrior(16)(images)) == 0


REGULARIZERS: dict[str, Regularizer] = {
    **{name: make() for name, make in TOTAL_VARIATIONS.items()},
    "input norm": InputNorm(),
    "colour": ColourPrior(),
    "patch": PatchPrior(4),
    "group": GroupConsistency(torch.ones(2, 3, 8, 8, dtype=torch.float64)),
    "group norm": GroupConsistency(torch.ones(2, 3, 8, 8, dtype=torch.float64), squared=False),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_one_value_per_image_with_a_right_gradient(name: str) -> None:
    regularizer, images = REGULARIZERS[name], random_images()
    values = regularizer(images)
    assert values.shape == (2,)
    if not name.startswith("group"):
        assert float(regularizer(images[1:])) == pytest.approx(float(values[1]))
    assert torch.autograd.gradcheck(regularizer, (images.requires_grad_(),))


@pytest.mark.parametrize("name", TOTAL_VARIATIONS)
def test_gradient_is_finite_on_a_flat_image(name: str) -> None:
    flat = torch.zeros(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(TOTAL_VARIATIONS[name]()(flat).sum(), flat)
    assert torch.isfinite(gradient).all()


def test_batch_norm_penalty_is_a_sum_of_norms_over_layers_and_a_mean_over_groups() -> None:
    layers = {"0": torch.nn.BatchNorm2d(3), "1": torch.nn.BatchNorm2d(3)}
    model = torch.nn.Sequential(*layers.values()).double()
    images = random_images(5)
    known = {
        name: (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
        for name in layers
    }
    hidden = model[0](images)

    def distance(x: torch.Tensor) -> float:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        return (mean.norm() + (var - 1).norm()).item()

    watched = BatchNormPenalty([known], [3, 2])(model)
    model(images)
    groups = [distance(x[s]) for x in (images, hidden) for s in (slice(3), slice(3, 5))]
    assert float(watched()) == pytest.approx(sum(groups) / 2)


def test_batch_norm_penalty_is_zero_on_the_batch_itself_and_leaves_no_hooks() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).double()
    images = random_images(4)
    moments = (images.mean((0, 2, 3)), images.var((0, 2, 3), unbiased=False))
    watched = BatchNormPenalty([{"0": moments}], [4])(model)
    model(images)
    assert float(watched()) == pytest.approx(0, abs=1e-12)
    assert not model[0]._forward_pre_hooks


def test_norm_tv_sums_over_four_directions() -> None:
    # Slopes 3 across and 4 down: 6 pairs across, 6 down, 4 on each diagonal.
    expected = 3 * 6**0.5 + 4 * 6**0.5 + 1 * 4**0.5 + 7 * 4**0.5
    assert float(TOTAL_VARIATIONS["norm"]()(ramp())) == pytest.approx(expected)


def test_epoch_order_prior_ignores_the_order_and_nothing_else() -> None:
    images = random_images(4)
    prior = EpochOrderPrior(2, 3)
    shuffled = torch.cat([images, images[[2, 0, 3, 1]]])
    assert float(prior(shuffled).max()) == pytest.approx(0, abs=1e-12)
    assert float(prior(torch.cat([images, images.flip(-1)])).min()) > 1e-3
    # Two epochs: of the four pairs, two compare an epoch with itself.
    one, two = torch.zeros(1, 3, 4, 4).double(), torch.ones(1, 3, 4, 4).double()
    features = F.conv2d(two, prior.kernel.double(), padding=1)
    expected = float(features.square().mean()) / 2
    assert float(prior(torch.cat([one, two]))[0]) == pytest.approx(expected)


def test_features_of_the_gradient_are_the_true_ones() -> None:
    spec = ModelSpec("cnn", 10, 8, width=4)
    target, truth = make_target(spec, 2)
    model = target.build_model().double()
    penalty = FeaturePenalty(shared_features(target, truth.labels[:1], "fc"), 1, "fc")
    total = penalty(model)
    inputs = target.data.normalize(truth.images).double()
    model(inputs[:1])
    at_truth = float(total())
    total = penalty(model)
    model(inputs[1:])
    # Others' images leave traces in a class's row, so that it is near and not exact.
    assert at_truth < 0.5 * float(total())
    assert not model.get_submodule("fc")._forward_pre_hooks


def test_features_of_one_image_are_exact() -> None:
    target, truth = make_target(ModelSpec("cnn", 10, 8, width=4), 1)
    model = target.build_model().double()
    total = FeaturePenalty(shared_features(target, truth.labels, "fc"), 1, "fc")(model)
    model(target.data.normalize(truth.images).double())
    assert float(total()) == pytest.approx(0, abs=1e-12)


def test_weighted_penalties_share_one_pass() -> None:
    target, truth = make_target(ModelSpec("cnn", 10, 8, width=4), 1)
    model = target.build_model().double()
    features = FeaturePenalty(torch.zeros(1, 256).double(), 1, "fc")
    total = weighted_penalty([(2.0, features), (3.0, features)])(model)
    alone = features(model)
    model(target.data.normalize(truth.images).double())
    assert float(total()) == pytest.approx(5 * float(alone()))
