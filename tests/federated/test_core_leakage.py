"""RDLV and what is said about it, against computations by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attack.metrics import PRIOR_FLOOR
from audit.leakage import (
    failed_report,
    measure_leakage,
    read_leakage,
    write_leakage,
)
from audit.similarity import ImageSimMetric, SimMetric
from core.errors import InputError


class Closeness(SimMetric):
    """1 - the difference of mean grey values, easy to compute by hand."""

    def __call__(self, reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
        return {"closeness": 1 - abs(float(reference.mean() - image.mean())) / 255}


def flat(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_rdlv_by_hand() -> None:
    originals, found, prior = flat(0.2, 0.9), flat(0.3, 0.8), flat(0.5)[0]
    report = measure_leakage(originals, found, prior, Closeness())
    # Image 0: prior 0.7, reconstructions 0.9 and 0.4; image 1: prior 0.6, 0.4 and 0.9.
    expected = np.array([[0.2 / 0.7, -0.3 / 0.7], [-0.2 / 0.6, 0.3 / 0.6]])
    assert np.allclose(report.relative[..., 0], expected, atol=1e-6)
    assert [image.reconstruction for image in report.images] == [0, 1]
    assert report.rdlv == pytest.approx(0.5)
    assert [image.rank for image in report.images] == [1, 1]
    assert measure_leakage(originals, found, prior, Closeness(), threshold=0.49).withheld
    assert not measure_leakage(originals, found, prior, Closeness(), threshold=0.51).withheld


def test_rdlv_with_ssim_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    originals, prior = torch.rand(2, 3, 16, 16, generator=generator), torch.rand(3, 16, 16)
    found = (originals + 0.2 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    metric = ImageSimMetric()

    def sim(x: torch.Tensor, y: torch.Tensor) -> float:
        return metric(*(255 * z.permute(1, 2, 0).numpy() for z in (x, y)))["ssim"]

    report = measure_leakage(originals, found, prior, metric)
    for k, x in enumerate(originals):
        known = sim(x, prior)
        best = max(sim(x, r) for r in found)
        expected = (best - known) / max(abs(known), PRIOR_FLOOR)
        assert report.images[k].rdlv == pytest.approx(expected, abs=1e-5)
    assert report.rdlv == pytest.approx(max(image.rdlv for image in report.images))


def test_min_is_for_distances() -> None:
    originals, prior = torch.rand(2, 3, 8, 8), torch.rand(3, 8, 8)
    report = measure_leakage(
        originals, originals.flip(0), prior, ImageSimMetric("norm"), reduce="min"
    )
    assert [image.reconstruction for image in report.images] == [1, 0]
    assert report.rdlv == pytest.approx(-1)
    assert report.top1 == 1


def test_small_prior_similarity_does_not_explode() -> None:
    class Signed(SimMetric):
        def __call__(self, reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
            return {"signed": float(image.mean()) / 255 - 0.5}

    report = measure_leakage(flat(0.7), flat(0.9), flat(0.5)[0], Signed())
    assert report.rdlv == pytest.approx(0.4 / PRIOR_FLOOR, rel=1e-4)


def test_null_distribution_and_identification() -> None:
    generator = torch.Generator().manual_seed(1)
    patients = torch.rand(31, 3, 16, 16, generator=generator)
    originals, others = patients[:1], patients[1:]
    prior = patients.mean(0)
    leaked = measure_leakage(
        originals, 0.8 * originals + 0.1, prior, ImageSimMetric(), others=others
    )
    image = leaked.images[0]
    assert image.p_value == pytest.approx(1 / 31)
    assert (image.rank, leaked.top1, leaked.chance) == (1, 1.0, pytest.approx(1 / 31))
    assert leaked.null is not None
    assert leaked.null["max"] < image.rdlv
    # Somebody else's image gives this patient away no more than others.
    wrong = measure_leakage(originals, others[:1], prior, ImageSimMetric(), others=others)
    assert wrong.images[0].p_value is not None
    assert wrong.images[0].p_value > 1 / 31
    assert wrong.images[0].rank > 1
    assert wrong.top1 == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_measured_is_withheld(value: float) -> None:
    originals, found, prior = flat(0.2), flat(0.3), flat(0.5)[0]
    found[0, 0, 0, 0] = value
    report = measure_leakage(originals, found, prior, ImageSimMetric(), threshold=1e9)
    assert report.withheld
    assert math.isnan(report.rdlv)
    assert "not finite" in report.statement()

    class Broken(SimMetric):
        def __call__(self, reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
            return {"broken": value}

    assert measure_leakage(originals, flat(0.3), prior, Broken(), threshold=1e9).withheld


def test_impossible_comparisons_are_refused() -> None:
    metric = ImageSimMetric()
    with pytest.raises(InputError, match="rdlv_reduce"):
        measure_leakage(flat(0.1), flat(0.1), flat(0.1)[0], metric, reduce="mean")
    with pytest.raises(InputError, match="no originals"):
        measure_leakage(flat(0.1)[:0], flat(0.1), flat(0.1)[0], metric)
    with pytest.raises(InputError, match="shape"):
        measure_leakage(flat(0.1), flat(0.1), torch.zeros(3, 8, 8), metric)


def test_statement_says_what_to_do() -> None:
    originals, found, prior = flat(0.2), flat(0.25), flat(0.5)[0]
    others = flat(0.6, 0.7, 0.8)
    text = measure_leakage(originals, found, prior, Closeness(), others=others).statement()
    assert "1 training image is 36% closer" in text
    assert "3 other patients" in text
    assert "1 of 1 would be found among all candidates (by chance 25.0% each)" in text
    assert text.endswith("The update may leave the site.")
    held = measure_leakage(originals, found, prior, Closeness(), threshold=0.1).statement()
    assert "does not leave the site: its RDLV +0.357 is above the threshold 0.100" in held


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    originals, found, prior = torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8), torch.rand(3, 8, 8)
    report = measure_leakage(originals, found, prior, ImageSimMetric(["ssim", "norm"]))
    folder = tmp_path / "site-9" / "simulate_job" / "app_site-9"
    write_leakage(folder, "site-9", 3, report, found, originals, details={"sigma0": 0.5})
    write_leakage(tmp_path / "site-1", "site-1", 0, failed_report("no prior image"))
    first, second = read_leakage(tmp_path)
    assert (first.site, first.round_number, first.decision) == ("site-1", 0, "withhold")
    assert (first.rdlv, first.rdlv_per_image, first.best_matches()) == (None, [], None)
    assert (second.site, second.round_number) == ("site-9", 3)
    assert second.rdlv == pytest.approx(report.rdlv)
    assert second.content["sigma0"] == 0.5
    matches = second.best_matches()
    assert matches is not None
    chosen = [image.reconstruction for image in report.images]
    assert np.array_equal(matches[1], found[chosen].numpy())
    with np.load(folder / "rdvl_round3.npz", allow_pickle=False) as archive:
        assert archive["img_recon_sim"].shape == (2, 3, 2)
        # The best one by each metric, whichever of them decides.
        by_metric = archive["img_recon_sim"].argmax(1)
        assert archive["closest_idx"].tolist() == by_metric.tolist()
        assert by_metric[:, 0].tolist() == chosen
        assert by_metric[:, 1].tolist() != chosen
        assert archive["img_recon_sim_reduced"][:, 0] == pytest.approx(second.rdlv_per_image)
        assert (archive["site"].item(), archive["round"].item()) == ("site-9", 3)
    assert (folder / "matches_round3.png").stat().st_size > 500


def test_images_are_left_out_on_request(tmp_path: Path) -> None:
    originals = torch.rand(1, 3, 8, 8)
    report = measure_leakage(originals, originals, torch.rand(3, 8, 8), ImageSimMetric())
    write_leakage(tmp_path, "site-1", 0, report, originals, originals, keep_images=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["leakage_round0.json", "rdvl_round0.npz"]
    assert read_leakage(tmp_path)[0].best_matches() is None


def test_folders_without_results_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        read_leakage(tmp_path / "none")
    with pytest.raises(InputError, match="no leakage results"):
        read_leakage(tmp_path)
    (tmp_path / "leakage_round0.json").write_text(json.dumps({"site": "x"}))
    with pytest.raises(InputError, match="broken"):
        read_leakage(tmp_path)
