"""SPEAR: exact recovery of batches from a fully connected ReLU layer (Dimitrov et al. 2024)."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.attacks.parts.first_layer import FirstLayer, first_layer
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import is_default
from core.target import Target

# Singular values below this share of the largest are rounding of the shared gradient.
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5}
# Directions whose cosine is closer to one are the same.
SAME_DIRECTION = 1e-7
# Share of ReLU switches explained, from which on the solution is taken for exact: rounding
# decides some of those that are close to switching.
EXPLAINED = {torch.float64: 0.9999, torch.float32: 0.995}
# Smoothing, relative to the mean entry, at which descents in an estimated space end.
ROUGH = 0.05
NEWTON_STEPS = 30
TRIMMINGS = 5
# Share of its switches that a linear rule explains, below which a direction is wrong.
SEPARABLE = 0.98


@dataclass(frozen=True)
class Factorization:
    """The shared gradient as a product, gradient = left @ right, rank r.

    With dZ the gradient of the layer's outputs (m x r) and X its inputs (r x d), there is
    an invertible Q with dZ = left @ Q and X = Q^-1 @ right.

    Attributes:
        left: m x r, orthonormal columns; rows of neurons that never fire are left out.
        right: r x d.
        live: Which neurons these rows are.
        tolerance: Entries of left @ q, |q| = 1, below this are zeros.
        outputs: m x r, the layer's outputs without bias for the rows of `right` as inputs.
        bias: m.
        explained: Share of ReLU switches that an exact solution explains.
    """

    left: torch.Tensor
    right: torch.Tensor
    live: torch.Tensor
    tolerance: float
    outputs: torch.Tensor
    bias: torch.Tensor
    explained: float

    @property
    def rank(self) -> int:
        """Number of independent images behind the gradient."""
        return self.left.shape[1]


def factorize(layer: FirstLayer, dtype: torch.dtype) -> Factorization:
    """Low-rank decomposition of the layer's weight gradient.

    Args:
        layer: What the client shared of the layer.
        dtype: Precision in which it was shared.

    Source: SPEAR, theorem 3.1.
    """
    gradient = layer.weight_gradient
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    rounding = ROUNDING.get(dtype, 1e-3)
    rank = int((values > rounding * values[0]).sum())
    rest = float(values[rank]) if rank < len(values) else 0.0
    live = gradient.abs().amax(1) > rounding * gradient.abs().max()
    # What rounding does to an entry of left @ q grows with the smallest value kept.
    noise = max(rest / float(values[rank - 1]), 1e-13)
    return Factorization(
        left=left[live, :rank],
        right=values[:rank, None] * right[:rank],
        live=live,
        outputs=layer.weight[live] @ (values[:rank, None] * right[:rank]).T,
        bias=layer.bias[live],
        explained=EXPLAINED.get(dtype, 0.99),
        tolerance=min(10 * noise, 1e-3),
    )


class Pool:
    """Distinct directions q for which left @ q has unusually many zeros.

    Args:
        factors: Decides what a zero is.
    """

    def __init__(self, factors: Factorization) -> None:
        self.factors = factors
        self.directions = factors.left.new_zeros((0, factors.rank))
        self.zeros = torch.zeros(0, dtype=torch.long, device=factors.left.device)

    def add(self, directions: torch.Tensor) -> None:
        """Polish, count zeros, keep what is sparse and new.

        Args:
            directions: k x r unit vectors.
        """
        # Any r - 1 rows have a common zero; more are no accident.
        least = 0 if self.factors.rank == 1 else self.factors.rank + 2
        for rough in directions:
            direction, zeros = self._polish(rough)
            if zeros >= least and not self._knows(direction):
                self.directions = torch.cat([self.directions, direction[None]])
                self.zeros = torch.cat([self.zeros, self.zeros.new_tensor([zeros])])
        sparsest = self.zeros.argsort(descending=True, stable=True)[: 4 * self.factors.rank]
        self.directions, self.zeros = self.directions[sparsest], self.zeros[sparsest]

    def _polish(self, rough: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The exact common zero of the rows on which `rough` nearly vanishes."""
        left, tolerance = self.factors.left, self.factors.tolerance
        near = (left @ rough).abs() <= 100 * tolerance
        if int(near.sum()) < self.factors.rank:
            return rough, int(near.sum())
        direction = torch.linalg.eigh(left[near].T @ left[near])[1][:, 0]
        return direction, int(((left @ direction).abs() <= 10 * tolerance).sum())

    def _knows(self, direction: torch.Tensor) -> bool:
        return bool(((self.directions @ direction).abs() > 1 - SAME_DIRECTION).any())

    def basis(self) -> list[int]:
        """Greedily the sparsest directions that are linearly independent."""
        chosen: list[int] = []
        spanned = self.directions.new_zeros((0, self.factors.rank))
        for index in self.zeros.argsort(descending=True, stable=True).tolist():
            if len(chosen) == self.factors.rank:
                break
            rest = self.directions[index] - spanned.T @ (spanned @ self.directions[index])
            # Once more: of nearly known directions, rounding leaves what is not orthogonal.
            rest = rest - spanned.T @ (spanned @ rest)
            if float(rest.norm()) > 1e-4:
                spanned = torch.cat([spanned, (rest / rest.norm())[None]])
                chosen.append(index)
        return chosen


@dataclass(frozen=True)
class Solution:
    """Inputs that follow from a full set of directions.

    Attributes:
        inputs: r x d inputs of the layer.
        output_gradient: m' x r gradient of its outputs, for live neurons.
        explained: Share of ReLU switches that agree: output positive where its gradient
            is not zero (the paper's sparsity matching coefficient).
    """

    inputs: torch.Tensor
    output_gradient: torch.Tensor
    explained: float


def solve(layer: FirstLayer, factors: Factorization, directions: torch.Tensor) -> Solution:
    """Scale the directions by the bias gradient and read the inputs off.

    Args:
        layer: Weights and bias gradient.
        factors: Factors of the weight gradient.
        directions: r x r, one per row.

    Source: SPEAR, theorem 3.3 (scale) and section 4.3 (sparsity matching).
    """
    sparse = factors.left @ directions.T
    target = layer.bias_gradient[factors.live]
    scale = torch.linalg.lstsq(sparse, target[:, None]).solution[:, 0]
    inputs, failed = torch.linalg.solve_ex(directions.T * scale, factors.right)
    if failed or not torch.isfinite(inputs).all():
        return Solution(torch.zeros_like(factors.right), sparse, 0.0)
    outputs = layer.weight[factors.live] @ inputs.T + layer.bias[factors.live, None]
    switches = (outputs > 0) == (sparse.abs() > 10 * factors.tolerance)
    return Solution(inputs, sparse * scale, float(switches.double().mean()))


def best_solution(layer: FirstLayer, pool: Pool) -> Solution | None:
    """The greedy choice from the pool, improved by exchanges.

    Returns:
        None while the pool does not span all images.

    Source: SPEAR, section 4.3 (two-stage greedy filtering).
    """
    factors = pool.factors
    chosen = pool.basis()
    if len(chosen) < factors.rank:
        return None
    best = solve(layer, factors, pool.directions[chosen])
    spare = [i for i in range(len(pool.directions)) if i not in chosen]
    for candidate in spare:
        if best.explained >= factors.explained:
            break
        for place in _exchangeable(pool, chosen, candidate):
            trial = [*chosen[:place], candidate, *chosen[place + 1 :]]
            solution = solve(layer, factors, pool.directions[trial])
            if solution.explained > best.explained:
                best, chosen = solution, trial
    return best


def _exchangeable(pool: Pool, chosen: list[int], candidate: int) -> list[int]:
    """Places of the basis that the candidate can take without losing rank."""
    basis = pool.directions[chosen].T
    share = torch.linalg.lstsq(basis, pool.directions[candidate][:, None]).solution
    return (share.abs() > 1e-4).nonzero().flatten().tolist()


class _Spear(Attack):
    """What both searches for directions share.

    Args:
        time_budget: Seconds after which the best solution so far is returned.
        batch: Directions that are searched for at once.
    """

    batch: ClassVar[int]

    def __init__(self, time_budget: float = 300.0) -> None:
        self.time_budget = time_budget

    @classmethod
    def configured(cls, given: dict[str, Any]) -> _Spear:
        """With the flags that were given: `--time-budget` counts."""
        budget = given.get("time_budget")
        return cls() if budget is None else cls(budget)

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor,
        device: torch.device,
        seed: int,
        progress: bool = False,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; labels are recovered, `labels` serve where they can't be.

        Raises:
            InputError: No fully connected ReLU layer sees the image, several local steps,
                or noise (or the like) on the gradient.
        """
        began = time.perf_counter()
        layer = first_layer(target, self.name, device)
        factors = self._factors(target, layer)
        generator = torch.Generator(device).manual_seed(seed)
        pool = Pool(factors)
        solution, rounds = None, 0
        with tqdm(total=factors.rank, desc="directions", disable=not progress) as bar:
            while not (solution is not None and solution.explained >= factors.explained):
                if rounds and time.perf_counter() - began > self.time_budget:
                    break
                known = pool.directions
                pool.add(self.search(factors, pool, generator, rounds))
                rounds += 1
                if not torch.equal(pool.directions, known):
                    solution = best_solution(layer, pool)
                bar.update(len(pool.basis()) - bar.n)
        return self._result(target, layer, pool, solution, labels, device, began, rounds)

    @abstractmethod
    def search(
        self, factors: Factorization, pool: Pool, generator: torch.Generator, round_: int
    ) -> torch.Tensor:
        """Propose `k x r` unit vectors that may be columns of Q."""

    def _factors(self, target: Target, layer: FirstLayer) -> Factorization:
        if layer.activation is not nn.ReLU:
            raise InputError(f"--attack {self.name}: needs a ReLU after the layer {layer.name}")
        if not target.local.shares_gradient:
            raise InputError(f"--attack {self.name}: needs the gradient of one local step")
        factors = factorize(layer, target.gradient[f"{layer.name}.weight"].dtype)
        if factors.rank > target.batch_size or len(factors.left) <= factors.rank:
            raise InputError(
                f"--attack {self.name}: the gradient of {layer.name} has rank {factors.rank} "
                f"for {target.batch_size} images and {len(factors.left)} active neurons; noise, "
                "pruning or too narrow a layer hide its structure"
            )
        return factors

    def _result(
        self,
        target: Target,
        layer: FirstLayer,
        pool: Pool,
        solution: Solution | None,
        labels: torch.Tensor,
        device: torch.device,
        began: float,
        rounds: int,
    ) -> Reconstruction:
        exact = solution is not None and solution.explained >= pool.factors.explained
        found = len(pool.basis())
        if solution is None:
            solution = solve(layer, pool.factors, _completed(pool))
        inputs = layer.network_inputs(solution.inputs)
        if exact and is_default(target.loss):
            labels = labels_of_images(target, layer, pool.factors, solution, inputs, labels)
        return closed_form_reconstruction(
            target,
            inputs,
            labels,
            device=device,
            began=began,
            iterations=rounds,
            status="finished" if exact else "time",
            details={
                "rank": pool.factors.rank,
                "directions": found,
                "candidates": len(pool.zeros),
                "switches_explained": solution.explained,
                "exact": exact,
            },
        )


def _completed(pool: Pool) -> torch.Tensor:
    """The directions found, and orthogonal ones in place of those that were not."""
    known = pool.directions[pool.basis()]
    n_missing = pool.factors.rank - len(known)
    rest = torch.linalg.svd(known, full_matrices=True)[2][-n_missing:] if len(known) else None
    identity = torch.eye(pool.factors.rank, dtype=torch.float64, device=pool.zeros.device)
    return identity if rest is None else torch.cat([known, rest])


@register_attack
class Spear(_Spear):
    """Sample submatrices whose common zero is, by luck, an image's output gradient.

    The layer's weight gradient has rank at most the batch size b, and the output gradient
    of each image vanishes where its ReLU does: about half of the neurons. Any b - 1 rows
    of the left factor determine a direction; it is the right one if these neurons are
    all off for one image, which happens with probability b / 2^(b - 1). Sparsity tells,
    the bias gradient gives the scale, and the ReLU switches decide between candidates.

    Exact up to rounding; the time doubles with every image. See `SpearDescent` for a
    faster search.

    Source: Dimitrov, Baader, Mueller, Vechev, "SPEAR: Exact Gradient Inversion of Batches
        in Federated Learning", NeurIPS 2024, https://arxiv.org/abs/2403.03945.

    Published: batches of up to about 25 images of ImageNet exactly, on a GPU (abstract).

    Reproduced:
        spear-8: 1.000 (1.000 to 1.000, n = 8), 2026-11-28: reproduced.
        spear-20: needs a GPU (about 1.5 hours).

    Example:
        python main_run.py --attack spear --checkpoint CHECKPOINT --metric
    """

    name = "spear"
    batch = 4096

    def search(
        self, factors: Factorization, pool: Pool, generator: torch.Generator, round_: int
    ) -> torch.Tensor:
        """Common zeros of random rows, filtered by sparsity."""
        left, rank = factors.left, factors.rank
        if rank == 1:
            return torch.ones_like(left[:1, :1])
        # Keys sorted per trial: rows without replacement.
        keys = torch.rand((self.batch, len(left)), generator=generator, device=left.device)
        rows = left[keys.topk(rank - 1, dim=1).indices]
        kernel, singular = torch.linalg.solve_ex(rows[:, :, :-1], -rows[:, :, -1])
        directions = torch.cat([kernel, torch.ones_like(kernel[:, :1])], dim=1)[singular == 0]
        directions = F.normalize(directions, dim=1)
        values = directions @ left.T
        zeros = (values.abs() <= 10 * factors.tolerance).sum(1)
        return directions[zeros > rank + 2]


@register_attack
class SpearDescent(_Spear):
    """SPEAR with a search that grows gently with the batch: descent to sparse directions.

    The wanted directions are local minima of the l1 norm of left @ q on the sphere, of so
    few dimensions that descents from random starts end in them. Iteratively
    reweighted least squares turns each step into the smallest eigenvector of an r x r
    matrix. Once some directions are known, the search goes on in what an estimate of the
    images' ReLU switches leaves of the space, see `rest_of_space`.

    Everything else is SPEAR's, see `Spear`. This project's own; for the descent compare
    Qu, Sun, Wright, "Finding a sparse vector in a subspace", NIPS 2014,
    https://arxiv.org/abs/1412.4659, and for the reweighting Daubechies, DeVore, Fornasier,
    Guentuerk, 2010, https://arxiv.org/abs/0807.0575.
    """

    name = "spear-descent"
    batch = 64
    shrink = 0.75

    def search(
        self, factors: Factorization, pool: Pool, generator: torch.Generator, round_: int
    ) -> torch.Tensor:
        """End points of descents from random starts, in the rest of the space where it pays."""
        left = factors.left
        coarse = float(left.abs().mean())
        known = pool.directions[pool.basis()]
        # Every other time, so that a wrong direction does not mislead for good.
        rest = rest_of_space(factors, known) if round_ % 2 == 1 else None
        n_free = factors.rank if rest is None else rest.shape[1]
        q = torch.randn(
            (self.batch, n_free), generator=generator, device=left.device, dtype=left.dtype
        )
        if rest is None:
            return self._descend(left, q, coarse, factors.tolerance)
        rough = self._descend(left @ rest, q, coarse, ROUGH * coarse)
        # Nobody knows how good the estimate is: exact data take over at different levels.
        levels = coarse * torch.logspace(-3, -1, len(q), dtype=left.dtype, device=left.device)
        return trim(left, self._descend(left, rough @ rest.T, levels[:, None], factors.tolerance))

    def _descend(
        self,
        left: torch.Tensor,
        starts: torch.Tensor,
        first: torch.Tensor | float,
        last: float,
    ) -> torch.Tensor:
        """Minimise the smoothed l1 norm of left @ q on the sphere, ever less smoothed."""
        q = F.normalize(starts, dim=1)
        smooth = torch.as_tensor(first, dtype=left.dtype, device=left.device)
        while smooth.max() > last:
            weights = ((q @ left.T).square() + smooth**2).rsqrt()
            moments = (left.T[None] * weights[:, None]) @ left
            q = torch.linalg.eigh(moments)[1][:, :, 0]
            smooth = (self.shrink * smooth).clamp_min(0.5 * last)
        return q


def trim(left: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Least trimmed squares: from nearly right directions to exact ones.

    The l1 norm's minimum lies beside the sparsest direction where that is not sparse
    enough; the smallest entries are its zeros all the same.

    Args:
        left: m x r.
        directions: k x r unit vectors; those that are right already stay.
    """
    n_rows = min(2 * left.shape[1], len(left) // 3)
    if n_rows < left.shape[1]:
        return directions
    for _ in range(TRIMMINGS):
        smallest = (directions @ left.T).abs().topk(n_rows, dim=1, largest=False).indices
        rows = left[smallest]
        directions = torch.linalg.eigh(rows.transpose(1, 2) @ rows)[1][:, :, 0]
    return directions


def rest_of_space(factors: Factorization, known: torch.Tensor) -> torch.Tensor | None:
    """An estimate of the space of the unknown directions.

    With a_k the coefficients of image k (rows of Q^-1), q_j a_k = 0 for j other than k:
    the unknown directions are orthogonal to the coefficients of the known images. Of
    these, few are free once most directions are known, and the ReLU switches of image
    k, read off its direction, are as many inequalities for them. Directions whose
    switches cannot be explained so are not those of an image.

    Args:
        factors: Factors of the gradient.
        known: k x r directions.

    Returns:
        r x j orthonormal columns; None where nothing is known, or nothing unknown.
    """
    coefficients, explained = _coefficients(factors, known)
    if (explained < SEPARABLE).any():
        known = known[explained >= SEPARABLE]
        coefficients, _ = _coefficients(factors, known)
    if not 0 < len(known) < factors.rank:
        return None
    return torch.linalg.svd(coefficients, full_matrices=True)[2][len(known) :].T


def _coefficients(factors: Factorization, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimated a_k of every known direction (k x r), and its share of explained switches."""
    coefficients, explained = known.clone(), known.new_zeros(len(known))
    for k in range(len(known)):
        others = torch.cat([known[:k], known[k + 1 :]])
        free = torch.linalg.svd(others, full_matrices=True)[2][len(others) :].T
        switches = (factors.left @ known[k]).abs() > 10 * factors.tolerance
        outputs = factors.outputs @ free
        solution = separate(outputs, factors.bias, switches)
        right = (outputs @ solution + factors.bias > 0) == switches
        coefficients[k], explained[k] = F.normalize(free @ solution, dim=0), right.double().mean()
    return coefficients, explained


def separate(outputs: torch.Tensor, bias: torch.Tensor, switches: torch.Tensor) -> torch.Tensor:
    """y such that `outputs @ y + bias` is positive where a switch is on.

    Logistic regression by Newton's method with a little ridge, in whitened coordinates.
    """
    basis, whiten = torch.linalg.qr(outputs)
    sign = switches.to(outputs) * 2 - 1
    unit = float(bias.square().mean().sqrt()) or 1.0
    basis, bias = basis * len(sign) ** 0.5, bias / unit
    y = torch.zeros_like(basis[0])
    identity = torch.eye(len(y), dtype=y.dtype, device=y.device)
    for step in range(NEWTON_STEPS):
        # Of separable data the logistic loss has no minimum: the ridge gives way slowly.
        ridge = 0.5**step * len(sign)
        off = torch.sigmoid(-sign * (basis @ y + bias))
        gradient = ridge * y - basis.T @ (sign * off)
        curvature = basis.T @ (basis * (off * (1 - off))[:, None]) + ridge * identity
        y = y - torch.linalg.solve(curvature, gradient)
    y = y * unit * len(sign) ** 0.5
    return torch.linalg.solve(whiten, y)


def labels_of_images(
    target: Target,
    layer: FirstLayer,
    factors: Factorization,
    solution: Solution,
    inputs: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Each image's label, from the gradient of the layer's outputs.

    With J_c the gradient of logit c in the layer's outputs and p the softmax, the output
    gradient of an image of class y is (sum_c p_c J_c - J_y) / N.

    Returns:
        N labels; `labels` as they are where the batch holds more images than were solved.
    """
    if len(inputs) < target.batch_size:
        return labels
    logits, jacobian = _logit_jacobian(target, layer.name, inputs)
    mean = torch.einsum("nc,ncm->nm", logits.softmax(1), jacobian)
    predicted = (mean[:, None] - jacobian)[:, :, factors.live]
    actual = solution.output_gradient.T * target.batch_size
    return (predicted - actual[:, None]).norm(dim=2).argmin(1)


def _logit_jacobian(
    target: Target, name: str, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N x c) and their gradients in the layer's outputs (N x c x m)."""
    model = target.build_model().to(inputs)
    outputs: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    logits = model(inputs.reshape(-1, *target.data.shape))
    hook.remove()
    rows = [
        torch.autograd.grad(logits[:, c].sum(), outputs, retain_graph=True)[0]
        for c in range(logits.shape[1])
    ]
    return logits.detach(), torch.stack(rows, 1)
