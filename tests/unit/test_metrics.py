"""The numbers of the tables against the libraries that define them."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from attack.metrics import (
    PSNR_CAP,
    assign,
    cw_ssim,
    evaluate,
    iip,
    mse,
    pairwise_mse,
    psnr,
    rdlv,
    relative_leakage,
    ssim,
)
from core.errors import InputError
from core.target import Truth


def pictures(n: int = 4, side: int = 24, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random images: noise through a few blurs, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, side, side, generator=generator)
    for _ in range(3):
        images = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low)


def noisy(images: torch.Tensor, sigma: float = 0.1, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * noise).clamp(0, 1)


class TestAssignment:
    def test_smallest_of_all_permutations(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            originals, found = torch.rand(2, 5, 1, 2, 2, generator=generator)
            cost = pairwise_mse(originals, found)
            best = min(
                float(sum(cost[i, j] for i, j in enumerate(p)))
                for p in itertools.permutations(range(5))
            )
            order = assign(found, originals)
            assert float(cost[torch.arange(5), order].sum()) == pytest.approx(best)

    def test_undoes_a_permutation(self) -> None:
        originals = pictures(9)
        shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(3))
        order = assign(noisy(originals)[shuffled], originals)
        assert torch.equal(shuffled[order], torch.arange(9))

    def test_more_reconstructions_than_originals_and_broken_ones(self) -> None:
        originals = pictures(3)
        candidates = torch.cat([torch.full_like(originals, math.nan), noisy(originals)])
        assert assign(candidates, originals).tolist() == [3, 4, 5]

    def test_pairwise_mse(self) -> None:
        a, b = pictures(3), pictures(5, seed=9)
        expected = torch.stack([mse(x.expand_as(b), b) for x in a])
        torch.testing.assert_close(pairwise_mse(a, b), expected)


class TestPixels:
    def test_known_values(self) -> None:
        black = torch.zeros(2, 3, 4, 4)
        images = torch.stack([black[0] + 0.1, black[0] + 1])
        torch.testing.assert_close(mse(images, black), torch.tensor([0.01, 1.0]))
        torch.testing.assert_close(psnr(images, black), torch.tensor([20.0, 0.0]))

    def test_psnr_is_scikit_images(self) -> None:
        metrics = pytest.importorskip("skimage.metrics")
        originals = pictures(5).double()
        images = noisy(originals)
        expected = [
            metrics.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1)
            for x, y in zip(originals, images, strict=True)
        ]
        assert psnr(images, originals).tolist() == pytest.approx(expected)

    def test_exact_match_is_capped(self) -> None:
        originals = pictures(2)
        assert psnr(originals, originals).tolist() == [PSNR_CAP, PSNR_CAP]


class TestSsim:
    @pytest.mark.parametrize("shape", [(3, 32, 32), (1, 17, 40), (3, 11, 11), (3, 64, 50)])
    @pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3])
    @pytest.mark.parametrize("variant", ["gaussian", "uniform"])
    def test_is_scikit_images(
        self, shape: tuple[int, int, int], sigma: float, variant: str
    ) -> None:
        metrics = pytest.importorskip("skimage.metrics")
        options = {"data_range": 1.0, "channel_axis": 0}
        if variant == "gaussian":
            options |= {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        side = max(shape[1:])
        originals = pictures(3, side, shape[0])[:, :, : shape[1], : shape[2]]
        images = noisy(originals, sigma)
        expected = [
            metrics.structural_similarity(x.double().numpy(), y.double().numpy(), **options)
            for x, y in zip(originals, images, strict=True)
        ]
        assert ssim(images, originals, variant).tolist() == pytest.approx(expected, abs=1e-4)

    def test_pieces_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        originals = pictures(7)
        whole = ssim(noisy(originals), originals)
        monkeypatch.setattr("attack.metrics.similarity._ELEMENTS_PER_PIECE", 1)
        torch.testing.assert_close(ssim(noisy(originals), originals), whole)

    @pytest.mark.parametrize("shape", [(16, 1, 12, 90), (7, 3, 40, 17), (33, 3, 11, 11)])
    @pytest.mark.parametrize("variant", ["gaussian", "uniform"])
    @pytest.mark.parametrize("piece", [1, 1 << 10, 1 << 17])
    def test_interleaved_planes_are_those_one_by_one(
        self,
        shape: tuple[int, int, int, int],
        variant: str,
        piece: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        n, channels, height, width = shape
        originals = pictures(n, max(height, width), channels)[:, :, :height, :width]
        images = noisy(originals)
        # In double precision planes are not interleaved.
        expected = ssim(images.double(), originals.double(), variant).float()
        monkeypatch.setattr("attack.metrics.similarity._ELEMENTS_PER_PIECE", piece)
        torch.testing.assert_close(ssim(images, originals, variant), expected, rtol=0, atol=1e-5)
        one_by_one = torch.cat(
            [ssim(x[None], y[None], variant) for x, y in zip(images, originals, strict=True)]
        )
        torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-5)

    def test_autocast_does_not_round_it(self) -> None:
        originals = pictures(16)
        images = noisy(originals, 0.01)
        with torch.autocast("cpu", torch.bfloat16):
            found = ssim(images, originals)
        torch.testing.assert_close(found, ssim(images, originals), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("side", [1, 2, 4, 6, 8, 10])
    @pytest.mark.parametrize("variant", ["gaussian", "uniform"])
    def test_images_smaller_than_the_window(self, side: int, variant: str) -> None:
        originals = pictures(2, 12)[:, :, :side, :side]
        torch.testing.assert_close(ssim(originals, originals, variant), torch.ones(2))
        worse = ssim(1 - originals, originals, variant)
        assert ((worse >= -1) & (worse < 1)).all()

    def test_unknown_variant(self) -> None:
        with pytest.raises(InputError, match="gaussian, uniform"):
            ssim(pictures(1), pictures(1), "median")


class TestCwSsim:
    @pytest.mark.parametrize("side", [8, 15, 32, 49])
    def test_identical_images_have_one(self, side: int) -> None:
        images = pictures(2, side)
        torch.testing.assert_close(cw_ssim(images, images), torch.ones(2))

    def test_a_small_shift_costs_less_than_in_ssim(self) -> None:
        images = pictures(4, 34)
        original, shifted = images[..., 1:-1, 1:-1], images[..., 1:-1, 2:]
        assert (cw_ssim(shifted, original) > ssim(shifted, original) + 0.1).all()

    def test_falls_with_noise(self) -> None:
        images = pictures(3, 32)
        values = torch.stack([cw_ssim(noisy(images, s), images) for s in (0, 0.05, 0.2, 0.5)])
        assert (values.diff(dim=0) < 0).all()

    def test_a_flat_image_has_no_structure(self) -> None:
        images = pictures(3, 32)
        flat = images.mean((-2, -1), keepdim=True).expand_as(images)
        assert (cw_ssim(flat, images) < 0.05).all()
        torch.testing.assert_close(cw_ssim(flat, flat), torch.ones(3))


class TestIdentification:
    def test_every_image_found_and_none(self) -> None:
        originals = pictures(6)
        assert iip(noisy(originals).flip(0), originals) == 1.0
        decoys = noisy(originals, 0.01)
        assert iip(decoys, originals, candidates=decoys) == 0.0

    def test_embedding_decides(self) -> None:
        originals = pictures(4)
        blind = iip(originals, originals, features=lambda x: torch.zeros(len(x), 2))
        assert blind == 0.25

    def test_rdlv_is_the_formula(self) -> None:
        originals, prior = pictures(2), pictures(1, seed=5)[0]
        guesses = torch.cat([noisy(originals, 0.3), noisy(originals, 0.02)])
        for i, value in enumerate(rdlv(guesses, originals, prior, cw_ssim).tolist()):
            known = float(cw_ssim(prior[None], originals[i : i + 1]))
            best = max(float(cw_ssim(g[None], originals[i : i + 1])) for g in guesses)
            assert value == pytest.approx((best - known) / known, rel=1e-5)

    @pytest.mark.parametrize(
        ("similarity", "prior", "expected"),
        [
            # Of an ordinary prior, the published ratio.
            (0.9, 0.3, 2.0),
            (0.1, 0.4, -0.75),
            # The published ratio would say -4 for a better reconstruction, and 0.5 for a worse.
            (0.6, -0.2, 4.0),
            (-0.3, -0.2, -0.5),
            # It would have no value, and 99.
            (0.4, 0.0, 8.0),
            (0.1, 0.001, 1.98),
        ],
    )
    def test_rdlv_where_the_prior_is_bad(
        self, similarity: float, prior: float, expected: float
    ) -> None:
        tensors = relative_leakage(torch.tensor([similarity]), torch.tensor([prior]))
        arrays = relative_leakage(np.array([similarity]), np.array([prior]))
        assert float(tensors) == pytest.approx(expected, rel=1e-6)
        assert float(arrays[0]) == pytest.approx(expected)

    def test_rdlv_is_unknown_only_where_a_similarity_is(self) -> None:
        values = relative_leakage(torch.tensor([torch.nan, 0.5]), torch.tensor([0.5, torch.nan]))
        assert values.isnan().all()

    def test_a_prior_without_similarity_gives_a_value(self) -> None:
        originals = pictures(1)
        nothing = rdlv(originals, originals, originals[0], lambda a, b: torch.zeros(len(a)))
        assert nothing.tolist() == [0.0]


class TestEvaluate:
    def evaluation(self, **options: object) -> tuple[Truth, object]:
        truth = Truth(pictures(4), torch.tensor([3, 1, 3, 0]))
        order = torch.tensor([2, 0, 3, 1])
        images = noisy(truth.images)[order]
        return truth, evaluate(images, truth.labels[order], truth, **options)  # type: ignore[arg-type]

    def test_rows_follow_the_originals(self) -> None:
        truth, result = self.evaluation()
        rows = result.per_image
        assert [row["reconstruction"] for row in rows] == [1, 3, 0, 2]
        assert [row["label_recovered"] for row in rows] == truth.labels.tolist()
        assert [row["psnr"] for row in rows] == pytest.approx(
            psnr(noisy(truth.images), truth.images).tolist()
        )

    def test_summary_and_baselines(self) -> None:
        truth, result = self.evaluation(mean_image=torch.full((3, 24, 24), 0.5))
        values = torch.tensor([row["ssim"] for row in result.per_image])
        assert result.summary()["ssim"]["mean"] == pytest.approx(float(values.mean()))
        flat = truth.images.mean((-2, -1), keepdim=True).expand_as(truth.images)
        assert result.baselines["flat colour"]["mse"]["mean"] == pytest.approx(
            float(mse(flat, truth.images).mean())
        )
        assert set(result.baselines) == {"flat colour", "mean image"}

    def test_the_best_non_member_is_compared_image_by_image(self) -> None:
        known = pictures(4).flip(0)
        truth, result = self.evaluation(nearest_images=known)
        assert result.baselines["best non-member"]["psnr"]["mean"] == pytest.approx(
            float(psnr(known, truth.images).mean())
        )

    def test_no_flat_image_beats_the_flat_baseline(self) -> None:
        truth, result = self.evaluation()
        grey = torch.full_like(truth.images, 0.5)
        assert result.baselines["flat colour"]["psnr"]["mean"] > float(
            psnr(grey, truth.images).mean()
        )

    def test_gain_is_over_the_best_guess(self) -> None:
        truth, result = self.evaluation(mean_image=torch.zeros(3, 24, 24))
        for metric, sign in (("psnr", 1), ("mse", -1), ("ssim", 1)):
            own, flat = (
                group[metric]["mean"]
                for group in (result.summary(), result.baselines["flat colour"])
            )
            assert result.gain(metric) == pytest.approx(sign * (own - flat))
            assert result.gain(metric) > 0
        grey = evaluate(torch.full_like(truth.images, 0.9), None, truth)
        assert grey.gain() < 0
        assert grey.gain("lpips_alex") is None

    def test_best_match_is_an_upper_bound(self) -> None:
        _, strict = self.evaluation()
        _, loose = self.evaluation(one_to_one=False)
        assert loose.matching == "best match per metric"
        for a, b in zip(strict.per_image, loose.per_image, strict=True):
            assert b["psnr"] >= a["psnr"] - 1e-6
            assert b["ssim"] >= a["ssim"] - 1e-6
            assert b["mse"] <= a["mse"] + 1e-9

    def test_exact_match_is_flagged(self) -> None:
        truth = Truth(pictures(2), torch.tensor([0, 1]))
        result = evaluate(truth.images, truth.labels, truth)
        assert all(row["exact"] and row["psnr"] == PSNR_CAP for row in result.per_image)
        assert "100.00*" in result.render()

    def test_record_is_strict_json_even_with_nan(self) -> None:
        truth = Truth(pictures(2), torch.tensor([0, 1]))
        images = truth.images.clone()
        images[1] = math.nan
        record = evaluate(images, truth.labels, truth).to_record()
        assert json.loads(json.dumps(record, allow_nan=False))["per_image"][1]["psnr"] is None
        assert record["summary"]["psnr"]["mean"] is None

    def test_table_explains_its_dashes(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        _, result = self.evaluation()
        text = result.render()
        assert result.per_image[0]["lpips_alex"] is None
        assert "random network" in text
        assert "flat colour mean" in text

    def test_prior_and_candidates(self) -> None:
        _, result = self.evaluation(prior=pictures(1, seed=8)[0], candidates=pictures(9, seed=4))
        assert result.whole["iip"] == 1.0
        assert result.whole["rdlv"] > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_precisions_may_differ(self, dtype: torch.dtype) -> None:
        truth = Truth(pictures(2), torch.tensor([0, 1]))
        images = noisy(truth.images)
        expected = evaluate(images, None, truth).summary()["ssim"]["mean"]
        found = evaluate(images.to(dtype), None, truth).summary()["ssim"]["mean"]
        assert found == pytest.approx(expected, abs=1e-2)

    def test_bad_input_is_named(self) -> None:
        truth = Truth(pictures(3), torch.tensor([0, 1, 2]))
        with pytest.raises(InputError, match="unknown metric ssimm"):
            evaluate(truth.images, None, truth, metrics=["ssimm"])
        with pytest.raises(InputError, match="2 reconstructions for 3"):
            evaluate(truth.images[:2], None, truth)
        with pytest.raises(InputError, match="shape"):
            evaluate(truth.images[..., 1:], None, truth)
        with pytest.raises(InputError, match="1 labels"):
            evaluate(truth.images, torch.tensor([1]), truth)


def test_targets_of_several_values_are_short_in_tables() -> None:
    images = pictures(1)
    values = torch.tensor([[0.123456, -2.0, 1e-5, 4.0, 5.0]])
    table = evaluate(images, values[:, :2], Truth(images, values), metrics=["mse"])
    assert "[0.123, -2, 1e-05, 4, ...]" in repr(table)
    assert "[0.123, -2] " in repr(table)
    # A record has all digits.
    assert table.per_image[0]["label_true"] == values[0].tolist()
