"""Priors, coordinates, registration and metrics in one, two and three dimensions, and tables.

Every formula is worked out a second way: by another library, or by a loop over entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import nn

import gradinvbench as gib
from attack.loop.fusion import group_target, register
from attack.metrics import (
    assign,
    cw_ssim,
    data_range,
    evaluate,
    metrics_for,
    mse,
    ncc,
    psnr,
    register_metric,
    ssim,
    to_unit_range,
)
from attack.metrics import evaluation as registry
from attack.priors.coordinates import Cosines, Pixels, make_coordinates
from attack.priors.public_images import Grey, PriorDistance
from attack.priors.regularizers import (
    SMOOTHING,
    TOTAL_VARIATIONS,
    ColourPrior,
    EpochOrderPrior,
    GroupConsistency,
    InputNorm,
    PatchPrior,
    Regularizer,
)
from core.data.specs import DataSpec
from core.errors import InputError
from core.target import Target, Truth

CPU = torch.device("cpu")
# A signal, an image, a volume; no two sides alike.
SIZES = [(11,), (6, 9), (5, 4, 6)]
# All of them, and a row of a table.
SHAPES = [(7,), (2, 11), (3, 6, 9), (2, 5, 4, 6)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class TestCosines:
    @pytest.mark.parametrize("size", SIZES)
    def test_without_scaling_it_is_scipys_orthonormal_dct(self, size: tuple[int, ...]) -> None:
        images = batch(2, 3, *size)
        axes = range(-len(size), 0)
        expected = scipy.fft.dctn(images.numpy(), type=2, norm="ortho", axes=axes)
        found = Cosines(size, 0.0, CPU, torch.float64).encode(images)
        assert np.abs(found.numpy() - expected).max() < 1e-12

    @pytest.mark.parametrize("size", SIZES)
    def test_encode_and_decode_are_inverse(self, size: tuple[int, ...]) -> None:
        images, cosines = batch(2, 3, *size), Cosines(size, 1.0, CPU, torch.float64)
        torch.testing.assert_close(cosines.decode(cosines.encode(images)), images, **EXACT)
        torch.testing.assert_close(cosines.encode(cosines.decode(images)), images, **EXACT)

    @pytest.mark.parametrize("size", SIZES)
    def test_pull_back_is_the_transpose(self, size: tuple[int, ...]) -> None:
        cosines = Cosines(size, 1.3, CPU, torch.float64)
        z, x = batch(2, 3, *size), batch(2, 3, *size, seed=5)
        left, right = (cosines.decode(z) * x).sum(), (z * cosines.pull_back(x)).sum()
        assert float(left) == pytest.approx(float(right), rel=1e-12)

    @pytest.mark.parametrize("size", SIZES)
    def test_white_noise_gets_a_falling_spectrum_of_the_same_power(
        self, size: tuple[int, ...]
    ) -> None:
        cosines, noise = Cosines(size, 1.0, CPU, torch.float64), batch(500, *size)
        assert float(cosines.decode(noise).square().mean()) == pytest.approx(1, rel=0.15)
        one = torch.zeros(2, *size, dtype=torch.float64)
        one[0].view(-1)[0], one[1].view(-1)[3] = 1, 1
        flat, third = cosines.decode(one).flatten(1).norm(dim=1).tolist()
        assert flat / third == pytest.approx(4)

    def test_images_take_the_products_that_they_have_always_taken(self) -> None:
        cosines, images = Cosines((6, 9), 1.0, CPU, torch.float32), batch(2, 3, 6, 9).float()
        rows, columns = cosines._matrices
        decoded = rows.mT @ (cosines._scale * images) @ columns
        assert torch.equal(cosines.decode(images), decoded)
        assert torch.equal(cosines.encode(images), (rows @ images @ columns.mT) / cosines._scale)
        pulled = cosines._scale * (rows @ images @ columns.mT)
        assert torch.equal(cosines.pull_back(images), pulled)

    def test_values_of_a_table_are_their_own_coordinates(self) -> None:
        assert isinstance(make_coordinates("dct", (), CPU, torch.float32), Pixels)
        with pytest.raises(InputError, match="dct:steep"):
            make_coordinates("dct:steep", (), CPU, torch.float32)


def differences(image: np.ndarray, step: tuple[int, ...]) -> list[float]:
    """Of all pairs of an entry and its neighbour at `step`, both inside the image (C x ...)."""
    found = []
    for place in np.ndindex(image.shape):
        there = (place[0], *(p + s for p, s in zip(place[1:], step, strict=True)))
        if all(0 <= p < side for p, side in zip(there, image.shape, strict=True)):
            found.append(image[there] - image[place])
    return found


def straight(dims: int) -> list[tuple[int, ...]]:
    return [tuple(int(i == axis) for i in range(dims)) for axis in range(dims)]


def anisotropic(image: np.ndarray) -> float:
    steps = straight(image.ndim - 1)
    return sum(float(np.mean(np.abs(differences(image, step)))) for step in steps)


def isotropic(image: np.ndarray) -> float:
    lengths = []
    for place in np.ndindex(image.shape):
        square = SMOOTHING
        for axis in range(1, image.ndim):
            if place[axis] + 1 < image.shape[axis]:
                there = (*place[:axis], place[axis] + 1, *place[axis + 1 :])
                square += (image[there] - image[place]) ** 2
        lengths.append(math.sqrt(square))
    return float(np.mean(lengths))


def opponents(image: np.ndarray) -> float:
    pairs = [image[c] - image[(c - 1) % 3] for c in range(3)] if len(image) == 3 else []
    return isotropic(np.stack([*image, *pairs]))


def norm(image: np.ndarray) -> float:
    steps = itertools.product((-1, 0, 1), repeat=image.ndim - 1)
    # Every pair of neighbours is met from both sides.
    both = [math.sqrt(np.sum(np.square(differences(image, s)))) for s in steps if any(s)]
    return sum(both) / 2


BY_LOOPS: dict[str, Callable[[np.ndarray], float]] = {
    "anisotropic": anisotropic,
    "isotropic": isotropic,
    "double-opponents": opponents,
    "norm": norm,
}


class TestTotalVariation:
    @pytest.mark.parametrize("kind", TOTAL_VARIATIONS)
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("size", SIZES)
    def test_is_the_loop_over_neighbours(
        self, kind: str, channels: int, size: tuple[int, ...]
    ) -> None:
        images = batch(2, channels, *size)
        expected = [BY_LOOPS[kind](image) for image in images.numpy()]
        assert TOTAL_VARIATIONS[kind]()(images).tolist() == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("kind", TOTAL_VARIATIONS)
    def test_leads_and_sequences_are_no_colours(self, kind: str) -> None:
        signals = batch(1, 2, 11)
        expected = isotropic(signals[0].numpy())
        found = float(TOTAL_VARIATIONS["double-opponents"]()(signals))
        assert found == pytest.approx(expected)
        assert TOTAL_VARIATIONS[kind]()(batch(3, 12, 9)).shape == (3,)

    @pytest.mark.parametrize("kind", TOTAL_VARIATIONS)
    def test_a_table_has_none(self, kind: str) -> None:
        with pytest.raises(InputError, match="a table has no neighbouring values"):
            TOTAL_VARIATIONS[kind]()(batch(2, 7))

    def test_of_images_it_is_what_it_has_always_been(self) -> None:
        x = batch(2, 3, 8, 10).float()
        across, down = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
        every = (-3, -2, -1)
        expected = across.abs().mean(every) + down.abs().mean(every)
        assert torch.equal(TOTAL_VARIATIONS["anisotropic"]()(x), expected)
        padded = F.pad(across, (0, 1)).square() + F.pad(down, (0, 0, 0, 1)).square()
        expected = (padded + SMOOTHING).sqrt().mean(every)
        assert torch.equal(TOTAL_VARIATIONS["isotropic"]()(x), expected)
        falling, rising = x[..., 1:, :-1] - x[..., :-1, 1:], x[..., 1:, 1:] - x[..., :-1, :-1]
        tiny = torch.finfo(x.dtype).tiny
        norms = [(d.square().sum(every) + tiny).sqrt() for d in (across, down, falling, rising)]
        assert torch.equal(TOTAL_VARIATIONS["norm"]()(x), torch.stack(norms).sum(0))


class TestOtherPriors:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_one_value_per_sample_with_a_right_gradient(self, shape: tuple[int, ...]) -> None:
        images = batch(2, *shape).requires_grad_()
        priors: list[Regularizer] = [
            InputNorm(),
            GroupConsistency(torch.ones_like(images)),
            GroupConsistency(torch.ones_like(images), squared=False),
            PriorDistance(Pixels(), torch.ones_like(images)),
        ]
        if len(shape) > 1:
            priors += [make() for make in TOTAL_VARIATIONS.values()]
            priors += [ColourPrior(), PatchPrior(3)]
        for prior in priors:
            assert prior(images).shape == (2,)
            assert torch.autograd.gradcheck(prior, (images,))

    def test_patches_have_borders_along_every_axis(self) -> None:
        signal = torch.zeros(1, 1, 9)
        signal[..., 3:] = 1
        # Two borders, a jump of 1 at one of them.
        assert float(PatchPrior(3)(signal)) == pytest.approx(0.5)
        volume = torch.zeros(1, 1, 4, 4, 4)
        volume[:, :, 2:] = 2
        assert float(PatchPrior(2)(volume)) == pytest.approx(4)

    def test_the_colour_of_a_volume_is_its_mean(self) -> None:
        volume = batch(2, 3, 4, 5, 6)
        expected = [float(np.square(v.mean((1, 2, 3))).mean()) for v in volume.numpy()]
        assert ColourPrior()(volume).tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_order_of_an_epoch_does_not_matter(self, shape: tuple[int, ...]) -> None:
        epoch = batch(4, *shape)
        prior = EpochOrderPrior(2, shape[0], dims=len(shape) - 1)
        assert float(prior(torch.cat([epoch, epoch[[2, 0, 3, 1]]])).max()) < 1e-12
        assert float(prior(torch.cat([epoch, epoch.flip(-1)])).min()) > 1e-3

    @pytest.mark.parametrize("shape", SHAPES[1:])
    def test_grey_values_of_any_sample(self, shape: tuple[int, ...]) -> None:
        channels = shape[0]
        data = DataSpec("x", shape, (0.4,) * channels, (0.2,) * channels, 2)
        grey, z = Grey(data), batch(2, 1, *shape[1:])
        torch.testing.assert_close(grey.encode(grey.decode(z)), z)
        gradient = batch(2, *shape, seed=3)
        z.requires_grad_()
        (expected,) = torch.autograd.grad((grey.decode(z) * gradient).sum(), z)
        torch.testing.assert_close(grey.pull_back(gradient), expected)


class TestRegistration:
    @pytest.mark.parametrize(
        ("size", "shifts"),
        [
            ((24,), [(3,), (-2,)]),
            ((16, 24), [(2, -1), (-2, 2)]),
            ((16, 24, 20), [(2, -1, 0), (-1, 2, -2)]),
        ],
    )
    def test_known_shifts_are_undone(
        self, size: tuple[int, ...], shifts: list[tuple[int, ...]]
    ) -> None:
        reference = batch(2, 2, *size)
        axes = tuple(range(-len(size), 0))
        pairs = zip(reference, shifts, strict=True)
        moved = torch.stack([torch.roll(x, shift, axes) for x, shift in pairs])
        assert torch.equal(register(moved, reference), reference)
        together = group_target(torch.stack([reference, reference]), registration=True)
        torch.testing.assert_close(together, reference)

    def test_shifts_beyond_the_limit_are_not_tried(self) -> None:
        reference = batch(1, 1, 16, 16, 16)
        moved = torch.roll(reference, (0, 3, 0), (-3, -2, -1))
        assert not torch.equal(register(moved, reference, max_shift=2), reference)
        assert torch.equal(register(moved, reference, max_shift=3), reference)

    def test_rows_of_a_table_stay(self) -> None:
        rows = batch(3, 7)
        assert torch.equal(register(rows, rows.flip(0)), rows)


def smooth(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Noise through a few means of neighbours along every axis, in [0, 1]."""
    samples = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)).double()
    for axis in range(2, samples.dim()):
        for _ in range(2):
            samples = samples + samples.roll(1, axis) + samples.roll(-1, axis)
    low, high = samples.min(), samples.max()
    return (samples - low) / (high - low)


def ssim_by_loop(x: np.ndarray, y: np.ndarray) -> float:
    """The Gaussian SSIM of two channels, window by window."""
    windows = []
    for side in x.shape:
        length = min(11, side - 1 + side % 2)
        weights = np.exp(-0.5 * ((np.arange(length) - length // 2) / 1.5) ** 2)
        windows.append(weights / weights.sum())
    weight = windows[0]
    for window in windows[1:]:
        weight = np.multiply.outer(weight, window)
    values = []
    for corner in np.ndindex(*(n - w + 1 for n, w in zip(x.shape, weight.shape, strict=True))):
        inside = tuple(slice(c, c + w) for c, w in zip(corner, weight.shape, strict=True))
        a, b = x[inside], y[inside]
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        var_a = (weight * (a - mean_a) ** 2).sum()
        var_b = (weight * (b - mean_b) ** 2).sum()
        both = (weight * (a - mean_a) * (b - mean_b)).sum()
        brightness = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        values.append(brightness * (2 * both + 9e-4) / (var_a + var_b + 9e-4))
    return float(np.mean(values))


class TestMetrics:
    @pytest.mark.parametrize("size", [(30,), (7,), (14, 12), (13, 12, 14), (5, 12, 4)])
    def test_ssim_is_the_loop_over_windows(self, size: tuple[int, ...]) -> None:
        originals = smooth(2, 2, *size)
        images = (originals + 0.1 * batch(2, 2, *size)).clamp(0, 1)
        pairs = zip(images.numpy(), originals.numpy(), strict=True)
        expected = [
            float(np.mean([ssim_by_loop(a, b) for a, b in zip(x, y, strict=True)]))
            for x, y in pairs
        ]
        assert ssim(images, originals).tolist() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("size", [(30,), (13, 16, 14)])
    @pytest.mark.parametrize("variant", ["gaussian", "uniform"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_ssim_is_scikit_images(
        self, size: tuple[int, ...], variant: str, dtype: torch.dtype
    ) -> None:
        metrics = pytest.importorskip("skimage.metrics")
        options = {"data_range": 1.0, "channel_axis": 0}
        if variant == "gaussian":
            options |= {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        originals = smooth(2, 2, *size)
        images = (originals + 0.1 * batch(2, 2, *size)).clamp(0, 1)
        pairs = zip(images.numpy(), originals.numpy(), strict=True)
        expected = [metrics.structural_similarity(x, y, **options) for x, y in pairs]
        found = ssim(images.to(dtype), originals.to(dtype), variant).tolist()
        assert found == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 1e-9)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_ncc_is_numpys_correlation(self, shape: tuple[int, ...]) -> None:
        a, b = batch(3, *shape), batch(3, *shape, seed=2)
        pairs = zip(a.flatten(1).numpy(), b.flatten(1).numpy(), strict=True)
        expected = [np.corrcoef(x, y)[0, 1] for x, y in pairs]
        assert ncc(a, b).tolist() == pytest.approx(expected, abs=1e-12)
        assert ncc(3 * a - 1, a).tolist() == pytest.approx([1] * 3)
        assert ncc(torch.ones_like(a), a).tolist() == [0] * 3

    @pytest.mark.parametrize("shape", SHAPES)
    def test_assignment_undoes_a_permutation(self, shape: tuple[int, ...]) -> None:
        originals = batch(5, *shape)
        order = torch.tensor([3, 0, 4, 2, 1])
        shuffled = (originals + 0.01 * batch(5, *shape, seed=4))[order]
        assert torch.equal(order[assign(shuffled, originals)], torch.arange(5))

    def test_the_range_of_values_without_bounds_is_the_truths(self) -> None:
        truth = torch.tensor([[-3.0, 5.0, 1.0], [0.0, 2.0, 4.0]])
        assert data_range(truth) == (-3, 5)
        assert data_range(truth.clamp(0, 1)) == (0, 1)
        assert to_unit_range(truth, (-3, 5)).flatten().tolist() == [0, 1, 0.5, 0.375, 0.625, 0.875]
        skimage = pytest.importorskip("skimage.metrics")
        found = truth + torch.tensor([[0.5], [-0.25]])
        result = evaluate(found, None, Truth(truth, torch.tensor([0, 1])))
        for row, x, y in zip(result.per_image, found.numpy(), truth.numpy(), strict=True):
            expected = skimage.peak_signal_noise_ratio(y, x, data_range=8)
            assert row["psnr"] == pytest.approx(expected, rel=1e-6)
            # In the unit of the values.
            assert row["mse"] == pytest.approx(float(np.square(x - y).mean()), rel=1e-5)

    def test_one_constant_row_has_no_range(self) -> None:
        truth = torch.full((1, 4), 7.0)
        result = evaluate(truth + 1, None, Truth(truth, torch.tensor([0])))
        assert result.per_image[0]["psnr"] == pytest.approx(0)
        assert result.per_image[0]["mse"] == pytest.approx(1)


def metrics_of(*shape: int) -> tuple[str, ...]:
    images = smooth(2, *shape).float() if len(shape) > 1 else torch.rand(2, *shape)
    return gib.evaluate(images, Truth(images, torch.tensor([0, 1]))).metrics


class TestEvaluation:
    def test_the_catalogue_says_what_a_metric_takes(self) -> None:
        assert gib.metrics()["ssim"].endswith("(signals, images and volumes)")
        assert gib.metrics()["cw_ssim"].endswith("(images)")
        assert gib.metrics()["ncc"].endswith("(tables, signals, images and volumes)")

    def test_every_shape_gets_the_metrics_that_fit_it(self) -> None:
        assert metrics_of(12) == ("mse", "psnr", "ncc")
        assert metrics_of(1, 20) == metrics_of(1, 12, 12, 12) == ("mse", "psnr", "ssim", "ncc")
        assert metrics_of(1, 20, 20) == ("psnr", "ssim", "mse")
        assert "lpips_alex" in metrics_for((3, 20, 20))

    @pytest.mark.parametrize(
        ("metric", "shape", "reason"),
        [
            ("ssim", (5,), "it takes signals, images and volumes, not tables"),
            ("cw_ssim", (1, 16), "it takes images, not signals"),
            ("lpips_alex", (1, 16, 16, 16), "it takes images, not volumes"),
        ],
    )
    def test_what_does_not_fit_is_one_sentence(
        self, metric: str, shape: tuple[int, ...], reason: str
    ) -> None:
        images = torch.rand(2, *shape)
        result = gib.evaluate(images, Truth(images, torch.tensor([0, 1])), metrics=[metric])
        assert result.missing == {metric: reason}
        assert result.summary()[metric]["mean"] is None
        assert reason in result.render()

    def test_the_functions_themselves_say_so_too(self) -> None:
        with pytest.raises(InputError, match="a table has none"):
            ssim(torch.rand(2, 5), torch.rand(2, 5))
        with pytest.raises(InputError, match="takes N x C x H x W images"):
            cw_ssim(torch.rand(2, 1, 9), torch.rand(2, 1, 9))

    @pytest.mark.parametrize(("shape", "name"), [((5,), "row"), ((2, 9), "signal")])
    def test_the_best_flat_guess(self, shape: tuple[int, ...], name: str) -> None:
        truth = Truth(torch.rand(3, *shape), torch.arange(3))
        result = evaluate(truth.images, None, truth)
        expected = truth.images.var(-1, unbiased=False).mean()
        found = result.baselines[f"flat {name}"]["mse"]["mean"]
        assert found == pytest.approx(float(expected), rel=1e-5)

    def test_labels_of_any_kind_stand_in_the_rows(self) -> None:
        images = torch.rand(2, 1, 9)
        several, values = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([0.5, -2.0])
        rows = evaluate(images, several, Truth(images, several)).per_image
        assert rows[0]["label_true"] == rows[0]["label_recovered"] == [0, 1]
        assert evaluate(images, None, Truth(images, values)).per_image[1]["label_true"] == -2
        masks = torch.zeros(2, 3, 3)
        assert evaluate(images, masks, Truth(images, masks)).per_image[0]["label_true"] is None

    def test_a_plugin_says_what_its_metric_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for table in ("_SIMPLE", "_TITLES", "_DIMENSIONS"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
        monkeypatch.setattr(registry, "_ADDED", [])
        register_metric("worst", mse, title="worst")
        register_metric("peak", psnr, title="peak", dimensions=(0, 1))
        assert metrics_for((5,))[-1] == metrics_for((1, 5))[-1] == "peak"
        assert metrics_for((1, 5, 5))[-1] == "worst"


def shared(model: nn.Module, x: torch.Tensor, data: DataSpec) -> tuple[Target, Truth]:
    """What a client shares for a batch of label 0."""
    bounds = (0.0, 1.0) if data.bounded else None
    labels = torch.zeros(len(x), dtype=torch.long)
    return gib.share(model, x, labels, mean=data.mean, std=data.std, bounds=bounds)


def small_network(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    convolution = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    inner = 6 * math.prod(side // 2 for side in shape[1:])
    first = convolution(shape[0], 6, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.Sigmoid(), nn.Flatten(), nn.Linear(inner, 3)).eval()


def sample_of(shape: tuple[int, ...], bounded: bool) -> tuple[torch.Tensor, DataSpec]:
    channels = shape[0]
    x = smooth(1, *shape).float() if len(shape) > 1 else torch.rand(1, *shape)
    x = x if bounded else 8 * x - 3
    mean, std = (0.5, 0.25) if bounded else (1.0, 2.0)
    data = DataSpec("x", shape, (mean,) * channels, (std,) * channels, 3, bounded=bounded)
    return x, data


class TestAttacks:
    @pytest.mark.parametrize("bounded", [True, False])
    @pytest.mark.parametrize("shape", [(12,), (1, 32), (1, 12, 12), (1, 8, 8, 8)])
    def test_spectral_needs_no_setting(self, shape: tuple[int, ...], bounded: bool) -> None:
        target, truth = shared(small_network(shape), *sample_of(shape, bounded))
        found = gib.invert(target, labels=truth.labels, iterations=150, progress=False)
        assert found.images.shape == truth.images.shape
        assert float(ncc(found.images, truth.images)) > 0.9
        low, high = float(found.images.min()), float(found.images.max())
        assert (low >= 0 and high <= 1) if bounded else (low < 0 and high > 1)

    @pytest.mark.parametrize("start", ["normal", "uniform", "zeros", "pattern"])
    @pytest.mark.parametrize("shape", [(12,), (1, 30), (1, 7, 6, 10)])
    def test_every_start_and_group_consistency_fit(
        self, shape: tuple[int, ...], start: str
    ) -> None:
        model = small_network(shape[:1] if len(shape) == 1 else (1, *[8] * len(shape[1:])))
        x, data = sample_of(shape, bounded=len(shape) > 2)
        flat = nn.Sequential(nn.Flatten(), nn.Linear(x.numel(), 5), nn.Sigmoid(), nn.Linear(5, 3))
        target, truth = shared(flat if len(shape) > 1 else model, x, data)
        found = gib.invert(
            target, attack="gradinversion", labels=truth.labels, start=start, iterations=4,
            restarts=2, group_start=0.25, group_every=1, bn=0.0, warmup=0, progress=False,
        )  # fmt: skip
        assert found.images.shape == truth.images.shape
        assert found.images.isfinite().all()

    def test_a_start_is_not_what_people_draw_for_a_trial(self) -> None:
        rows = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
        target, truth = gib.share(small_network((12,)), rows, [0], bounds=None)
        found = gib.invert(target, labels=truth.labels, iterations=1, progress=False)
        assert found.objective > 1e-3

    def test_a_table_has_no_other_prior_than_its_length(self) -> None:
        target, truth = shared(small_network((12,)), *sample_of((12,), bounded=False))
        options = {"attack": "inverting-gradients", "iterations": 3, "progress": False}
        one = gib.invert(target, labels=truth.labels, tv=0.0, **options)
        same = gib.invert(target, labels=truth.labels, tv=9.0, colour=5.0, patch=5.0, **options)
        other = gib.invert(target, labels=truth.labels, tv=0.0, input_norm=9.0, **options)
        assert torch.equal(one.images, same.images)
        assert not torch.equal(one.images, other.images)
