"""The variables an image is optimised in."""

from __future__ import annotations

import abc
import math

import torch

from attack.settings import setting_error


class Coordinates(abc.ABC):
    """A linear, invertible parametrisation of images (... x H x W)."""

    @abc.abstractmethod
    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Coordinates to images of the same shape."""

    @abc.abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images to coordinates; the inverse of `decode`."""

    @abc.abstractmethod
    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """The gradient in the images to the gradient in the coordinates."""


class Pixels(Coordinates):
    """The images themselves."""

    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return coordinates

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return images

    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return image_gradient


class Cosines(Coordinates):
    """Discrete cosine coefficients, scaled like the spectrum of natural images.

    An image is x = D^T (W z) D per channel with the orthonormal DCT-II matrix D and
    W falling with frequency f as 1 / (f + 1)^exponent, mean square 1. White noise in
    z is then an image with a natural spectrum, and equal steps in z move coarse
    structure before fine detail.

    Args:
        size: Height and width of the images.
        exponent: How fast the spectrum falls; 1 for photographs.
        device: Device of the images.
        dtype: Floating-point type of the images.

    Source: Field, Relations between the statistics of natural images, JOSA A 4, 1987
    (1/f amplitude spectra).
    """

    def __init__(
        self,
        size: tuple[int, int],
        exponent: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        height, width = size
        self._rows = _dct_matrix(height).to(device, dtype)
        self._columns = _dct_matrix(width).to(device, dtype)
        down = torch.arange(height, dtype=torch.float64).view(-1, 1)
        across = torch.arange(width, dtype=torch.float64).view(1, -1)
        scale = (1 + (down.square() + across.square()).sqrt()) ** -exponent
        self._scale = (scale / scale.square().mean().sqrt()).to(device, dtype)

    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return self._rows.mT @ (self._scale * coordinates) @ self._columns

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return (self._rows @ images @ self._columns.mT) / self._scale

    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`; the transpose of `decode`."""
        return self._scale * (self._rows @ image_gradient @ self._columns.mT)


def _dct_matrix(n: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix, n x n, in float64."""
    frequency = torch.arange(n, dtype=torch.float64).view(-1, 1)
    position = torch.arange(n, dtype=torch.float64).view(1, -1)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * (position + 0.5) * frequency / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def make_coordinates(
    name: str, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Coordinates:
    """Coordinates by name.

    Args:
        name: "pixels", "dct" or "dct:EXPONENT".
        size: Height and width of the images.
        device: Device of the images.
        dtype: Floating-point type of the images.

    Raises:
        InputError: Unknown name.
    """
    kind, _, exponent = name.partition(":")
    if kind == "pixels" and not exponent:
        return Pixels()
    try:
        if kind == "dct":
            return Cosines(size, float(exponent or 1.0), device, dtype)
    except ValueError:
        pass
    raise setting_error(f"{{coordinates}} {name}: choose pixels, dct or dct:EXPONENT")
