"""Images of a data list, as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from core.data.list_files import Sample
from core.data.specs import DataSpec
from core.errors import InputError

# The normalisation of the published job, torchvision's.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SIXTEEN_BITS = 65535.0


def chest_spec(size: int, num_class: int = 2, name: str = "chest") -> DataSpec:
    """Shape and normalisation of the federated stage's images.

    Args:
        size: Side in pixels.
        num_class: Number of classes.
        name: Of the data set, for records.
    """
    return DataSpec(name, (3, size, size), IMAGENET_MEAN, IMAGENET_STD, num_class)


def load_image(path: str | Path, size: int) -> torch.Tensor:
    """Read a picture the right way up: rows first, greyscale repeated to three channels.

    Args:
        path: A PNG, JPG or other picture; grey or colour, 8 or 16 bits.
        size: Side in pixels that it is resized to, both ways.

    Returns:
        3 x size x size in [0, 1].

    Raises:
        InputError: The file is missing or no picture.
    """
    try:
        with Image.open(path) as file:
            picture = _eight_bits(ImageOps.exif_transpose(file)).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not an image that can be read ({error})") from None
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey values scaled to 8 bits; PIL's own conversion cuts them off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture, dtype=np.float64) * (255 / _SIXTEEN_BITS)
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


class ImageListDataset(Dataset[tuple[torch.Tensor, int]]):
    """The images of a data list with their labels.

    Args:
        data_root: Folder that the list's paths start from.
        samples: Images and labels.
        size: Side in pixels.
        normalization: How network inputs are made; images in [0, 1] if None.
        cache_rate: Share of the images that stay in memory once they were read.
    """

    def __init__(
        self,
        data_root: str | Path,
        samples: Sequence[Sample],
        size: int,
        normalization: DataSpec | None = None,
        cache_rate: float = 1.0,
    ) -> None:
        if not 0 <= cache_rate <= 1:
            raise InputError(f"cache_rate {cache_rate}: must lie between 0 and 1")
        self.data_root = Path(data_root)
        self.samples = list(samples)
        self.size = size
        self.normalization = normalization
        self.cache_rate = cache_rate
        self._cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image (3 x size x size, normalised if asked for) and class index."""
        image = self.image(index)
        if self.normalization is not None:
            image = self.normalization.normalize(image[None])[0]
        return image, self.samples[index].label

    def image(self, index: int) -> torch.Tensor:
        """The image in [0, 1], 3 x size x size."""
        cached = self._cache.get(index)
        if cached is None:
            cached = load_image(self.data_root / self.samples[index].image, self.size)
            if index < round(self.cache_rate * len(self)):
                self._cache[index] = cached
        return cached

    def images(self) -> torch.Tensor:
        """All images in [0, 1], N x 3 x size x size."""
        if not self.samples:
            return torch.zeros(0, 3, self.size, self.size)
        return torch.stack([self.image(index) for index in range(len(self))])

    def labels(self) -> torch.Tensor:
        """All class indices, N."""
        return torch.tensor([sample.label for sample in self.samples], dtype=torch.long)
