"""The embedded photographs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from core.data.embedded import CONTRAST_FLOOR, PHOTOGRAPHS, RECIPES, Patch, photo_patches

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", list(RECIPES))
def test_training_and_validation_regions_are_disjoint(name: str) -> None:
    """No pixel of a photograph is in a training and in a validation image."""
    made = photo_patches(name)
    for label in range(len(PHOTOGRAPHS)):
        own = [patch for patch in made.patches if patch.label == label]
        train, val = (covered([p for p in own if p.validation is part]) for part in (False, True))
        assert train.any()
        assert val.any()
        assert not (train & val).any()


def covered(patches: list[Patch]) -> np.ndarray:
    mask = np.zeros((2000, 2000), dtype=bool)
    for patch in patches:
        mask[patch.top : patch.top + patch.side, patch.left : patch.left + patch.side] = True
    return mask


@pytest.mark.parametrize(("name", "least"), [("photo-patches", 800), ("photo-patches-64", 500)])
def test_size_classes_and_contrast(name: str, least: int) -> None:
    made = photo_patches(name)
    side = RECIPES[name].image_size
    assert made.images.shape[1:] == (3, side, side)
    assert made.images.dtype == np.uint8
    assert (~made.validation).sum() >= least
    assert set(made.labels[made.validation]) == set(range(10))
    luminance = [
        np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")).std()
        for image in made.images
    ]
    assert min(luminance) >= CONTRAST_FLOOR


def test_built_twice_is_the_same() -> None:
    first = photo_patches.__wrapped__("photo-patches")
    second = photo_patches.__wrapped__("photo-patches")
    np.testing.assert_array_equal(first.images, second.images)
    assert first.patches == second.patches
