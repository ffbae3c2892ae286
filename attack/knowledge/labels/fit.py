"""Do labels explain the last layer's gradient? A hypothesis is tried against the model.

The weight gradient is (P - Y)^T X / K: K samples' probabilities P, labels Y and features X, with
P = softmax(X W^T + b); class weights weigh the rows of P - Y. Given Y, the K vectors of features
are all that is unknown; they lie in the span of the gradient's rows, of at most K dimensions. So
K^2 numbers have to satisfy n (K + 1) equations: with fewer samples than classes that is possible
for the right labels only, and what is left of the equations tells them from wrong ones, whatever
the features are (signed, in train mode, behind dropout).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attack.knowledge.labels.last_layer import LastLayer

# Labels that leave less than this share of the gradient unexplained pass for right; what right and
# wrong ones leave is measured by `benchmarks.label_rules`. Where none explains the gradient, the
# one of least doubt is taken, and may be wrong.
EXPLAINED = 1e-3
# Entries of the Jacobian beyond which a hypothesis is not tried.
MAX_ENTRIES = 2_000_000
_STEPS = 40
# Features of one class must not start at one point: they would stay together.
_SPREAD = 0.05


@dataclass(frozen=True)
class Equations:
    """The equations of one gradient, in coordinates of the span of its rows.

    Attributes:
        weight_gradient: n x r, in the span's coordinates, over its norm.
        bias_gradient: n, over its norm; None where it was not shared.
        weight: n x r, the layer's weight in the span's coordinates.
        bias: n, the layer's bias; zeros where it has none.
        span: features x r, orthonormal.
        scales: The two norms.
        last: What was shared, and the layer.
    """

    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    span: torch.Tensor
    scales: tuple[float, float]
    last: LastLayer

    @classmethod
    def of(cls, last: LastLayer) -> Equations | None:
        """Those of a last layer; None where they could not tell labels, or are too many."""
        n, k = last.n_classes, last.batch_size
        rank = min(k, n - 1, last.weight_gradient.shape[1])
        if k >= n or not last.weight_gradient.any() or n * (rank + 1) * k * rank > MAX_ENTRIES:
            return None
        span = torch.linalg.svd(last.weight_gradient, full_matrices=False).Vh[:rank].T
        norm, bias_gradient = float(last.weight_gradient.norm()), last.bias_gradient
        if bias_gradient is not None and not bias_gradient.any():
            bias_gradient = None
        bias_norm = 1.0 if bias_gradient is None else float(bias_gradient.norm())
        return cls(
            weight_gradient=last.weight_gradient @ span / norm,
            bias_gradient=None if bias_gradient is None else bias_gradient / bias_norm,
            weight=last.layer.weight.detach().double().cpu() @ span,
            bias=last.outputs(torch.zeros(last.weight_gradient.shape[1], dtype=torch.float64)),
            span=span,
            scales=(norm, bias_norm),
            last=last,
        )


@dataclass(frozen=True)
class _Point:
    """Features, a common factor, and what they leave of the equations.

    Attributes:
        features: K x r, in the span's coordinates.
        factor: What the client multiplied its gradient by.
        probabilities: K x n.
        mass: K x 1, the sum of every sample's targets.
        excess: K x n, probabilities times that minus targets.
        unscaled: The gradients that follow, of factor 1, stacked as `residual` is.
        residual: What they miss the shared ones by.
    """

    features: torch.Tensor
    factor: float
    probabilities: torch.Tensor
    mass: torch.Tensor
    excess: torch.Tensor
    unscaled: torch.Tensor
    residual: torch.Tensor

    @property
    def misfit(self) -> float:
        """Norm of the residual; 1 is that of each of the two gradients."""
        return float(self.residual.norm())


def misfit(
    equations: Equations, labels: torch.Tensor, start: torch.Tensor, factor: float | None = None
) -> float:
    """The share of the gradient that labels leave unexplained, at the best features found.

    Args:
        equations: Of the gradient.
        labels: K class indices.
        start: K x features, a guess.
        factor: A guess by what the gradient has to be multiplied to undo clipping; None: the
            gradient is known to be as it was.

    Returns:
        Relative to the gradient's norm.
    """
    targets = equations.last.targets(labels)
    generator = torch.Generator().manual_seed(0)
    features = start @ equations.span
    noise = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    features = features + _SPREAD * features.pow(2).mean().sqrt() * noise
    free_factor = factor is not None
    point = _at(equations, targets, features, 1 / factor if factor else 1.0)
    damping = 1e-2
    for step in range(_STEPS):
        better, damping = _improve(equations, targets, point, damping, free_factor)
        if better is None:
            break
        gain = 1 - better.misfit / point.misfit
        point = better
        if point.misfit < EXPLAINED / 10 or (step > 10 and gain < 1e-4):
            break
    return point.misfit if point.residual.isfinite().all() else float("inf")


def _at(
    equations: Equations, targets: torch.Tensor, features: torch.Tensor, factor: float
) -> _Point:
    probabilities = (features @ equations.weight.T + equations.bias).softmax(1)
    mass = targets.sum(1, keepdim=True)
    excess = mass * probabilities - targets
    parts = [(excess.T @ features / len(features) / equations.scales[0]).flatten()]
    shared = [equations.weight_gradient.flatten()]
    if equations.bias_gradient is not None:
        parts.append(excess.mean(0) / equations.scales[1])
        shared.append(equations.bias_gradient)
    unscaled = torch.cat(parts)
    residual = factor * unscaled - torch.cat(shared)
    return _Point(features, factor, probabilities, mass, excess, unscaled, residual)


def _improve(
    equations: Equations,
    targets: torch.Tensor,
    point: _Point,
    damping: float,
    free_factor: bool,
) -> tuple[_Point | None, float]:
    """One step of Levenberg and Marquardt, and the damping of the next; None: there is none."""
    jacobian = _jacobian(equations, point)
    if free_factor:
        jacobian = torch.cat([jacobian, point.unscaled[:, None]], dim=1)
    normal, descent = jacobian.T @ jacobian, jacobian.T @ point.residual
    diagonal = normal.diagonal().clamp_min(1e-14)
    for _ in range(6):
        damped = normal + torch.diag(damping * diagonal + 1e-18)
        step, failed = torch.linalg.solve_ex(damped, descent)
        if not failed and step.isfinite().all():
            moved = step[: point.features.numel()].view_as(point.features)
            factor = point.factor - float(step[-1]) if free_factor else point.factor
            better = _at(equations, targets, point.features - moved, factor)
            if factor > 0 and better.misfit < point.misfit:
                return better, max(damping / 5, 1e-12)
        damping *= 4
    return None, damping


def _jacobian(equations: Equations, point: _Point) -> torch.Tensor:
    """Derivative of the residual in the K r coordinates of the features."""
    k, rank = point.features.shape
    weight, p_Kn = equations.weight, point.probabilities
    # How every sample's excess follows its features: K x n x r.
    slope = (point.mass * p_Kn)[:, :, None] * (weight - (p_Kn @ weight)[:, None, :])
    by_features = slope[:, :, None, :] * point.features[:, None, :, None]
    by_features = by_features + point.excess[:, :, None, None] * torch.eye(
        rank, dtype=torch.float64
    )
    rows = [by_features.permute(1, 2, 0, 3).reshape(-1, k * rank) / equations.scales[0]]
    if equations.bias_gradient is not None:
        rows.append(slope.permute(1, 0, 2).reshape(-1, k * rank) / equations.scales[1])
    return torch.cat(rows) * (point.factor / k)
