"""Many targets that share one model, each candidate compared with the gradient of its own.

A small network leaves a processor idle between its many small operations. Targets that come
from one model differ in the shared gradient, the labels and what is known of the batch, and in
nothing else: `torch.func.vmap` carries these along the rows, so that one pass forward and
backward serves all rows. Per row it computes what `attack.matching.matcher` computes for one:
the gradient g, the seed v = dD/dg, and the difference of two passes along v (or, where that
does not agree with it, the exact second derivative).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.matching.held_state import buffers_standing
from attack.matching.match import Penalty
from attack.matching.matcher import ACCEPTED_COSINE, CHECK_EVERY, GradientMatcher
from attack.matching.objectives import along_rows, squared_norms
from attack.matching.second_derivative import TwiceDifferentiable
from attack.matching.switches import RecordActivations, ReplayActivations
from core.processes import distributed

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Tensors = list[torch.Tensor]
Parameters = dict[str, torch.Tensor]
# Makes a penalty on the forward pass from what one row's target tells (a list of tensors).
KnowingPenalty = Callable[[Tensors], Callable[[nn.Module], Penalty]]
# Bytes of per-row parameters in one call: the gradient, the moved copy and their products.
BYTES_AT_ONCE = 1 << 28
COPIES = 4


@dataclass
class RowMatches:
    """One evaluation of R rows.

    Attributes:
        values: The objectives (R, float64).
        input_gradient: R x n x C x H x W, of `weight * objective + penalty`.
        label_gradient: R x n x ..., where labels are optimised.
        penalty: The penalties (R); None without one.
        penalty_gradient: The penalties' own part, where it was asked for apart.
    """

    values: torch.Tensor
    input_gradient: torch.Tensor
    label_gradient: torch.Tensor | None = None
    penalty: torch.Tensor | None = None
    penalty_gradient: torch.Tensor | None = None


@dataclass(frozen=True)
class RowPenalty:
    """A penalty on what the model shows, for rows of different targets.

    Attributes:
        make: The penalty from what one target tells.
        known: What every target tells: tensors of T entries each.
        apart: Keep its gradient apart.
    """

    make: KnowingPenalty
    known: Tensors
    apart: bool = False


class ManyTargetsMatcher:
    """The objectives of many targets of one model.

    Args:
        matchers: One per target, of the same model and objective (see `reason_against`).
        penalty: What is added to every row's objective; None for nothing.

    Attributes:
        calls: How often it was called.
        evaluated: Whether a call has come to its end: the model can be batched.

    Example:
        >>> rows = ManyTargetsMatcher([one, other])
        >>> found = rows(inputs, labels, which=[0, 0, 1])
    """

    def __init__(
        self, matchers: Sequence[GradientMatcher], penalty: RowPenalty | None = None
    ) -> None:
        self._matchers, self._penalty = list(matchers), penalty
        first = matchers[0]
        self._replica, self._model = first.replica, first._perturbed
        plain = [p.detach().contiguous() for p in self._replica.parameters]
        self._theta: Parameters = dict(zip(self._replica.names, plain, strict=True))
        shared = zip(*(m.replica.target_gradient for m in matchers), strict=True)
        self._goals = [torch.stack([g.contiguous() for g in each]) for each in shared]
        # What their objectives hold, where that can be stacked as well.
        held = [matcher.objective.held() for matcher in matchers]
        told = [h.tensors for h in held if h is not None and h.is_like(held[0])]
        self._stacks = len(told) == len(held)
        if self._stacks:
            self._goals += [torch.stack(each) for each in zip(*told, strict=True)]
        # The goals of the rows of the last call.
        self._chosen: tuple[tuple[int, ...], Tensors] | None = None
        self.calls, self.evaluated = 0, False
        self._most_at_once: int | None = None

    def __call__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        which: Sequence[int],
        weight: float = 1.0,
    ) -> RowMatches:
        """Evaluate all rows.

        Args:
            inputs: R x n x C x H x W, normalised.
            labels: R x n labels, or R x n x ... variables that are optimised in their place.
            which: The target of every row.
            weight: Factor of the objective in the gradients.

        Raises:
            RuntimeError: The model draws random numbers or moves buffers in its passes.
        """
        with buffers_standing(self._model):
            self._count_call(inputs, labels, which)
            found = self._in_pieces(
                len(inputs), lambda p: self._chunk(inputs[p], labels[p], which[p], weight)
            )
        self.evaluated = True
        return found[0] if len(found) == 1 else _joined(found)

    def _in_pieces(self, n: int, work: Callable[[slice], Result]) -> list[Result]:
        """What `work` gives for pieces of `n` rows, which are halved until memory suffices.

        Raises:
            torch.OutOfMemoryError: One row alone does not fit.
        """
        size = min(n, self._rows_at_once())
        try:
            return [work(slice(i, i + size)) for i in range(0, n, size)]
        except torch.OutOfMemoryError:
            # What activations take is known only when they are there.
            if size == 1:
                raise
            logger.info("%d targets in one call do not fit; trying half as many", size)
            self._most_at_once = size // 2
        # Not within the handler: its traceback keeps what did not fit.
        if self._goals[0].device.type == "cuda":
            torch.cuda.empty_cache()
        return self._in_pieces(n, work)

    def _rows_at_once(self) -> int:
        if self._most_at_once is not None:
            return self._most_at_once
        entries = sum(p.numel() * p.element_size() for p in self._theta.values())
        budget = BYTES_AT_ONCE
        if self._goals[0].device.type == "cuda":
            budget = torch.cuda.mem_get_info(self._goals[0].device)[0] // 4
        return max(1, budget // (COPIES * entries))

    def _chunk(
        self, inputs: torch.Tensor, labels: torch.Tensor, which: Sequence[int], weight: float
    ) -> RowMatches:
        """Rows whose difference is trusted, and those that need the exact derivative."""
        steps = [self._matchers[target].step for target in which]
        exact = [i for i, step in enumerate(steps) if step is None]
        if not exact:
            return self._difference(inputs, labels, which, weight, [s or 0.0 for s in steps])
        others = [i for i in range(len(steps)) if steps[i] is not None]
        parts = [self._exact(inputs[exact], labels[exact], [which[i] for i in exact], weight)]
        if others:
            own = [steps[i] or 0.0 for i in others]
            mine = [which[i] for i in others]
            parts.append(self._difference(inputs[others], labels[others], mine, weight, own))
        order = torch.tensor([*exact, *others]).argsort()
        return _joined(parts, order)

    # -- Choosing the step ---------------------------------------------------------

    def _count_call(self, inputs: torch.Tensor, labels: torch.Tensor, which: Sequence[int]) -> None:
        automatic = self._matchers[0].hvp == "auto"
        if automatic and self.calls % CHECK_EVERY == 0:
            # Of every target its first row, as where it is attacked alone.
            rows = [which.index(target) for target in dict.fromkeys(which)]
            x, y, targets = inputs[rows], labels[rows], [which[row] for row in rows]
            self._in_pieces(len(rows), lambda p: self._calibrate(x[p], y[p], targets[p]))
        self.calls += 1

    def _calibrate(self, inputs: torch.Tensor, labels: torch.Tensor, which: Sequence[int]) -> None:
        """For each target the step whose difference agrees with the second backward pass."""
        exact = self._exact(inputs, labels, which, 1.0, frozen=True).input_gradient
        best = [(-1.0, 0.0)] * len(which)
        for step in self._matchers[0]._steps:
            steps = [step] * len(which)
            found = self._difference(inputs, labels, which, 1.0, steps).input_gradient
            cosines = _cosines(exact, found)
            # A target keeps the first step that will do.
            best = [
                b if b[0] >= ACCEPTED_COSINE else max(b, (cosine, step))
                for b, cosine in zip(best, cosines, strict=True)
            ]
            if all(b[0] >= ACCEPTED_COSINE for b in best):
                break
        for target, (cosine, step) in zip(which, best, strict=True):
            matcher = self._matchers[target]
            matcher.agreement = cosine
            matcher.step = step if cosine >= ACCEPTED_COSINE else None

    # -- Passes --------------------------------------------------------------------

    def _loss(self, parameters: Parameters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._replica.loss(
            lambda z: torch.func.functional_call(self._model, parameters, (z,)), x, y
        )

    def _variables(self, labels: torch.Tensor) -> tuple[int, ...]:
        """Places of what is optimised among (parameters, x, y)."""
        return (1, 2) if self._replica.optimises(labels) else (1,)

    def _known(self, which: Sequence[int]) -> Tensors:
        """What each row's target tells of its batch."""
        known = [] if self._penalty is None else self._penalty.known
        return [tensor[list(which)] for tensor in known]

    def _observed(self, known: Tensors) -> Penalty:
        """Watch the next pass; the result gives the penalty after it."""
        assert self._penalty is not None
        return self._penalty.make(known)(self._model)

    def _difference(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        which: Sequence[int],
        weight: float,
        steps: Sequence[float],
    ) -> RowMatches:
        record = RecordActivations()

        def first(p: Parameters, x: torch.Tensor, y: torch.Tensor) -> Any:
            record.replays.clear()
            record.switches.clear()
            with record:
                loss = self._loss(p, x, y)
            return loss, list(record.switches)

        places = self._variables(labels)
        passes = torch.func.grad(first, argnums=(0, *places), has_aux=True)
        found, switches = torch.func.vmap(passes, in_dims=(None, 0, 0))(self._theta, inputs, labels)
        values, seeds = self._values_and_seeds([found[0][n] for n in self._theta], which)
        moved, scales = self._moved(seeds, steps, weight)
        later, penalty = self._second(moved, inputs, labels, switches, scales, which, record)
        result = [b.sub_(a * along_rows(scales, a)) for a, b in zip(found[1:], later, strict=True)]
        matches = RowMatches(values, *result[:2])
        matches.penalty = penalty
        if self._penalty is not None and self._penalty.apart:
            matches.penalty, matches.penalty_gradient = self._apart(moved, inputs, which)
        return matches

    def _second(
        self,
        moved: Parameters,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        switches: list[Any],
        scales: torch.Tensor,
        which: Sequence[int],
        record: RecordActivations,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Gradients of the scaled loss at the moved parameters, the penalty riding along."""
        rides = self._penalty is not None and not self._penalty.apart

        def second(
            p: Parameters,
            x: torch.Tensor,
            y: torch.Tensor,
            frozen: list[Any],
            scale: torch.Tensor,
            known: Tensors,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            observe = self._observed(known) if rides else None
            with ReplayActivations(record.replays, frozen):
                loss = self._loss(p, x, y) * scale
            extra = loss.new_zeros(()) if observe is None else observe()
            return loss + extra, extra.detach()

        known = self._known(which) if rides else []
        passes = torch.func.grad(second, argnums=self._variables(labels), has_aux=True)
        later, extra = torch.func.vmap(passes)(moved, inputs, labels, switches, scales, known)
        return later, extra if rides else None

    def _apart(
        self, parameters: Parameters, inputs: torch.Tensor, which: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The penalties and their gradients alone."""

        def penalty(p: Parameters, x: torch.Tensor, known: Tensors) -> torch.Tensor:
            observe = self._observed(known)
            with RecordActivations():
                torch.func.functional_call(self._model, p, (x,))
            return observe()

        passes = torch.func.grad_and_value(penalty, argnums=1)
        gradient, value = torch.func.vmap(passes)(parameters, inputs, self._known(which))
        return value, gradient

    def _exact(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        which: Sequence[int],
        weight: float,
        frozen: bool = False,
    ) -> RowMatches:
        """By a second backward pass; with `frozen` on the switches of a first one."""
        record, switches = RecordActivations(), []
        if frozen:
            switches = self._switches(record, inputs)
        penalised = self._penalty is not None and not frozen

        def loss(p: Parameters, x: torch.Tensor, y: torch.Tensor, kept: list[Any]) -> torch.Tensor:
            # Either mode leaves running statistics alone, which a batched pass may not write.
            mode = ReplayActivations(record.replays, kept) if frozen else RecordActivations()
            with mode:
                return self._loss(p, x, y)

        def along(
            x: torch.Tensor, y: torch.Tensor, kept: list[Any], seed: Parameters
        ) -> torch.Tensor:
            gradient = torch.func.grad(loss)(self._theta, x, y, kept)
            return torch.stack([(gradient[n] * seed[n]).sum() for n in self._theta]).sum()

        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
            gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(
                self._theta, inputs, labels, switches
            )
            values, seeds = self._values_and_seeds([gradients[n] for n in self._theta], which)
            seed = {n: s * weight for n, s in zip(self._theta, seeds, strict=True)}
            places = tuple(place - 1 for place in self._variables(labels))
            result = torch.func.vmap(torch.func.grad(along, argnums=places))(
                inputs, labels, switches, seed
            )
        matches = RowMatches(values, *result[:2])
        if penalised:
            rows = {n: t.expand(len(inputs), *t.shape) for n, t in self._theta.items()}
            matches.penalty, alone = self._apart(rows, inputs, which)
            if self._penalty is not None and self._penalty.apart:
                matches.penalty_gradient = alone
            else:
                matches.input_gradient = matches.input_gradient + alone
        return matches

    def _switches(self, record: RecordActivations, inputs: torch.Tensor) -> list[Any]:
        def watched(x: torch.Tensor) -> list[Any]:
            record.replays.clear()
            record.switches.clear()
            with record:
                torch.func.functional_call(self._model, self._theta, (x,))
            return list(record.switches)

        with torch.no_grad():
            found: list[Any] = torch.func.vmap(watched)(inputs)
        return found

    # -- The objectives ------------------------------------------------------------

    def _values_and_seeds(
        self, gradients: Tensors, which: Sequence[int]
    ) -> tuple[torch.Tensor, Tensors]:
        """Objectives (R) and their derivatives in the gradients (R x ...)."""
        if self._stacks:
            objective, goals = self._matchers[0].objective, self._goals_of(tuple(which))
            shared, held = goals[: len(gradients)], goals[len(gradients) :]
            return objective.values_and_seeds_holding(gradients, shared, held)
        values, seeds = [], []
        for row, target in enumerate(which):
            mine = [goal[target] for goal in self._goals]
            own = self._matchers[target].objective
            value, seed = own.value_and_seed([g[row] for g in gradients], mine)
            values.append(value.double())
            seeds.append(seed)
        return torch.stack(values), [torch.stack(each) for each in zip(*seeds, strict=True)]

    def _goals_of(self, which: tuple[int, ...]) -> Tensors:
        """The target gradient of every row, then what its objective holds.

        They are copied anew only where rows have changed.
        """
        first = which[0]
        if which == tuple(range(first, first + len(which))):
            return [goal[first : first + len(which)] for goal in self._goals]
        if self._chosen is None or self._chosen[0] != which:
            rows = torch.as_tensor(which, device=self._goals[0].device)
            self._chosen = which, [goal[rows] for goal in self._goals]
        return self._chosen[1]

    def _moved(
        self, seeds: Tensors, steps: Sequence[float], weight: float
    ) -> tuple[Parameters, torch.Tensor]:
        """Every row's theta + h v, and its weight / h."""
        lengths = squared_norms(seeds).sqrt()
        wanted = lengths.new_tensor(steps) * self._matchers[0]._theta_norm
        h = wanted / lengths.clamp_min(1e-30)
        moved = {
            n: seed.mul_(along_rows(h, seed)).add_(theta)
            for (n, theta), seed in zip(self._theta.items(), seeds, strict=True)
        }
        return moved, (weight / h).to(seeds[0].dtype)


def reason_against(matchers: Sequence[GradientMatcher]) -> str | None:
    """Why these targets cannot be rows of one call; None where they can.

    Args:
        matchers: One per target.
    """
    first = matchers[0]
    kinds = {type(matcher) for matcher in matchers}
    if kinds != {GradientMatcher}:
        return "their passes are compiled, lowered or of another kind"
    if any(matcher.clipping or matcher._clips for matcher in matchers):
        return "the attacker clips every image alone"
    if any(m.replica.groups is not None for m in matchers) or distributed.world_size() > 1:
        return "the batch is spread over shards or processes"
    if not all(matcher.replica.local.shares_gradient for matcher in matchers):
        return "they come from several local steps"
    if not all(matcher.replica.client_loss.batchable for matcher in matchers):
        return "their loss cannot be batched"
    if any(not same_model(first, matcher) for matcher in matchers[1:]):
        return "they do not come from one model"
    return None


def same_model(a: GradientMatcher, b: GradientMatcher) -> bool:
    """Whether parameters, buffers and mode are the same."""
    if a.replica.names != b.replica.names or a.hvp != b.hvp:
        return False
    mine, other = (m.replica.model.state_dict() for m in (a, b))
    return (
        a.replica.model.training == b.replica.model.training
        and mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) for name in mine)
    )


def _cosines(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Cosine of each row; 1 of two that are zero."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    lengths = x.norm(dim=1) * y.norm(dim=1)
    both_zero = (x.norm(dim=1) == y.norm(dim=1)) & (lengths == 0)
    cosines = (x * y).sum(1) / lengths.clamp_min(1e-300)
    found: list[float] = torch.where(both_zero, torch.ones_like(cosines), cosines).tolist()
    return found


def _joined(parts: Sequence[RowMatches], order: torch.Tensor | None = None) -> RowMatches:
    """Rows of several calls, in an order."""

    def join(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        whole = torch.cat(values)
        return whole if order is None else whole[order]

    values, gradient = join("values"), join("input_gradient")
    assert values is not None
    assert gradient is not None
    rest = [join(name) for name in ("label_gradient", "penalty", "penalty_gradient")]
    return RowMatches(values, gradient, *rest)
