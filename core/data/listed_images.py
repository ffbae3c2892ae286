"""Images of a data list, as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from core.data.image_files import load_image
from core.data.list_files import Sample
from core.data.specs import DataSpec
from core.errors import InputError


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
            path = self.data_root / self.samples[index].image
            cached = load_image(path, self.size, "data_root")
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
