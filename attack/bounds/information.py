"""How well images can be known from a gradient with noise: Fisher information and its bounds.

The attacker sees y = g(x) + s w with standard normal w. With J = dg/dx the Fisher information of
the images is J^T J / s^2. Its inverse bounds the error of every attack without bias (Cramér and
Rao); together with a prior's information it bounds the mean error of every attack whatsoever
over images of that prior (van Trees).

Sources: van Trees, "Detection, Estimation, and Modulation Theory", part I, 1968, section 2.4; for
    gradients: Guo et al., "Bounding Training Data Reconstruction in Private (Deep) Learning",
    ICML 2022, https://arxiv.org/abs/2201.12383; of what moves a reconstruction: Zhang et al.,
    "Understanding Deep Gradient Leakage via Inversion Influence Functions", NeurIPS 2023,
    https://arxiv.org/abs/2309.13016.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from core.errors import InputError

# A direction whose singular value is below this share of the largest is rounding.
_RANK = 1e-12


@dataclass(frozen=True)
class Identifiability:
    """What a gradient fixes of the images, direction by direction.

    Attributes:
        singular_values: Of the Jacobian, n of them, largest first; 0 where there are fewer
            shared numbers than values.
        directions: n x n, the directions in the images that belong to them, as rows.
    """

    singular_values: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, jacobian: torch.Tensor) -> Identifiability:
        """From an m x n Jacobian (see `jacobian.gradient_jacobian`)."""
        n = jacobian.shape[1]
        _, found, directions = torch.linalg.svd(jacobian, full_matrices=len(jacobian) < n)
        values = found.new_zeros(n)
        values[: len(found)] = found
        return cls(values, directions)

    @property
    def rank(self) -> int:
        """Directions that the gradient depends on at all."""
        values = self.singular_values
        return int((values > _RANK * values[0]).sum()) if values[0] > 0 else 0

    def identified(self, noise: float, spread: float) -> int:
        """Directions that are known better from the gradient than without it.

        Args:
            noise: Standard deviation of the noise on every shared number.
            spread: Standard deviation of the images in any direction, known beforehand.
        """
        return int((self.singular_values * spread > noise).sum())

    def smallest_error(self, noise: float) -> float:
        """Mean squared error per value that no attack without bias is below (Cramér and Rao).

        Args:
            noise: Standard deviation of the noise on every shared number.

        Returns:
            In squared units of the images; infinite where a direction is not fixed at all.
        """
        if self.rank < len(self.singular_values):
            return math.inf
        return float((noise / self.singular_values).square().mean())

    def expected_error(self, noise: float, covariance: torch.Tensor) -> float:
        """Mean squared error per value of the best reconstruction of images near these.

        Near the truth the gradient is linear in the images; of a linear one the best
        reconstruction is known, and its error is a function of the Jacobian's spectrum and of the
        prior. It is a risk of this one client, before any attack.

        Args:
            noise: Standard deviation of the noise on every shared number; positive.
            covariance: n x n, of a normal prior.

        Returns:
            In squared units of the images.

        Source: the linear Bayes estimate, Kay 1993, section 10.6. InvLoss (Xu et al., "From Risk
            to Resilience", https://arxiv.org/abs/2512.15460) states the same dependence on the
            spectrum without a prior; only its abstract could be read.
        """
        scaled = self.singular_values[:, None] * self.directions
        information = scaled.T @ scaled / noise**2 + torch.linalg.inv(covariance)
        return float(torch.linalg.inv(information).trace() / len(covariance))

    def moved_by(self, perturbation: torch.Tensor, jacobian: torch.Tensor) -> torch.Tensor:
        """Where, to first order, a perturbed gradient moves the images that explain it best.

        Args:
            perturbation: m numbers, such as the defended minus the plain gradient.
            jacobian: The m x n matrix that this is the spectrum of.

        Returns:
            n values; directions that the gradient does not depend on stay.
        """
        values = self.singular_values
        inverse = torch.where(values > _RANK * values[0], values, math.inf).square().reciprocal()
        return self.directions.T @ (inverse * (self.directions @ (jacobian.T @ perturbation)))


def mean_smallest_error(
    jacobians: Iterable[torch.Tensor], noise: float, covariance: torch.Tensor
) -> float:
    """Mean squared error per value, over images of a normal prior, that no attack is below.

    Van Trees' inequality: the inverse of the mean Fisher information plus the prior's. It holds
    for every attack, with bias or without, that is told the prior or not.

    Args:
        jacobians: m x n each, at images drawn from the prior.
        noise: Standard deviation of the noise on every shared number; positive.
        covariance: n x n, of the prior.

    Returns:
        In squared units of the images.

    Raises:
        InputError: No Jacobian, or no noise.
    """
    if not noise > 0:
        raise InputError("bounds: without noise there is no bound; give a positive noise")
    total, count = torch.zeros_like(covariance), 0
    for jacobian in jacobians:
        total += jacobian.T @ jacobian
        count += 1
    if not count:
        raise InputError("bounds: give at least one Jacobian")
    information = total / count / noise**2 + torch.linalg.inv(covariance)
    return float(torch.linalg.inv(information).trace() / len(covariance))


def decibels(error: float) -> float:
    """PSNR of a mean squared error, for values in [0, 1] or of that scale."""
    return math.inf if error <= 0 else -10 * math.log10(error)
