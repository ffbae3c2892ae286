"""Noise in an update, by the singular values of its matrices.

The gradient of a linear layer is a sum of one outer product per image and local step; a few
images leave most of its singular values at rounding. Noise of one standard deviation lifts them
to the Marchenko-Pastur law, which says that standard deviation. Convolutions are not of low rank,
but their singular values fall steadily, and those of noise do not.

Source: Marchenko and Pastur, Mathematics of the USSR-Sbornik 1(4), 1967, for the law; Gavish and
    Donoho, The Optimal Hard Threshold for Singular Values is 4/sqrt(3), 2014,
    https://arxiv.org/abs/1305.5870, for its use on a matrix of low rank in noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradients.update_traces import Finding, Moved, Trace, as_matrix

# Rows and columns of a matrix that are looked at; singular values of more take long.
_ROWS, _COLUMNS = 128, 512
# The least number of singular values that can show a law, and of elements a deviation.
_FEWEST, _ENOUGH = 4, 30
# How far the largest may lie above the edge, and each from its quantile (in sigma sqrt(n)).
_EDGE, _LAW = 1.1, 0.06
# Standard deviations of tensors under one noise agree as well as that.
_AGREE = 0.07
# Below this share of the largest a singular value may be rounding of float32's arithmetic.
_ARITHMETIC = 1e-5
# The kurtosis of Gaussian noise is 3, of Laplace noise 6.
_LAPLACE_FROM = 4.5
# So much below 3 is no sum of an update and noise.
_LIGHT = 0.2


@dataclass(frozen=True)
class Floor:
    """The noise under one matrix.

    Attributes:
        name: Of the tensor, in the state.
        std: Standard deviation of the noise.
        rank: How many singular values stand above the noise.
        kurtosis: Of what is left without them.
        size: Elements behind the estimate.
        linear: Whether it is a linear layer's, whose rank a few images keep low.
    """

    name: str
    std: float
    rank: int
    kurtosis: float
    size: int
    linear: bool


def sample(matrix: torch.Tensor) -> torch.Tensor:
    """At most 128 rows and 512 columns, evenly spaced, the shorter side first.

    What is left out of a matrix of low rank in noise leaves one of low rank in noise.
    """
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    rows, columns = (-(-n // most) for n, most in zip(matrix.shape, (_ROWS, _COLUMNS), strict=True))
    return matrix[::rows, ::columns]


def floor(tensor: Moved) -> Floor | None:
    """The noise under a tensor; None where its singular values follow no law of noise."""
    if tensor.change.dim() < 2 or float((tensor.change == 0).double().mean()) > 0.01:
        return None
    matrix = sample(tensor.matrix)
    if len(matrix) < _FEWEST:
        return None
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = _signal_rank(values, matrix.shape[1])
    m, n = len(matrix) - (rank or 0), matrix.shape[1] - (rank or 0)
    if rank is None or m < _FEWEST:
        return None
    std = _std(values[rank:], n)
    if std < 4 * tensor.error or not _follows_law(values[rank:] / (std * math.sqrt(n)), n):
        return None
    rest = (left[:, rank:] * values[rank:]) @ right[rank:]
    if _is_decay(rest, sample(as_matrix(tensor.before))):
        return None
    kurtosis = float((rest / rest.square().mean().sqrt()).pow(4).mean())
    return Floor(tensor.name, std, rank, kurtosis, m * n, tensor.change.dim() == 2)


def _is_decay(rest: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether it is the weights themselves: weight decay shrinks them, and they began as noise."""
    scale = float(rest.norm() * before.norm())
    chance = 4 / math.sqrt(rest.numel())
    return scale > 0 and abs(float((rest * before).sum())) > max(0.2, chance) * scale


def _std(values: torch.Tensor, n: int) -> float:
    return float(values.square().sum().sqrt()) / math.sqrt(len(values) * n)


def _signal_rank(values: torch.Tensor, n: int) -> int | None:
    """The smallest number of singular values without which the rest is inside noise's edge."""
    for rank in range(len(values) // 2 + 1):
        m, k = len(values) - rank, n - rank
        edge = _std(values[rank:], k) * (math.sqrt(m) + math.sqrt(k))
        if values[rank] <= _EDGE * edge:
            return rank
    return None


def _follows_law(values: torch.Tensor, n: int) -> bool:
    """Whether descending singular values, in units of sigma sqrt(n), are those of m x n noise."""
    expected = law(len(values), n)
    return float((values - expected).abs().max()) <= _LAW + 0.8 / math.sqrt(n)


def law(m: int, n: int) -> torch.Tensor:
    """The m quantiles of singular values of m x n noise, in sigma sqrt(n), descending (m <= n)."""
    ratio = math.sqrt(m / n)
    s = torch.linspace(1 - ratio, 1 + ratio, 4001, dtype=torch.float64)
    # The density of the square, times 2 s.
    inside = ((1 + ratio) ** 2 - s.square()) * (s.square() - (1 - ratio) ** 2)
    density = inside.clamp(min=0).sqrt() / s.clamp(min=1e-9)
    mass = torch.cumulative_trapezoid(density, s)
    places = (torch.arange(m, dtype=torch.float64) + 0.5) / m * mass[-1]
    return s[torch.searchsorted(mass, places).clamp(max=len(s) - 1)].flip(0)


def noise_finding(tensors: Sequence[Moved], floors: Sequence[Floor]) -> Finding | None:
    """Noise of one standard deviation over all tensors.

    Said for sure where at least two matrices have the same noise under them, and at all where
    one of a linear layer has; no tensor may have less than it. Several steps of Adam fill
    matrices too, with elements of light tails.
    """
    agreeing = max((_agreeing(f, floors) for f in floors), key=_weight, default=[])
    if len(agreeing) < 2 and not any(f.linear for f in agreeing):
        return None
    size = sum(f.size for f in agreeing)
    std = math.sqrt(sum(f.size * f.std**2 for f in agreeing) / size)
    kurtosis = sum(f.size * f.kurtosis for f in agreeing) / size
    light = kurtosis < 3 - max(_LIGHT, 4 * math.sqrt(24 / size))
    if light or any(_quieter(tensor, std) for tensor in tensors):
        return None
    shape = "Gaussian"
    if kurtosis >= _LAPLACE_FROM:
        shape = f"like Laplace's, of scale {std / math.sqrt(2):.4g}"
    names = tuple(f.name for f in agreeing)
    evidence = (
        f"standard deviation {std:.4g} under {len(names)} of {len(tensors)} tensors, by their "
        f"singular values, and no tensor has less; {shape} (kurtosis {kurtosis:.1f})"
    )
    return Finding(Trace.NOISE, len(names) > 1, evidence, std, names)


def _agreeing(one: Floor, floors: Sequence[Floor]) -> list[Floor]:
    def near(other: Floor) -> bool:
        chance = 3 * math.sqrt(0.5 / one.size + 0.5 / other.size)
        return abs(math.log(other.std / one.std)) <= _AGREE + chance

    return [other for other in floors if near(other)]


def _weight(floors: Sequence[Floor]) -> tuple[int, int]:
    return len(floors), sum(f.size for f in floors)


def _quieter(tensor: Moved, std: float) -> bool:
    """Whether a tensor has less noise than all should have."""
    n = tensor.change.numel()
    rms = float(tensor.change.square().mean().sqrt())
    return n >= _ENOUGH and rms < std * (1 - _AGREE - 3 / math.sqrt(2 * n))


def rank_finding(tensors: Sequence[Moved], floors: Sequence[Floor]) -> Finding | None:
    """How many images times steps an update holds at least, by the rank of linear layers.

    Only ranks that are not full count: weight decay fills a matrix with one step. Adam's step
    has a higher rank than its gradient, so that this holds for SGD and is never certain.
    """
    above = {f.name: f.rank for f in floors}
    ranks = {t.name: above.get(t.name, _rank(t)) for t in tensors if t.change.dim() == 2}
    name = max(ranks, key=lambda n: ranks[n], default="")
    if not ranks.get(name):
        return None
    evidence = (
        f"if made by SGD, of at least {ranks[name]} images times steps, the rank of {name}'s "
        "change (times positions, where the layer is applied to several of an image)"
    )
    return Finding(Trace.STEPS, False, evidence, float(ranks[name]), (name,))


def _rank(tensor: Moved) -> int:
    """The numerical rank; 0 where it is full and says nothing."""
    matrix = sample(tensor.matrix)
    values = torch.linalg.svdvals(matrix)
    noise = 2 * tensor.error * sum(math.sqrt(n) for n in matrix.shape)
    rank = int((values > noise + _ARITHMETIC * values[0]).sum())
    return rank if rank < len(values) else 0
