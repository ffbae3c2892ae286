"""Distances between a gradient and the target gradient, with their derivative.

An objective works on lists of tensors, one per shared parameter. It returns its
value and its derivative in the first list (the seed of the second backward pass),
computed without a graph, so that matching never differentiates through it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Tensors = list[torch.Tensor]
# Entries that are taken at once on a CPU: three such pieces stay in its cache.
PIECE = 1 << 16
# Likewise of a row, by a norm, which keeps fewer sums beside each other than a product.
ROW_PIECE = 1 << 14
# Norms below this count as zero; its reciprocal still fits float32.
TINY = 1e-30
# Share of the value that products of float32 gradients must leave to be trusted.
CANCELLATION = 1e-4


@dataclass(frozen=True)
class Products:
    """Inner products of a gradient g and the target gradient t.

    Attributes:
        gg: <g, g>.
        gt: <g, t>.
        tt: <t, t>.
    """

    gg: float
    gt: float
    tt: float


@dataclass(frozen=True)
class AffineSeed:
    """An objective whose derivative is a combination of g and t.

    Attributes:
        value: Value of the objective.
        on_gradient: Factor of g in the derivative.
        on_target: Factor of t.
        length: Norm of the derivative.
    """

    value: float
    on_gradient: float
    on_target: float
    length: float


@dataclass(frozen=True)
class Held:
    """What an objective knows of the one target that it compares with.

    Attributes:
        kind: Equal for objectives that differ in the tensors alone.
        tensors: Of that target.
    """

    kind: tuple[object, ...]
    tensors: Tensors = field(default_factory=list)

    def is_like(self, other: Held | None) -> bool:
        """Whether another one's tensors could stand in the place of these."""
        if other is None or self.kind != other.kind:
            return False
        return [t.shape for t in self.tensors] == [t.shape for t in other.tensors]


class Objective(abc.ABC):
    """How far a gradient is from the target gradient."""

    @abc.abstractmethod
    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """The value as a differentiable scalar.

        Args:
            gradient: One tensor per shared parameter.
            target: The same shapes.
        """

    def value_and_seed(self, gradient: Tensors, target: Tensors) -> tuple[torch.Tensor, Tensors]:
        """The value and its derivative in `gradient`; by autograd unless overridden."""
        leaves = [g.detach().requires_grad_() for g in gradient]
        with torch.enable_grad():
            value = self.distance(leaves, target)
            seed = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), [
            torch.zeros_like(g) if s is None else s for g, s in zip(leaves, seed, strict=True)
        ]

    def values_and_seeds(
        self, gradients: Tensors, targets: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """The same for R gradients, each with a target of its own.

        Args:
            gradients: R x ... per shared parameter.
            targets: The same shapes.

        Returns:
            R values in float64, and derivatives of the gradients' shapes.
        """
        seeds, values = torch.func.vmap(torch.func.grad_and_value(self.distance))(
            gradients, targets
        )
        return values.double(), list(seeds)

    def held(self) -> Held | None:
        """What it knows of its one target; None where that is more than tensors."""
        return Held((type(self),))

    def values_and_seeds_holding(
        self, gradients: Tensors, targets: Tensors, held: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """Like `values_and_seeds`, where R objectives of one kind hold different tensors.

        Args:
            gradients: R x ... per shared parameter.
            targets: The same shapes.
            held: What each of them holds (see `held`), R x ... each.
        """
        return self.values_and_seeds(gradients, targets)

    def affine_seed(self, products: Products) -> AffineSeed | None:
        """Value and derivative from inner products alone, where that is possible.

        It spares the sweeps over all parameters of `value_and_seed`.

        Returns:
            None where the objective is not such, or where its value is so small that
            the difference of products would have lost its digits.
        """
        return None


def squared_norms(rows: Tensors) -> torch.Tensor:
    """Sum of squares of each of R rows over all its tensors (R x ...): R values in float64.

    Like `inner_product`, only short pieces are summed in their own precision. A norm reads its
    entries once and writes nothing, which a sum of squares does not.
    """
    pieces = [piece for t in rows for piece in t.flatten(1).split(ROW_PIECE, dim=1)]
    norms = torch.stack([torch.linalg.vector_norm(piece, dim=1) for piece in pieces])
    return norms.double().square().sum(0)


def along_rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value per row, in the type of a tensor of rows and broadcast over it."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def squared_norm(tensors: Tensors) -> torch.Tensor:
    """Sum of squares over all entries, a scalar in float64; see `inner_product`."""
    return inner_product(tensors, tensors)


def inner_product(a: Tensors, b: Tensors) -> torch.Tensor:
    """Inner product over all entries, a scalar in float64.

    Only short pieces are summed in their own precision: over millions of float32 entries a
    running sum, such as PyTorch's norm on a CPU, is wrong in the fourth digit, and a nearly
    solved inversion lives on the sixth.
    """
    flat = [[t.flatten() for t in tensors] for tensors in (a, b)]
    dots = [x.dot(y) for x, y in zip(*(pieces_of(f) for f in flat), strict=True)]
    return torch.stack(dots).double().sum()


def pieces_of(tensors: Tensors) -> Tensors:
    """One-dimensional views of all entries, in memory order.

    On a CPU a piece fits the cache, so that several operations on it cost one pass over
    the memory; on a GPU, where a launch costs more, a piece is a whole tensor.

    Args:
        tensors: Dense, in any layout. The pieces of others of the same shapes and layouts
            match these.
    """
    pieces: Tensors = []
    for tensor in tensors:
        size = tensor.numel()
        flat = tensor if tensor.dim() == 1 else tensor.as_strided((size,), (1,))
        if size <= PIECE or tensor.device.type != "cpu":
            pieces.append(flat)
        else:
            pieces.extend(flat.split(PIECE))
    return pieces


def products_with(gradient: Tensors, target: Tensors) -> tuple[float, float]:
    """<g, g> and <g, t>, each entry read once from memory; pieces are added in float64.

    Args:
        gradient: Its pieces, see `pieces_of`.
        target: Those of the shared gradient.
    """
    dots = [
        product for g, t in zip(gradient, target, strict=True) for product in (g.dot(g), g.dot(t))
    ]
    gg, gt = torch.stack(dots).double().view(-1, 2).sum(0).tolist()
    return gg, gt


class Cosine(Objective):
    """1 - cos(g, t), the objective of Inverting Gradients (`sim`).

    It is evaluated as |g/|g| - t/|t||^2 / 2, which is the same number without the
    cancellation of 1 - (nearly 1).

    Source: Geiping et al., Inverting Gradients, NeurIPS 2020, eq. 4,
    https://arxiv.org/abs/2003.14053.
    """

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        g_norm = torch.stack([g.square().sum().double() for g in gradient]).sum().sqrt()
        t_norm = torch.stack([t.square().sum().double() for t in target]).sum().sqrt()
        terms = [
            (g / g_norm.to(g.dtype) - t / t_norm.to(t.dtype)).square().sum().double()
            for g, t in zip(gradient, target, strict=True)
        ]
        return torch.stack(terms).sum() / 2

    def value_and_seed(self, gradient: Tensors, target: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Analytic: with unit vectors u, w the derivative is ((1 - D) u - w) / |g|.

        Where the gradient vanishes, as a saturated model's does, it has no direction, and the
        derivative is zero.
        """
        g_norm, t_norm = (float(squared_norm(x).sqrt()) for x in (gradient, target))
        g_norm, t_norm = g_norm if g_norm > TINY else math.inf, max(t_norm, TINY)
        # One list of new tensors: u - w, from which the derivative is D u away.
        seed = list(torch._foreach_mul(gradient, 1 / g_norm))
        torch._foreach_add_(seed, target, alpha=-1 / t_norm)
        value = squared_norm(seed) / 2
        torch._foreach_add_(seed, gradient, alpha=-float(value) / g_norm)
        torch._foreach_mul_(seed, 1 / g_norm)
        return value, seed

    def values_and_seeds(
        self, gradients: Tensors, targets: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `Objective.values_and_seeds`; as in `value_and_seed`."""
        g_norm, t_norm = (squared_norms(x).sqrt() for x in (gradients, targets))
        g_norm, t_norm = torch.where(g_norm > TINY, g_norm, math.inf), t_norm.clamp_min(TINY)
        seeds = [
            torch.mul(g, along_rows(1 / g_norm, g)).addcmul_(t, along_rows(-1 / t_norm, t))
            for g, t in zip(gradients, targets, strict=True)
        ]
        values = squared_norms(seeds) / 2
        for seed, g in zip(seeds, gradients, strict=True):
            seed.addcmul_(g, along_rows(-values / g_norm, g)).mul_(along_rows(1 / g_norm, g))
        return values, seeds

    def affine_seed(self, products: Products) -> AffineSeed | None:
        """See `Objective.affine_seed`; ((1 - D) u - w) / |g| is sin(g, t) / |g| long."""
        if products.gg <= 0 or products.tt <= 0:
            return None
        g_norm, t_norm = math.sqrt(products.gg), math.sqrt(products.tt)
        cosine = products.gt / (g_norm * t_norm)
        if not 1 - cosine > CANCELLATION:
            return None
        length = math.sqrt(max(0.0, 1 - cosine**2)) / g_norm
        return AffineSeed(1 - cosine, cosine / products.gg, -1 / (g_norm * t_norm), length)


class L2(Objective):
    """Sum of squared differences, the objective of DLG (`L2`).

    Source: Zhu et al., Deep Leakage from Gradients, NeurIPS 2019, eq. 4,
    https://arxiv.org/abs/1906.08935.
    """

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        terms = [(g - t).square().sum().double() for g, t in zip(gradient, target, strict=True)]
        return torch.stack(terms).sum()

    def value_and_seed(self, gradient: Tensors, target: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Analytic: the derivative is 2 (g - t)."""
        difference = list(torch._foreach_sub(gradient, target))
        value = squared_norm(difference)
        torch._foreach_mul_(difference, 2.0)
        return value, difference

    def values_and_seeds(
        self, gradients: Tensors, targets: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `Objective.values_and_seeds`."""
        seeds = list(torch._foreach_sub(gradients, targets))
        values = squared_norms(seeds)
        torch._foreach_mul_(seeds, 2.0)
        return values, seeds

    def affine_seed(self, products: Products) -> AffineSeed | None:
        """See `Objective.affine_seed`."""
        value = products.gg - 2 * products.gt + products.tt
        if not value > CANCELLATION * max(products.gg, products.tt):
            return None
        return AffineSeed(value, 2.0, -2.0, 2 * math.sqrt(value))


class SquaredAndAbsolute(Objective):
    """Squared distance and a tenth of the absolute one (`L2+L1`), the objective of TAG.

    Source: Deng et al., TAG, Findings of EMNLP 2021, eq. 4, https://arxiv.org/abs/2103.06819.
    """

    share = 0.1

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        terms = [
            ((g - t).square().sum() + self.share * (g - t).abs().sum()).double()
            for g, t in zip(gradient, target, strict=True)
        ]
        return torch.stack(terms).sum()


class LayerNorms(Objective):
    """Sum over layers of the Euclidean distance (`layer-L2`): large layers do not dominate.

    Source: GradInversion (Yin et al. 2021), eq. 2, https://arxiv.org/abs/2104.07586; its
    authors compute it so in the attack of Hatamizadeh et al. (2022).
    """

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        tiny = torch.finfo(gradient[0].dtype).tiny
        terms = [
            ((g - t).square().sum() + tiny).sqrt().double()
            for g, t in zip(gradient, target, strict=True)
        ]
        return torch.stack(terms).sum()

    def values_and_seeds(
        self, gradients: Tensors, targets: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `Objective.values_and_seeds`; a layer's derivative is (g - t) / |g - t|."""
        tiny = torch.finfo(gradients[0].dtype).tiny
        seeds = list(torch._foreach_sub(gradients, targets))
        lengths = [(squared_norms([seed]) + tiny).sqrt() for seed in seeds]
        for seed, length in zip(seeds, lengths, strict=True):
            seed.mul_(along_rows(1 / length, seed))
        return torch.stack(lengths).sum(0), seeds


class LayerMeanCosine(Objective):
    """Mean over layers of each layer's own 1 - cos: every layer counts the same."""

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        cosine = Cosine()
        terms = [cosine.distance([g], [t]) for g, t in zip(gradient, target, strict=True)]
        return torch.stack(terms).mean()


class LayerWeighted(Objective):
    """Another objective on layers that are scaled first; a weight of 0 leaves one out.

    Args:
        objective: The distance that is computed on the scaled layers.
        weights: One factor per shared parameter.
    """

    def __init__(self, objective: Objective, weights: Sequence[float]) -> None:
        self.objective = objective
        self.weights = tuple(weights)

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        return self.objective.distance(self._scale(gradient), self._scale(target))

    def value_and_seed(self, gradient: Tensors, target: Tensors) -> tuple[torch.Tensor, Tensors]:
        """The chain rule scales the inner objective's derivative once more."""
        value, inner = self.objective.value_and_seed(self._scale(gradient), self._scale(target))
        return value, self._pulled_back(inner, gradient)

    def values_and_seeds(
        self, gradients: Tensors, targets: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `Objective.values_and_seeds`; as in `value_and_seed`."""
        scaled = self._scale(gradients), self._scale(targets)
        values, inner = self.objective.values_and_seeds(*scaled)
        return values, self._pulled_back(inner, gradients)

    def _pulled_back(self, inner: Tensors, like: Tensors) -> Tensors:
        """Derivatives in all layers from those in the scaled ones."""
        kept = [i for i, weight in enumerate(self.weights) if weight != 0]
        seed = [torch.zeros_like(g) for g in like]
        for i, s in zip(kept, inner, strict=True):
            seed[i] = s * self.weights[i]
        return seed

    def _scale(self, tensors: Tensors) -> Tensors:
        if len(tensors) != len(self.weights):
            raise ValueError(f"{len(self.weights)} layer weights for {len(tensors)} parameters")
        return [w * t for w, t in zip(self.weights, tensors, strict=True) if w != 0]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "sim": Cosine,
    "L2": L2,
    "L2+L1": SquaredAndAbsolute,
    "layer-sim": LayerMeanCosine,
    "layer-L2": LayerNorms,
}


def layer_weights(n: int, kind: str) -> list[float]:
    """Weights for `LayerWeighted` by depth.

    Args:
        n: Number of shared parameters.
        kind: "linear" (later layers count more, up to twice the mean), "exp"
            (each counts less than the one before it), "decay" (the squares fall by e from
            each pair of weight and bias to the next, as in Dimitrov et al. 2022) or
            "first:K" / "last:K" (only these parameters).

    Raises:
        ValueError: Unknown kind, or none of the parameters.
    """
    name, _, count = kind.partition(":")
    if name == "linear":
        return [2 * (i + 1) / (n + 1) for i in range(n)]
    if name == "exp":
        return [0.5 ** (i / max(1, n / 4)) for i in range(n)]
    if name == "decay":
        return [math.exp(-(i // 2) / 2) for i in range(n)]
    if name in ("first", "last") and count.isdigit() and int(count) > 0:
        chosen = range(int(count)) if name == "first" else range(n - int(count), n)
        return [1.0 if i in chosen else 0.0 for i in range(n)]
    raise ValueError(f"unknown layer weights {kind}; known: linear, exp, decay, first:K, last:K")
