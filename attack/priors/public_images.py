"""The variables a radiograph (or a signal, or a volume) is optimised in."""

from __future__ import annotations

import math

import torch

from attack.priors.coordinates import Coordinates
from attack.priors.regularizers import Regularizer
from core.data.specs import DataSpec

# Smallest standard deviation of a direction, in units of the network input: what public
# images do not show can still be in a patient's.
PRINCIPAL_FLOOR = 0.15
# White coordinates move the whole anatomy at once: they need smaller steps than pixels
# for learning rates to mean the same.
PRINCIPAL_STEP = 0.2


class Grey(Coordinates):
    """One grey value per pixel instead of three channels.

    Values are centred and scaled like network inputs, so that learning rates mean the same.

    Args:
        data: The normalisation of the network inputs.
    """

    def __init__(self, data: DataSpec) -> None:
        self.data = data
        self.mean = sum(data.mean) / len(data.mean)
        self.std = sum(data.std) / len(data.std)

    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """N x 1 x H x W to N x C x H x W."""
        grey = coordinates * self.std + self.mean
        return self.data.normalize(grey.expand(-1, len(self.data.mean), *grey.shape[2:]))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """N x C x H x W to N x 1 x H x W."""
        grey = self.data.denormalize(images).mean(1, keepdim=True)
        return (grey - self.mean) / self.std

    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`; the transpose of the linear part of `decode`."""
        std = torch.tensor(self.data.std, dtype=image_gradient.dtype, device=image_gradient.device)
        scale = (self.std / std).view(-1, *[1] * (image_gradient.dim() - 2))
        return (image_gradient * scale).sum(1, keepdim=True)


class Principal(Grey):
    """Whitened grey values: white noise in them is an image like the public ones.

    x = mean + step S^(1/2) z with the covariance S of public images, whose eigenvalues are
    raised to a floor (shrinkage towards independent pixels). Equal steps in z move the
    anatomy in which people differ before single pixels.

    Args:
        data: The normalisation of the network inputs.
        public: P x C x H x W in [0, 1], images of other people; P at least 2.
        floor: Smallest standard deviation of a direction, in units of the network input.
    """

    def __init__(
        self, data: DataSpec, public: torch.Tensor, floor: float = PRINCIPAL_FLOOR
    ) -> None:
        super().__init__(data)
        grey = super().encode(data.normalize(public)).flatten(1)
        self._mean = grey.mean(0)
        _, singular, directions = torch.linalg.svd(grey - self._mean, full_matrices=False)
        deviations = singular / math.sqrt(len(grey) - 1)
        kept = deviations > floor
        self._directions = directions[kept]
        self._gains = PRINCIPAL_STEP * deviations[kept]
        self._rest = PRINCIPAL_STEP * floor

    def decode(self, coordinates: torch.Tensor) -> torch.Tensor:
        """N x 1 x H x W to N x C x H x W."""
        spread = self._scaled(coordinates, self._gains, self._rest)
        return super().decode(spread + self._mean.view(1, *coordinates.shape[1:]))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """N x C x H x W to N x 1 x H x W."""
        grey = super().encode(images)
        centred = grey - self._mean.view(1, *grey.shape[1:])
        return self._scaled(centred, 1 / self._gains, 1 / self._rest)

    def pull_back(self, image_gradient: torch.Tensor) -> torch.Tensor:
        """See `Coordinates`; the transpose of the linear part of `decode`."""
        return self._scaled(super().pull_back(image_gradient), self._gains, self._rest)

    def _scaled(self, values: torch.Tensor, gains: torch.Tensor, rest: float) -> torch.Tensor:
        """Principal directions times their gains, everything beside them times `rest`."""
        flat = values.flatten(1)
        along = flat @ self._directions.T
        scaled = rest * flat + (along * (gains - rest)) @ self._directions
        return scaled.view(values.shape)


class PriorDistance(Regularizer):
    """Mean squared distance from an image in some coordinates.

    In `Principal` coordinates that is minus twice the logarithm of the public images'
    normal density, per pixel.

    Args:
        coordinates: Coordinates in which the distance is computed.
        prior: N x C x H x W, network inputs.
        scale: Length of a unit of the coordinates.
    """

    def __init__(self, coordinates: Coordinates, prior: torch.Tensor, scale: float = 1.0) -> None:
        self.coordinates = coordinates
        self.prior = scale * coordinates.encode(prior)
        self.scale = scale

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        distance = self.scale * self.coordinates.encode(images) - self.prior
        return distance.square().mean(tuple(range(1, images.dim())))
