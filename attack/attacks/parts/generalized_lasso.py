"""Images from what a network's first layers make of them, by the generalized Lasso."""

from __future__ import annotations

from collections.abc import Callable

import torch

Features = Callable[[torch.Tensor], torch.Tensor]
# Steps of the power iteration for the size of the derivative.
_POWER = 12
# The dual step's share of the largest that converges.
_DUAL = 0.25
# The weight starts at so many times its value, and falls to it over this share of the iterations.
_FIRST_WEIGHT, _FALLING = 10.0, 0.7


def solve(
    features: Features,
    seen: torch.Tensor,
    start: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    *,
    weight: float,
    iterations: int,
) -> torch.Tensor:
    """min over x of |features(x) - seen|^2 / 2 + weight |D x|_1 within bounds, image by image.

    D takes differences of neighbouring pixels. Where the features are affine the problem is the
    generalized Lasso, and convex; through ReLU and pooling it is solved in the same way. Primal
    and dual steps alternate, and the weight falls to its value: a smooth image is found first.

    Args:
        features: N x C x H x W to N x d, differentiable.
        seen: N x d.
        start: N x C x H x W.
        bounds: Lowest and highest values, of shapes that broadcast to an image's.
        weight: Of the differences.
        iterations: How many.

    Returns:
        N x C x H x W.

    Source: Tibshirani and Taylor, "The Solution Path of the Generalized Lasso", Annals of
        Statistics 2011, https://arxiv.org/abs/1005.1971; the algorithm of Condat, Journal of
        Optimization Theory and Applications 2013, and Vũ, Advances in Computational Mathematics
        2013.
    """
    size = _squared_norm(features, start[:1])
    dual_step = _DUAL * size / 8
    step = 1 / (size + 8 * dual_step)
    x, dual = start.clone(), torch.zeros_like(_differences(start))
    for number in range(iterations):
        left = max(0.0, 1 - number / max(_FALLING * iterations, 1))
        now = weight * _FIRST_WEIGHT**left
        moved = x - step * (_slope(features, seen, x) + _back(dual))
        moved = torch.minimum(torch.maximum(moved, bounds[0]), bounds[1])
        dual = (dual + dual_step * _differences(2 * moved - x)).clamp(-now, now)
        x = moved
    return x


def _slope(features: Features, seen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        apart = (features(x) - seen).square().sum() / 2
        return torch.autograd.grad(apart, x)[0]


def _squared_norm(features: Features, at: torch.Tensor) -> float:
    """Of the features' derivative, by power iteration."""
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(0)).to(at)
    size = 1.0
    for _ in range(_POWER):
        pushed = torch.func.jvp(features, (at,), (direction,))[1]
        pulled = torch.func.vjp(features, at)[1](pushed)[0]
        size = float(pulled.norm() / direction.norm())
        direction = pulled / pulled.norm().clamp_min(1e-30)
    return max(size, 1e-12)


def _differences(x: torch.Tensor) -> torch.Tensor:
    """N x 2 x C x H x W: to the pixel below and to the right; 0 at the rim."""
    down = torch.diff(x, dim=2, append=x[:, :, -1:])
    right = torch.diff(x, dim=3, append=x[..., -1:])
    return torch.stack([down, right], 1)


def _back(dual: torch.Tensor) -> torch.Tensor:
    """The adjoint of `_differences`."""
    down, right = dual[:, 0].clone(), dual[:, 1].clone()
    down[:, :, -1] = 0
    right[..., -1] = 0
    above = torch.diff(down, dim=2, prepend=torch.zeros_like(down[:, :, :1]))
    left = torch.diff(right, dim=3, prepend=torch.zeros_like(right[..., :1]))
    return -above - left
