"""The attack that meets the bounds: the images that a noisy gradient makes likeliest.

Under normal noise of a known size the likeliest images are those of least squares. As the noise
falls, their error reaches the bound of Cramér and Rao; with the prior's density as a second term
(the likeliest images given the gradient) it reaches van Trees'. Gauss-Newton steps need the whole
Jacobian, so that this is an attack on small networks, and the measure of the others on them.

Sources: Kay, "Fundamentals of Statistical Signal Processing: Estimation Theory", 1993, section
    7.5; damping: Marquardt, "An Algorithm for Least-Squares Estimation of Nonlinear Parameters",
    1963, https://doi.org/10.1137/0111030.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attack.bounds.jacobian import GradientOfImages
from core.errors import InputError
from core.target import Target

# Steps that lower the sum of squares by less than this share end the search.
_SETTLED = 1e-10
# Damping in units of the curvature's mean: at the start, its factor per step, and where it ends.
_DAMPING, _FACTOR, _STUCK = 1e-3, 10.0, 1e8


@dataclass(frozen=True)
class NormalPrior:
    """Images of which a mean and a covariance are known.

    Attributes:
        mean: n values, the mean of all values of the images.
        covariance: n x n; positive definite.
    """

    mean: torch.Tensor
    covariance: torch.Tensor


def likeliest(
    target: Target,
    start: torch.Tensor,
    labels: torch.Tensor,
    noise: float,
    *,
    prior: NormalPrior | None = None,
    steps: int = 50,
) -> torch.Tensor:
    """Images of largest likelihood, or with a prior of largest posterior density.

    Args:
        target: What the client shared: one gradient of one step.
        start: N x C x ..., what another attack found; the search is a local one.
        labels: What the loss compares the outputs with.
        noise: Standard deviation of the noise on every shared number; positive.
        prior: What is known of the images beforehand.
        steps: At most so many Gauss-Newton steps.

    Returns:
        N x C x ... in float64.

    Raises:
        InputError: No noise, several local steps, active dropout, or a network that is too large.
    """
    if not noise > 0:
        raise InputError("likeliest: give the standard deviation of the noise, a positive number")
    gradient = GradientOfImages(target, labels, start.numel())
    problem = _LeastSquares(gradient, target, noise, prior, start.shape)
    x = start.detach().double().flatten()
    squares, damping = problem.squares(x), _DAMPING
    for _ in range(steps):
        curvature, slope = problem.normal_equations(x)
        scale = float(curvature.diagonal().mean())
        while damping < _STUCK:
            damped = curvature + damping * scale * torch.eye(len(x), dtype=x.dtype)
            moved = x - torch.linalg.solve(damped, slope)
            found = problem.squares(moved)
            if found < squares:
                break
            damping *= _FACTOR
        else:
            break
        settled = squares - found < _SETTLED * squares
        x, squares, damping = moved, found, damping / _FACTOR
        if settled:
            break
    return x.view(start.shape)


class _LeastSquares:
    """Twice the negative logarithm of the density, as a sum of squares."""

    def __init__(
        self,
        gradient: GradientOfImages,
        target: Target,
        noise: float,
        prior: NormalPrior | None,
        shape: torch.Size,
    ) -> None:
        self._gradient, self._noise, self._shape = gradient, noise, shape
        self._received = torch.cat([part.flatten() for part in target.gradient.values()]).double()
        n = shape.numel()
        # Without a prior nothing is known beforehand.
        self._mean = torch.zeros(n).double() if prior is None else prior.mean.double()
        self._information = (
            torch.zeros(n, n).double()
            if prior is None
            else torch.linalg.inv(prior.covariance.double())
        )

    def squares(self, x: torch.Tensor) -> float:
        residual = (self._gradient(x.view(self._shape)) - self._received) / self._noise
        apart = x - self._mean
        return float(residual @ residual + apart @ self._information @ apart)

    def normal_equations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gauss-Newton's n x n curvature and the n slopes, each of half of the squares."""
        images = x.view(self._shape)
        jacobian = self._gradient.jacobian(images) / self._noise
        residual = (self._gradient(images) - self._received) / self._noise
        curvature = jacobian.T @ jacobian + self._information
        return curvature, jacobian.T @ residual + self._information @ (x - self._mean)
