"""Real photographs that need no download: crops of those in scikit-image and scikit-learn.

Ten photographs are ten classes. Each is cut into square blocks; every fourth block
of a lattice is kept for validation, so that no pixel is both trained and tested on.
Nearly flat crops are left out: a constant colour reconstructs them well and would
flatter every attack.

Two cues are easier than the rest and worth knowing when reading an accuracy:
`camera` and `coins` are grey, and `rocket` is mostly flat sky and therefore small.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from core.errors import InputError

# Class name: package, file in its wheel. All are CC0 or public domain, but for
# `motorcycle` (Middlebury stereo 2014, no licence stated) and `china` and `flower`
# (CC-BY 2.0, Flickr users danielbuechele and vultilion, as scikit-learn's README
# says). They are read from the installed wheels and never copied.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
VALIDATION_EVERY = 4
CONTRAST_FLOOR = 14.0


@dataclass(frozen=True)
class PatchRecipe:
    """How photographs are cut.

    Attributes:
        image_size: Side of the finished images in pixels.
        short_side: Each photograph is resized to this short side.
        block: Side of the blocks that belong wholly to training or validation.
    """

    image_size: int
    short_side: int
    block: int


RECIPES = {
    "photo-patches": PatchRecipe(image_size=32, short_side=400, block=80),
    "photo-patches-64": PatchRecipe(image_size=64, short_side=512, block=128),
}


@dataclass(frozen=True)
class Patch:
    """Where one crop comes from: a square of a resized photograph.

    Attributes:
        label: Index of the photograph in `PHOTOGRAPHS`.
        left: Left edge in pixels of the resized photograph.
        top: Row of the patch's upper edge in pixels.
        side: Side of the square.
        validation: Whether its block is kept for validation.
    """

    label: int
    left: int
    top: int
    side: int
    validation: bool


@dataclass(frozen=True)
class EmbeddedImages:
    """A finished data set.

    Attributes:
        images: N x 3 x H x W, uint8.
        labels: N class indices.
        validation: N, whether the image is for validation.
        patches: The patch of a photograph that each image was cut from.
    """

    images: np.ndarray
    labels: np.ndarray
    validation: np.ndarray
    patches: tuple[Patch, ...]


@functools.cache
def photo_patches(name: str) -> EmbeddedImages:
    """Build an embedded data set (a second; the same images every time).

    Args:
        name: A key of `RECIPES`.

    Raises:
        InputError: The photographs' packages are not installed.
    """
    recipe = RECIPES[name]
    images: list[np.ndarray] = []
    patches: list[Patch] = []
    for label, (package, file) in enumerate(PHOTOGRAPHS.values()):
        photograph = _resized(_wheel_file(package, file), recipe.short_side)
        for patch in _patches(photograph.size, label, recipe):
            crop = _crop(photograph, patch, recipe.image_size)
            if _contrast(crop) >= CONTRAST_FLOOR:
                images.append(np.asarray(crop).transpose(2, 0, 1))
                patches.append(patch)
    return EmbeddedImages(
        images=np.stack(images),
        labels=np.array([patch.label for patch in patches]),
        validation=np.array([patch.validation for patch in patches]),
        patches=tuple(patches),
    )


def photograph_files() -> dict[str, Path]:
    """The whole photographs, by class name.

    Raises:
        InputError: Their packages are not installed.
    """
    return {name: _wheel_file(*place) for name, place in PHOTOGRAPHS.items()}


def _wheel_file(package: str, file: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(
            f"the embedded photographs come with {package}, which is not installed; "
            "pip install 'gradinvbench[embedded]', or give --data a folder"
        )
    path = Path(found.origin).parent / file
    if not path.exists():
        raise InputError(f"the installed {package} does not hold the photograph {file}")
    return path


def _resized(path: Path, short_side: int) -> Image.Image:
    with Image.open(path) as image:
        photograph = image.convert("RGB")
    factor = short_side / min(photograph.size)
    width, height = (max(short_side, round(side * factor)) for side in photograph.size)
    return photograph.resize((width, height), Image.Resampling.LANCZOS)


def _patches(size: tuple[int, int], label: int, recipe: PatchRecipe) -> Iterator[Patch]:
    """Every block whole, and its four quarters."""
    half = recipe.block // 2
    for row in range(size[1] // recipe.block):
        for column in range(size[0] // recipe.block):
            # A skewed lattice spreads the validation blocks over the whole photograph.
            validation = (2 * row + column) % VALIDATION_EVERY == VALIDATION_EVERY - 1
            left, top = column * recipe.block, row * recipe.block
            yield Patch(label, left, top, recipe.block, validation)
            for dx, dy in ((0, 0), (half, 0), (0, half), (half, half)):
                yield Patch(label, left + dx, top + dy, half, validation)


def _crop(photograph: Image.Image, patch: Patch, image_size: int) -> Image.Image:
    box = (patch.left, patch.top, patch.left + patch.side, patch.top + patch.side)
    # Cropped first, so that the resampling filter cannot reach into the neighbouring block.
    return photograph.crop(box).resize((image_size, image_size), Image.Resampling.LANCZOS)


def _contrast(image: Image.Image) -> float:
    """Standard deviation of the luminance, in 0..255."""
    return float(np.asarray(image.convert("L"), dtype=np.float64).std())
