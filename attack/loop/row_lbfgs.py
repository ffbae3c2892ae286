"""L-BFGS on many problems at once: the rows of one matrix, each with a memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Defaults of `torch.optim.LBFGS`.
MAX_ITER = 20
HISTORY = 100
TOLERANCE_GRAD = 1e-7
TOLERANCE_CHANGE = 1e-9
# Smallest product of a step and the change of the gradient along it that is remembered.
CURVATURE = 1e-10
# Rows that a memory has room for at first; it doubles where they are filled.
FIRST_ROOM = 4

# Objectives (K) and gradients (K x n) of some rows where they stand now.
Evaluate = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Memory:
    """The last steps of every row, and how the gradient changed along them, in two rings.

    Attributes:
        steps: R x H x n.
        changes: R x H x n, of the gradient.
        ro: R x H, 1 / <change, step>.
        count: R, entries that are filled.
        newest: R, place of the newest entry.
    """

    steps: torch.Tensor
    changes: torch.Tensor
    ro: torch.Tensor
    count: torch.Tensor
    newest: torch.Tensor

    @classmethod
    def empty(cls, rows: int, like: torch.Tensor) -> _Memory:
        """Of rows of the length of `like`."""
        shape = (rows, FIRST_ROOM, like.numel())
        steps, changes = like.new_zeros(shape), like.new_zeros(shape)
        count = torch.zeros(rows, dtype=torch.long, device=like.device)
        return cls(steps, changes, like.new_zeros(shape[:2]), count, count - 1)

    def push(
        self, rows: torch.Tensor, step: torch.Tensor, change: torch.Tensor, ro: torch.Tensor
    ) -> None:
        """Remember a step of some rows; the oldest goes where a memory is full."""
        room = self.steps.shape[1]
        if room < HISTORY and bool((self.count[rows] == room).any()):
            self._double()
        room = self.steps.shape[1]
        self.newest[rows] = (self.newest[rows] + 1) % room
        at = self.newest[rows]
        self.steps[rows, at], self.changes[rows, at], self.ro[rows, at] = step, change, ro
        self.count[rows] = (self.count[rows] + 1).clamp_max(room)

    def _double(self) -> None:
        """Make room; as long as there is some left, the first entry is the oldest."""
        more = min(HISTORY, 2 * self.steps.shape[1]) - self.steps.shape[1]
        self.steps, self.changes, self.ro = (
            torch.cat([kept, torch.zeros_like(kept[:, :more])], 1)
            for kept in (self.steps, self.changes, self.ro)
        )

    def times_inverse(
        self, rows: torch.Tensor, vectors: torch.Tensor, diagonal: torch.Tensor
    ) -> torch.Tensor:
        """Vectors (K x n) times the approximate inverse Hessian of these rows.

        Args:
            rows: K of them.
            vectors: One for each.
            diagonal: K factors of the identity that stand at the beginning.

        Source: Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4.
        """
        count, newest = self.count[rows], self.newest[rows]
        ages = range(int(count.max()) if len(rows) else 0)
        room = self.steps.shape[1]
        q, factors = vectors.clone(), []
        for age in ages:
            at = (newest - age) % room
            # Of entries that a row lacks nothing is taken.
            ro = torch.where(age < count, self.ro[rows, at], 0)
            factors.append(_dot(self.steps[rows, at], q) * ro)
            q.addcmul_(self.changes[rows, at], -factors[-1].unsqueeze(1))
        q.mul_(diagonal.unsqueeze(1))
        for age in reversed(ages):
            at = (newest - age) % room
            ro = torch.where(age < count, self.ro[rows, at], 0)
            back = torch.where(age < count, factors[age] - _dot(self.changes[rows, at], q) * ro, 0)
            q.addcmul_(self.steps[rows, at], back.unsqueeze(1))
        return q


class RowLBFGS:
    """What `torch.optim.LBFGS` without a line search does, on R problems side by side.

    Each row's iterates, its memory and the end of its inner iterations are those that it would
    have alone, up to rounding.

    Args:
        states: Of every row, the state that an optimizer of its own keeps; empty at the beginning.
        like: Any row of the variables (n).

    Source: Liu and Nocedal, On the limited memory BFGS method, Mathematical Programming 45, 1989.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]], like: torch.Tensor) -> None:
        rows = len(states)
        self._memory = _Memory.empty(rows, like)
        self._n_iter = torch.zeros(rows, dtype=torch.long, device=like.device)
        self._evaluations = [0] * rows
        self._direction, self._old_gradient = (like.new_zeros(rows, like.numel()) for _ in "ab")
        self._length, self._diagonal = like.new_zeros(rows), like.new_ones(rows)
        self._old_loss = torch.zeros(rows, dtype=torch.float64, device=like.device)
        self._gradient = torch.zeros_like(self._direction)
        for row, state in enumerate(states):
            if state:
                self._load(row, state)

    def forget(self, row: int) -> None:
        """Begin a row anew."""
        self._n_iter[row] = 0
        self._memory.count[row] = 0
        self._memory.newest[row] = -1
        self._evaluations[row] = 0

    def step(self, variables: torch.Tensor, rates: torch.Tensor, evaluate: Evaluate) -> None:
        """Up to `MAX_ITER` inner iterations of every row.

        Args:
            variables: R x n, changed in place before every evaluation.
            rates: R step lengths.
            evaluate: Objectives and gradients of some rows where they stand; of a row whose
                objective is not finite the gradient before it counts.
        """
        everyone = torch.arange(len(variables), device=variables.device)
        loss = torch.zeros_like(self._old_loss)
        self._evaluate(everyone, evaluate, loss)
        going = everyone[~(self._gradient.abs().amax(1) <= TOLERANCE_GRAD)]
        for inner in range(MAX_ITER):
            if not len(going):
                return
            self._set_direction(going, rates)
            self._old_gradient[going] = self._gradient[going]
            self._old_loss[going] = loss[going]
            slopes = _dot(self._gradient[going], self._direction[going])
            going = going[~(slopes > -TOLERANCE_CHANGE)]
            moves = self._direction[going] * self._length[going].unsqueeze(1)
            variables[going] += moves
            if inner + 1 == MAX_ITER or not len(going):
                return
            self._evaluate(going, evaluate, loss)
            ended = self._gradient[going].abs().amax(1) <= TOLERANCE_GRAD
            ended |= moves.abs().amax(1) <= TOLERANCE_CHANGE
            ended |= (loss[going] - self._old_loss[going]).abs() < TOLERANCE_CHANGE
            going = going[~ended]

    def _evaluate(self, rows: torch.Tensor, evaluate: Evaluate, loss: torch.Tensor) -> None:
        chosen = rows.tolist()
        values, gradients = evaluate(chosen)
        for row in chosen:
            self._evaluations[row] += 1
        loss[rows] = values.to(loss)
        finite = torch.isfinite(values.to(loss))
        self._gradient[rows[finite]] = gradients[finite]

    def _set_direction(self, rows: torch.Tensor, rates: torch.Tensor) -> None:
        """The direction and length of the next step, from what the last one taught."""
        self._n_iter[rows] += 1
        first = self._n_iter[rows] == 1
        new, old = rows[first], rows[~first]
        if len(new):
            self._direction[new] = -self._gradient[new]
            inverse = 1 / self._gradient[new].abs().sum(1)
            self._length[new] = torch.where(inverse < 1, inverse, 1) * rates[new]
            self._diagonal[new] = 1
        if len(old):
            self._learn(old)
            self._direction[old] = self._memory.times_inverse(
                old, -self._gradient[old], self._diagonal[old]
            )
            self._length[old] = rates[old]

    def _learn(self, rows: torch.Tensor) -> None:
        change = self._gradient[rows] - self._old_gradient[rows]
        step = self._direction[rows] * self._length[rows].unsqueeze(1)
        curvature = _dot(change, step)
        kept = curvature > CURVATURE
        change, step, curvature = change[kept], step[kept], curvature[kept]
        if len(curvature):
            self._memory.push(rows[kept], step, change, 1 / curvature)
            self._diagonal[rows[kept]] = curvature / _dot(change, change)

    # -- The state of one row, as torch keeps it -----------------------------------

    def state_of(self, row: int) -> dict[str, Any]:
        """What `torch.optim.LBFGS` on this row alone would keep."""
        if not self._evaluations[row]:
            return {}
        state: dict[str, Any] = {
            "func_evals": self._evaluations[row],
            "n_iter": int(self._n_iter[row]),
        }
        if not state["n_iter"]:
            return state
        memory, room = self._memory, self._memory.steps.shape[1]
        count, newest = int(memory.count[row]), int(memory.newest[row])
        places = [(newest - age) % room for age in reversed(range(count))]
        return state | {
            "d": self._direction[row].clone(),
            "t": self._length[row].clone(),
            "old_dirs": [memory.changes[row, place].clone() for place in places],
            "old_stps": [memory.steps[row, place].clone() for place in places],
            "ro": [memory.ro[row, place].clone() for place in places],
            "H_diag": self._diagonal[row].clone(),
            "prev_flat_grad": self._old_gradient[row].clone(),
            "prev_loss": float(self._old_loss[row]),
        }

    def _load(self, row: int, state: Mapping[str, Any]) -> None:
        self._evaluations[row] = state["func_evals"]
        self._n_iter[row] = state["n_iter"]
        if state.get("d") is None:
            return
        self._direction[row], self._old_gradient[row] = state["d"], state["prev_flat_grad"]
        self._length[row], self._diagonal[row] = float(state["t"]), float(state["H_diag"])
        self._old_loss[row] = state["prev_loss"]
        at = torch.tensor([row], device=self._direction.device)
        entries = zip(state["old_stps"], state["old_dirs"], state["ro"], strict=True)
        for step, change, ro in entries:
            self._memory.push(at, step, change, ro)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows (K x n each): K numbers."""
    return (a * b).sum(1)
