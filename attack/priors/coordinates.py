"""The variables an image is optimised in."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch

from attack.settings import setting_error


class Coordinates(abc.ABC):
    """A linear, invertible parametrisation of images, signals, volumes or tables."""

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
    structure before fine detail. Signals and volumes are transformed along their one or
    three axes; f is the length of the vector of an entry's frequencies.

    Args:
        size: Lengths of the last axes, those of space: L, H x W or D x H x W.
        exponent: How fast the spectrum falls; 1 for photographs.
        device: Device of the images.
        dtype: Floating-point type of the images.

    Source: Field, Relations between the statistics of natural images, JOSA A 4, 1987
    (1/f amplitude spectra).
    """

    def __init__(
        self,
        size: tuple[int, ...],
        exponent: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._matrices = [_dct_matrix(n).to(device, dtype) for n in size]
        frequencies = [torch.arange(n, dtype=torch.float64).square() for n in size]
        squares = sum(torch.meshgrid(*frequencies, indexing="ij"), torch.zeros(()).double())
        scale = (1 + squares.sqrt()) ** -exponent
        self._scale = (scale / scale.square().mean().sqrt()).to(device, dtype)

    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return _transform(self._scale * coordinates, [matrix.mT for matrix in self._matrices])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`."""
        return _transform(images, self._matrices) / self._scale

    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`; the transpose of `decode`."""
        return self._scale * _transform(image_gradient, self._matrices)


def _transform(values: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiply by one matrix along each of the last axes, from the first of them on."""
    for axis, matrix in enumerate(matrices, start=-len(matrices)):
        if axis == -1:
            values = values @ matrix.mT
        else:
            # The axes behind this one are the columns of one product.
            values = (matrix @ values.flatten(axis + 1)).reshape(values.shape)
    return values


def _dct_matrix(n: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix, n x n, in float64."""
    frequency = torch.arange(n, dtype=torch.float64).view(-1, 1)
    position = torch.arange(n, dtype=torch.float64).view(1, -1)
    matrix = math.sqrt(2 / n) * torch.cos(math.pi * (position + 0.5) * frequency / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def make_coordinates(
    name: str, size: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Coordinates:
    """Coordinates by name.

    Args:
        name: "pixels", "dct" or "dct:EXPONENT".
        size: Lengths of the axes of space. A table has none, and its values are their own
            coordinates whatever the name.
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
            falling = float(exponent or 1.0)
            return Cosines(size, falling, device, dtype) if size else Pixels()
    except ValueError:
        pass
    raise setting_error(f"{{coordinates}} {name}: choose pixels, dct or dct:EXPONENT")
