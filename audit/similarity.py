"""How alike two images are, as the leakage value compares them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from core.errors import InputError

# The published filter's range for grey values 0..255.
DATA_RANGE = 256.0
METRICS = ("ssim", "cosine", "norm")


class SimMetric(abc.ABC):
    """A similarity of two images."""

    @abc.abstractmethod
    def __call__(self, reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
        """Compare an image with a reference.

        Args:
            reference: H x W x C, values 0..255.
            image: The same shape.

        Returns:
            A value per metric; the first one is the one that decides.
        """


class ImageSimMetric(SimMetric):
    """SSIM, cosine similarity or distance of two images.

    "ssim" is scikit-image's `structural_similarity` with its default 7 x 7 window,
    `channel_axis=-1` and `data_range=256`; "cosine" the cosine of the angle between the
    images as vectors; "norm" the Euclidean length of their difference (smaller is more
    alike).

    Args:
        metrics: A name or several; the first one decides.
    """

    def __init__(self, metrics: str | Sequence[str] = "ssim") -> None:
        self.metrics = metrics
        unknown = [name for name in self.names if name not in METRICS]
        if unknown or not self.names:
            raise InputError(f"metrics {metrics!r}: choose from {', '.join(METRICS)}")

    @property
    def names(self) -> list[str]:
        """The metrics as a list."""
        return [self.metrics] if isinstance(self.metrics, str) else list(self.metrics)

    def __call__(self, reference: np.ndarray, image: np.ndarray) -> dict[str, float]:
        """See `SimMetric`."""
        if reference.shape != image.shape:
            raise ValueError(f"images of shapes {reference.shape} and {image.shape} differ")
        pair = _batch(reference), _batch(image)
        return {name: float(_similarities(name, *pair)[0]) for name in self.names}


def similarity_matrix(
    metric: SimMetric, references: torch.Tensor, images: torch.Tensor
) -> dict[str, np.ndarray]:
    """Every image against every reference.

    Args:
        metric: The similarity that compares two images.
        references: N x C x H x W in [0, 1].
        images: M x C x H x W in [0, 1].

    Returns:
        N x M values by metric.
    """
    if type(metric).__call__ is ImageSimMetric.__call__:
        return {name: _matrix(name, references, images) for name in _names(metric)}
    values = [[metric(_array(x), _array(y)) for y in images] for x in references]
    names = list(values[0][0]) if values and values[0] else ["similarity"]
    shape = (len(references), len(images))
    return {
        name: np.array([[v[name] for v in row] for row in values], dtype=float).reshape(shape)
        for name in names
    }


def _names(metric: Any) -> list[str]:
    return metric.names


def _matrix(name: str, references: torch.Tensor, images: torch.Tensor) -> np.ndarray:
    """One call per reference: much faster than one per pair."""
    references, images = references.double() * 255, images.double() * 255
    rows = [_similarities(name, x.expand_as(images), images).numpy() for x in references]
    return np.array(rows, dtype=float).reshape(len(references), len(images))


def _similarities(name: str, references: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """One value per pair; N x C x H x W in 0..255, float64."""
    if name == "ssim":
        from attack.metrics.similarity import ssim

        return ssim(images / DATA_RANGE, references / DATA_RANGE, "uniform")
    x, y = references.flatten(1), images.flatten(1)
    if name == "cosine":
        return torch.nn.functional.cosine_similarity(x, y, eps=1e-12)
    return (x - y).norm(dim=1)


def _batch(image: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float64))
    return values.permute(2, 0, 1)[None]


def _array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().numpy() * 255
