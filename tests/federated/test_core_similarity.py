"""Similarity of images, against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audit.similarity import ImageSimMetric, SimMetric, similarity_matrix
from core.errors import InputError

RNG = np.random.default_rng(0)


def pair(height: int = 24, width: int = 31) -> tuple[np.ndarray, np.ndarray]:
    first = RNG.uniform(0, 255, (height, width, 3))
    return first, np.clip(first + RNG.normal(0, 40, first.shape), 0, 255)


@pytest.mark.parametrize("shape", [(24, 31), (7, 7), (64, 64)])
def test_ssim_is_scikit_images(shape: tuple[int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair(*shape)
    ours = ImageSimMetric("ssim")(x, y)["ssim"]
    theirs = metrics.structural_similarity(x, y, channel_axis=-1, data_range=256)
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_cosine_and_norm_by_hand() -> None:
    x, y = pair(8, 8)
    found = ImageSimMetric(["cosine", "norm"])(x, y)
    assert list(found) == ["cosine", "norm"]
    cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    assert found["cosine"] == pytest.approx(cosine)
    assert found["norm"] == pytest.approx(np.sqrt(((x - y) ** 2).sum()))


def test_matrix_is_pair_by_pair() -> None:
    references, images = torch.rand(3, 3, 9, 9), torch.rand(2, 3, 9, 9)
    metric = ImageSimMetric(["ssim", "norm"])
    matrix = similarity_matrix(metric, references, images)
    for i, x in enumerate(references):
        for j, y in enumerate(images):
            one = metric(x.permute(1, 2, 0).numpy() * 255.0, y.permute(1, 2, 0).numpy() * 255.0)
            assert matrix["ssim"][i, j] == pytest.approx(one["ssim"], abs=1e-5)
            assert matrix["norm"][i, j] == pytest.approx(one["norm"], rel=1e-5)


class Brightness(SimMetric):
    def __call__(self, reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
        return {"brightness": -abs(float(reference.mean() - image.mean()))}


def test_own_metrics_are_called_with_grey_values() -> None:
    references = torch.stack([torch.full((3, 4, 4), v) for v in (0.0, 1.0)])
    matrix = similarity_matrix(Brightness(), references, torch.full((1, 3, 4, 4), 0.2))
    assert np.allclose(matrix["brightness"], [[-51], [-204]], atol=1e-4)


class Published(SimMetric):
    """As code for the published filter writes one: tensors, channels first, a bare number."""

    metrics = ("gap", "twice")

    def __call__(self, source, reference, fl_ctx, is_channel_first=False):  # type: ignore[no-untyped-def]
        assert is_channel_first
        assert source.shape[0] == 3
        gap = float((source - reference).abs().mean())
        return {"twice": 2 * gap, "gap": gap}


class Bare(SimMetric):
    def __call__(self, source, reference):  # type: ignore[no-untyped-def]
        assert source.shape[-1] == 3
        return float(np.abs(source - reference).mean())


def test_published_metrics_are_called_as_published() -> None:
    references, images = torch.rand(2, 3, 6, 7), torch.rand(3, 3, 6, 7)
    found = similarity_matrix(Published(), references, images)
    assert list(found) == ["gap", "twice"]
    bare = similarity_matrix(Bare(), references, images)
    expected = [[255 * float((x - y).abs().mean()) for y in images] for x in references]
    np.testing.assert_allclose(found["gap"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["twice"], 2 * found["gap"])
    np.testing.assert_allclose(bare["similarity"], expected, rtol=1e-5)


def test_channels_first_and_values_up_to_one_are_the_same_images() -> None:
    x, y = (image / 255 for image in pair(12, 9))
    metric = ImageSimMetric(["ssim", "cosine", "norm"])
    plain = metric(x * 255, y * 255)
    as_published = metric(
        source=torch.from_numpy(x).permute(2, 0, 1),
        reference=torch.from_numpy(y).permute(2, 0, 1),
        fl_ctx=None,
        is_channel_first=True,
    )
    assert as_published == pytest.approx(plain)


def test_arguments_are_kept_and_checked() -> None:
    assert ImageSimMetric(metrics="norm").metrics == ["norm"]
    assert ImageSimMetric(metrics=None).metrics == ImageSimMetric().metrics == ["ssim"]
    with pytest.raises(InputError, match="psnr"):
        ImageSimMetric(["ssim", "psnr"])
    with pytest.raises(ValueError, match="differ"):
        ImageSimMetric()(np.zeros((8, 8, 3)), np.zeros((9, 9, 3)))
