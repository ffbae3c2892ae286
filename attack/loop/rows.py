"""Restarts of several targets as rows of one stack, and the optimizers that move all rows."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attack.loop.row_lbfgs import RowLBFGS

if TYPE_CHECKING:
    from attack.loop.restarts import Restart

Tensors = list[torch.Tensor]
# Of `torch.optim.Adam`.
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Part:
    """Some of the rows, as they stand.

    Attributes:
        places: Their numbers among all rows.
        which: The target of each.
        restarts: The restart of each.
        variable: K x n x C x H x W coordinates.
        labels: K x n labels, or the optimised variables in their place.
    """

    places: Sequence[int]
    which: list[int]
    restarts: list[Restart]
    variable: torch.Tensor
    labels: torch.Tensor


# What is minimised in each of K rows (float64), and its gradients in the variables.
Evaluate = Callable[[Part], tuple[torch.Tensor, Tensors]]


class Rows(abc.ABC):
    """Restarts of several targets as rows of stacks, of which their tensors are views.

    Args:
        members: The target of each row, and its restart.
        labels: Of each target, n labels, where they are not optimised.

    Attributes:
        which: The target of each row.
        restarts: The restart of each row.
        variable: R x n x C x H x W coordinates.
        labels: R x n labels, or the optimised variables in their place.
    """

    def __init__(self, members: Sequence[tuple[int, Restart]], labels: Tensors) -> None:
        self.which = [index for index, _ in members]
        self.restarts = [restart for _, restart in members]
        logits = [restart.label_logits for restart in self.restarts]
        self._joint = logits[0] is not None
        self._leaves = [[restart.variable for restart in self.restarts]]
        if self._joint:
            self._leaves.append([each for each in logits if each is not None])
        self._optimised = self._stacks([[x.detach() for x in part] for part in self._leaves])
        # Before the leaves become views: the optimizers know their states by the leaf.
        self._take_over()
        for place, part in enumerate(self._leaves):
            for row, leaf in enumerate(part):
                leaf.data = self._optimised[place][row]
        self.variable = self._optimised[0]
        known = [labels[index] for index in self.which]
        self.labels = self._optimised[1] if self._joint else torch.stack(known)
        self._link_best()

    def _stacks(self, parts: list[Tensors]) -> Tensors:
        """One stack of what each part holds for every row."""
        return [torch.stack(part) for part in parts]

    @abc.abstractmethod
    def _take_over(self) -> None:
        """Go on with the state of every restart's own optimizer."""

    @abc.abstractmethod
    def step(self, rate: float, evaluate: Evaluate) -> None:
        """One step of the optimizer in every row.

        Args:
            rate: Learning rate, before a restart's own factor.
            evaluate: Called where the rows stand, as often as the optimizer asks.
        """

    @abc.abstractmethod
    def forget(self, row: int) -> None:
        """A fresh optimizer for a row: it has been brought back."""

    @abc.abstractmethod
    def write_back(self) -> None:
        """Give every restart's own optimizer the state."""

    def part(self, places: Sequence[int] | None = None) -> Part:
        """Some rows, in ascending order, or all."""
        if places is None or len(places) == len(self.restarts):
            every = range(len(self.restarts))
            return Part(every, self.which, self.restarts, self.variable, self.labels)
        return Part(
            places,
            [self.which[row] for row in places],
            [self.restarts[row] for row in places],
            self.variable[list(places)],
            self.labels[list(places)],
        )

    def _link_best(self) -> None:
        """Make the results so far views of one stack."""
        like = torch.zeros_like(self.variable)
        self._best = like
        for row, restart in enumerate(self.restarts):
            if restart.best_inputs is not None:
                like[row] = restart.best_inputs
                restart.best_inputs = like[row]

    def holds(self, members: Sequence[tuple[int, Restart]]) -> bool:
        """Whether these are the rows, in this order."""
        return len(members) == len(self.restarts) and all(
            index == mine and restart is own
            for (index, restart), mine, own in zip(members, self.which, self.restarts, strict=True)
        )

    def keep(self, part: Part, improved: Sequence[int], inputs: torch.Tensor) -> None:
        """Make inputs the results so far.

        Args:
            part: The rows that were evaluated.
            improved: Those of them that are concerned.
            inputs: Of all of the part.
        """
        if not improved:
            return
        own = torch.tensor(improved, device=inputs.device)
        places = [part.places[row] for row in improved]
        into = torch.tensor(places, device=inputs.device)
        self._best.index_copy_(0, into, inputs.index_select(0, own))
        for row in places:
            restart = self.restarts[row]
            restart.best_inputs = self._best[row]
            if restart.label_logits is not None:
                restart.best_labels = restart.loss.decided(restart.label_logits.detach())


class AdamRows(Rows):
    """Rows that Adam moves, all in one operation; states are views, as the variables are.

    Args:
        members: See `Rows`.
        labels: See `Rows`.
        betas: Decay of both moments.
    """

    def __init__(
        self,
        members: Sequence[tuple[int, Restart]],
        labels: Tensors,
        betas: tuple[float, float],
    ) -> None:
        self._betas = betas
        super().__init__(members, labels)

    def _take_over(self) -> None:
        moments = [
            [_moments(r, leaf) for r, leaf in zip(self.restarts, part, strict=True)]
            for part in self._leaves
        ]
        self._first = [torch.stack([m[0] for m in each]) for each in moments]
        self._second = [torch.stack([m[1] for m in each]) for each in moments]
        self._steps = torch.tensor([float(m[2]) for m in moments[0]])
        for place, part in enumerate(self._leaves):
            for row, leaf in enumerate(part):
                self._link(place, row, leaf)

    def _link(self, place: int, row: int, leaf: torch.Tensor) -> None:
        """Make the state of a restart's optimizer views of its row."""
        self.restarts[row].optimizer.state[leaf] = {
            "step": self._steps[row],
            "exp_avg": self._first[place][row],
            "exp_avg_sq": self._second[place][row],
        }

    def step(self, rate: float, evaluate: Evaluate) -> None:
        """One step in every row whose objective is finite; see `Rows.step`.

        Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1, https://arxiv.org/abs/1412.6980;
        in the order of operations of `torch.optim.Adam`.
        """
        values, gradients = evaluate(self.part())
        finite = torch.isfinite(values).tolist()
        if not all(finite):
            keep = torch.tensor(finite)
            gradients = [_where_rows(keep, g) for g in gradients]
        self._steps += torch.tensor(finite).to(self._steps)
        steps, shrinks = self._steps.tolist(), [restart.shrink for restart in self.restarts]
        same = len(set(steps)) == 1 and len(set(shrinks)) == 1
        if same and all(finite):
            self._all_alike(gradients, rate * shrinks[0], steps[0])
        else:
            self._row_by_row(gradients, rate, finite)

    def _all_alike(self, gradients: Tensors, rate: float, step: float) -> None:
        betas = self._betas
        size, root = rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
        stacks = zip(self._optimised, self._first, self._second, gradients, strict=True)
        for variable, first, second, gradient in stacks:
            first.lerp_(gradient, 1 - betas[0])
            second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            variable.addcdiv_(first, (second.sqrt() / root).add_(ADAM_EPS), value=-size)

    def _row_by_row(self, gradients: Tensors, rate: float, finite: Sequence[bool]) -> None:
        """Where rows have taken different numbers of steps, after a divergence."""
        betas = self._betas
        for row in (row for row, fine in enumerate(finite) if fine):
            step, shrink = float(self._steps[row]), self.restarts[row].shrink
            size, root = shrink * rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
            stacks = zip(self._optimised, self._first, self._second, gradients, strict=True)
            for variables, firsts, seconds, all_gradients in stacks:
                gradient = all_gradients[row]
                firsts[row].lerp_(gradient, 1 - betas[0])
                seconds[row].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
                root_row = (seconds[row].sqrt() / root).add_(ADAM_EPS)
                variables[row].addcdiv_(firsts[row], root_row, value=-size)

    def forget(self, row: int) -> None:
        """See `Rows.forget`."""
        self._steps[row] = 0.0
        for place, part in enumerate(self._leaves):
            self._first[place][row] = 0.0
            self._second[place][row] = 0.0
            self._link(place, row, part[row])

    def write_back(self) -> None:
        """See `Rows.write_back`; they hold views of it."""


class LBFGSRows(Rows):
    """Rows that L-BFGS moves; evaluations of rows whose inner iterations go on are shared."""

    def _stacks(self, parts: list[Tensors]) -> Tensors:
        """Pieces of one matrix, as the optimizer takes everything of a row for one vector."""
        rows = len(self.restarts)
        flat = [torch.stack(part).flatten(1) for part in parts]
        self._matrix = torch.cat(flat, 1)
        pieces = self._matrix.split([each.shape[1] for each in flat], 1)
        return [piece.view(rows, *part[0].shape) for piece, part in zip(pieces, parts, strict=True)]

    def _take_over(self) -> None:
        firsts = zip(self.restarts, self._leaves[0], strict=True)
        states = [restart.optimizer.state.get(leaf, {}) for restart, leaf in firsts]
        self._optimizer = RowLBFGS(states, self._matrix[0])

    def step(self, rate: float, evaluate: Evaluate) -> None:
        """See `Rows.step`."""

        def found(places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            values, gradients = evaluate(self.part(places))
            return values, torch.cat([g.flatten(1) for g in gradients], 1)

        rates = self._matrix.new_tensor([rate * restart.shrink for restart in self.restarts])
        self._optimizer.step(self._matrix, rates, found)

    def forget(self, row: int) -> None:
        """See `Rows.forget`."""
        self._optimizer.forget(row)

    def write_back(self) -> None:
        """See `Rows.write_back`."""
        for row, (restart, leaf) in enumerate(zip(self.restarts, self._leaves[0], strict=True)):
            state = self._optimizer.state_of(row)
            if state:
                restart.optimizer.state[leaf] = state


def _moments(
    restart: Restart, leaf: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Adam's state of a restart's variable: both moments and the number of steps."""
    state = restart.optimizer.state.get(leaf)
    if not state:
        return torch.zeros_like(leaf.detach()), torch.zeros_like(leaf.detach()), 0.0
    return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _where_rows(keep: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows to keep, and zeros in place of the others."""
    mask = keep.to(rows.device).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(mask, rows, torch.zeros_like(rows))
