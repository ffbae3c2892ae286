"""Inversions of many targets of one model, step by step at once.

Every target stays a problem of its own: its objective, its restarts and their random numbers,
its optimiser state, its best iterate, its race, its consensus and its end are those of its
`Inversion`, so that it ends where it would have ended alone, up to rounding. What costs time is
done for all of them in one call: the passes of the model (`attack.matching.many_targets`), the
priors, the coordinates, Adam and the box. The restarts of all targets are rows of one stack, of
which each restart's own tensors are views.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attack.loop.polish import polish
from attack.loop.restarts import best_of
from attack.loop.schedules import LOOK_EVERY, scheduled_rate, stage_ends
from attack.matching.acceleration import product_precision
from attack.matching.many_targets import ManyTargetsMatcher, RowPenalty, reason_against
from attack.matching.matcher import GradientMatcher
from attack.priors.regularizers import (
    GroupConsistency,
    ModelPenalty,
    Regularizer,
    TransferablePenalty,
    weighted_penalty,
)
from core.errors import first_line
from core.models.architecture import GivenModel
from core.models.building import ModelSpec
from core.processes.interruption import interruptions_noted

if TYPE_CHECKING:
    from attack.loop.inversion import Inversion, Snapshot
    from attack.loop.restarts import Restart
    from attack.loop.state import StateFile
    from attack.matching.many_targets import RowMatches
    from attack.reconstruction import Reconstruction
    from core.target import Target

Tensors = list[torch.Tensor]


class OneByOneError(Exception):
    """Inversions that cannot run side by side; the reason is for people."""


class ManyInversions:
    """Several inversions that run side by side in one process.

    Args:
        inversions: One per target, not yet begun; see `reason_for_one_by_one`.

    Raises:
        OneByOneError: They cannot run so.

    Example:
        >>> inversions = [attack.inversion(t, labels=y, device=cpu, seed=0) for t, y in targets]
        >>> found = ManyInversions(inversions).run()
    """

    def __init__(self, inversions: Sequence[Inversion]) -> None:
        reason = reason_for_one_by_one(inversions)
        if reason is not None:
            raise OneByOneError(reason)
        self.inversions = list(inversions)
        first = self.inversions[0]
        self._problem, self.config = first.problem, first.config
        matchers = [_plain(inversion) for inversion in self.inversions]
        self._matcher = ManyTargetsMatcher(matchers, _row_penalty(self.inversions))
        self._direction = first.stepper.direction
        self._iteration = 0
        self._rows: _Rows | None = None
        self._ended: dict[int, str] = {}

    def run(
        self,
        *,
        print_every: int = 10,
        on_snapshots: Sequence[Snapshot] = (),
        snapshot_every: int = 0,
        state_files: Sequence[Path] = (),
        save_every: int = 500,
    ) -> list[Reconstruction]:
        """Run all to their ends.

        Args:
            print_every: Iterations between two entries of the traces.
            on_snapshots: For each target who is shown its best images; empty: nobody.
            snapshot_every: Iterations between two snapshots; 0: none.
            state_files: Where each target's state is kept, and continued from if all are there.
            save_every: Iterations between two saves.

        Returns:
            What `Inversion.run` would return, in the order of the inversions. Seconds are each
            target's share of those that passed.

        Raises:
            OneByOneError: The model's passes cannot be batched, or saved states are of different
                iterations; nothing has been computed yet, and each can still run alone.
        """
        states = [i.state(f) for i, f in zip(self.inversions, state_files, strict=False)]
        self._load(states)
        precision = product_precision(self.config.speed.precision)
        with precision, interruptions_noted(self._problem.device) as stop_if_interrupted:
            while self._running and self._iteration < self.config.optimiser.iterations:
                began = time.perf_counter(), time.process_time()
                self._iterate_or_refuse(print_every)
                if self._iteration % LOOK_EVERY == 0:
                    stop_if_interrupted()
                self._share_out(*began)
                self._conclude_those_that_stop()
                due = snapshot_every > 0 and self._iteration % snapshot_every == 0
                if due or self._iteration in stage_ends(self.config):
                    self._show(on_snapshots)
                if states and self._iteration % save_every == 0:
                    for index in self._running:
                        states[index].save(self.inversions[index].restarts)
            return [self._result(index) for index in range(len(self.inversions))]

    @property
    def _running(self) -> list[int]:
        return [index for index in range(len(self.inversions)) if index not in self._ended]

    def _load(self, states: Sequence[StateFile]) -> None:
        """Continue, if all targets have a state of the same iteration."""
        if not states or not all(state.path.exists() for state in states):
            return
        for inversion, state in zip(self.inversions, states, strict=True):
            inversion.restarts = state.load(inversion.restarts)
        reached = {inversion.progress.iteration for inversion in self.inversions}
        if len(reached) > 1:
            raise OneByOneError("some had ended when the state was saved")
        self._iteration = reached.pop()
        self._matcher.calls = _plain(self.inversions[0]).calls

    def _share_out(self, wall: float, cpu: float) -> None:
        """Each running target's share of the time since then."""
        spent, used = time.perf_counter() - wall, time.process_time() - cpu
        for index in self._running:
            progress = self.inversions[index].progress
            progress.seconds += spent / len(self._running)
            progress.cpu_seconds += used / len(self._running)

    def _show(self, on_snapshots: Sequence[Snapshot]) -> None:
        for index in self._running if on_snapshots else []:
            self.inversions[index].take_snapshot(on_snapshots[index])

    def _conclude_those_that_stop(self) -> None:
        for index in self._running:
            inversion = self.inversions[index]
            status = inversion.stopping.status(inversion.restarts)
            if status != "finished":
                self._ended[index] = status
                self._rows = None

    def _result(self, index: int) -> Reconstruction:
        inversion = self.inversions[index]
        began = time.perf_counter(), time.process_time()
        if self.config.optimiser.polish:
            at = inversion.progress.iteration
            polish(best_of(inversion.restarts), inversion.problem, inversion.matcher, at)
        inversion.progress.seconds += time.perf_counter() - began[0]
        inversion.progress.cpu_seconds += time.process_time() - began[1]
        found = inversion.result(self._ended.get(index, "finished"))
        found.details["targets_at_once"] = len(self.inversions)
        return found

    def _iterate_or_refuse(self, print_every: int) -> None:
        """One iteration; a model that cannot be batched shows in the first."""
        begun = self._matcher.evaluated
        try:
            self._iterate(print_every)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if begun or self._matcher.evaluated:
                raise
            raise OneByOneError(f"passes cannot be batched: {first_line(error)}") from None

    # -- One iteration -------------------------------------------------------------

    def _iterate(self, print_every: int) -> None:
        iteration = self._iteration
        consensus = {i: self.inversions[i].advance(iteration) for i in self._running}
        rows = self._stacked()
        inputs = self._inputs(rows)
        matches = self._matcher(
            inputs, rows.labels, rows.which, self.config.matching.gradient_weight
        )
        _plain(self.inversions[0]).calls = self._matcher.calls
        regularizers = self._regularizers(rows, consensus)
        prior, terms = self._prior(inputs, regularizers)
        self._keep(rows, inputs, matches.values.tolist(), iteration)
        self._move(rows, matches, prior, iteration)
        self._iteration = iteration + 1
        for index in self._running:
            self.inversions[index].progress.iteration = iteration + 1
        if iteration % print_every == 0 or iteration + 1 == self.config.optimiser.iterations:
            self._trace(rows, matches, terms, iteration)

    def _stacked(self) -> _Rows:
        """The rows of the running inversions; new ones where other restarts go on."""
        wanted = [(i, restart) for i in self._running for restart in self.inversions[i].restarts]
        if self._rows is None or not self._rows.holds(wanted):
            self._rows = _Rows(wanted, [inversion.problem.labels for inversion in self.inversions])
        return self._rows

    def _inputs(self, rows: _Rows) -> torch.Tensor:
        """R x n x C x H x W network inputs."""
        return self._per_row(self._problem.coordinates.decode(_images(rows.variable)), rows)

    @staticmethod
    def _per_row(images: torch.Tensor, rows: _Rows) -> torch.Tensor:
        return images.view(len(rows.which), -1, *images.shape[1:])

    def _regularizers(
        self, rows: _Rows, consensus: dict[int, torch.Tensor | None]
    ) -> list[tuple[float, Regularizer]]:
        """The weighted regularisers, group consistency among them."""
        terms = list(self.inversions[0].evaluation.regularizers)
        group = self.config.consensus
        pulled = [consensus[index] for index in rows.which]
        told = [images for images in pulled if images is not None]
        if group.group > 0 and len(told) == len(pulled):
            together = GroupConsistency(torch.cat(told), not group.registration)
            terms.append((group.group, together))
        return terms

    def _prior(
        self, inputs: torch.Tensor, weighted: Sequence[tuple[float, Regularizer]]
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Gradient of the weighted regularisers, and each one's values (R)."""
        if not weighted:
            return None, {}
        leaf = _images(inputs.detach()).requires_grad_()
        size = self._problem.target.batch_size
        values = [weight * r(leaf) / size for weight, r in weighted]
        (gradient,) = torch.autograd.grad(torch.stack(values).sum(), leaf)
        names = [type(regularizer).__name__ for _, regularizer in weighted]
        sums = [value.detach().view(len(inputs), -1).sum(1) for value in values]
        return gradient.view_as(inputs), dict(zip(names, sums, strict=True))

    def _keep(
        self, rows: _Rows, inputs: torch.Tensor, values: Sequence[float], iteration: int
    ) -> None:
        """Take note of the objectives, and of the best inputs."""
        stopping, improved = self.config.stopping, []
        for row, (restart, value) in enumerate(zip(rows.restarts, values, strict=True)):
            restart.last_value = value
            if not math.isfinite(value):
                continue
            if restart.note(value, iteration, stopping.min_improvement) or (
                not stopping.smallest_loss
            ):
                restart.best_value = value
                improved.append(row)
            self._direction.advance_balance(restart, value)
        rows.keep(improved, inputs)

    def _move(
        self, rows: _Rows, matches: RowMatches, prior: torch.Tensor | None, iteration: int
    ) -> None:
        """One step of Adam, noise and box; rows that have diverged go back."""
        gradient = _images(self._combined(rows, matches, prior))
        pulled = self._per_row(self._problem.coordinates.pull_back(gradient), rows)
        gradients = [self._direction.signed(pulled, iteration)]
        if matches.label_gradient is not None:
            gradients.append(matches.label_gradient)
        rate = scheduled_rate(self.config, iteration)
        settings = self.config.optimiser
        rows.step(gradients, rate, settings.betas)
        back = self._recover(rows)
        if settings.input_noise and not self.inversions[rows.which[0]].progress.in_final_stage:
            self._add_noise(rows, settings.input_noise * rate, back)
        if settings.box and self._problem.target.data.bounded:
            self._box(rows)

    def _combined(
        self, rows: _Rows, matches: RowMatches, prior: torch.Tensor | None
    ) -> torch.Tensor:
        """The direction in image space, as of `Direction.combine`, row by row."""
        gradient = matches.input_gradient
        if self.config.priors.balance is None:
            return gradient if prior is None else gradient + prior
        balances = [self._direction.balance(restart) for restart in rows.restarts]
        parts: list[tuple[Sequence[float | None], torch.Tensor | None]] = [
            ([1.0] * len(balances), gradient),
            (balances, prior),
            ([self.config.priors.bn] * len(balances), matches.penalty_gradient),
        ]
        units = [_of_length(part, lengths) for lengths, part in parts if part is not None]
        return torch.stack(units).sum(0)

    def _recover(self, rows: _Rows) -> set[int]:
        """Bring rows back whose objective or variables are not finite, and say which."""
        back = set()
        finite = torch.isfinite(rows.variable).flatten(1).all(1).tolist()
        for row, (index, restart) in enumerate(zip(rows.which, rows.restarts, strict=True)):
            if finite[row] and math.isfinite(restart.last_value):
                continue
            inversion = self.inversions[index]
            inversion.starter.recover(restart)
            rows.forget(row)
            event = f"restart {restart.index} diverged at iteration {self._iteration}"
            inversion.progress.events.append(event)
            back.add(row)
        return back

    def _add_noise(self, rows: _Rows, scale: float, back: set[int]) -> None:
        """Langevin noise, each row's from its own generator; none where it has gone back."""
        shape = self._problem.shape
        drawn = [
            torch.zeros(shape) if row in back else torch.randn(shape, generator=r.generator)
            for row, r in enumerate(rows.restarts)
        ]
        noise = torch.stack(drawn).to(rows.variable)
        shrink = rows.variable.new_tensor([r.shrink for r in rows.restarts])
        noise *= scale * shrink.view(-1, *[1] * (noise.dim() - 1))
        noisy = _images(self._inputs(rows) + noise)
        rows.variable.copy_(self._per_row(self._problem.coordinates.encode(noisy), rows))

    def _box(self, rows: _Rows) -> None:
        inputs = self._inputs(rows)
        boxed = self._per_row(self._problem.boxed(_images(inputs)), rows)
        outside = (boxed != inputs).flatten(1).any(1).view(-1, *[1] * (inputs.dim() - 1))
        encoded = self._per_row(self._problem.coordinates.encode(_images(boxed)), rows)
        rows.variable.copy_(torch.where(outside, encoded, rows.variable))

    def _trace(
        self, rows: _Rows, matches: RowMatches, terms: dict[str, torch.Tensor], iteration: int
    ) -> None:
        values = {"gradient": matches.values * self.config.matching.gradient_weight, **terms}
        if matches.penalty is not None:
            values["statistics"] = matches.penalty
        for row, (index, restart) in enumerate(zip(rows.which, rows.restarts, strict=True)):
            mine = {name: value[row] for name, value in values.items()}
            self.inversions[index].stepper.terms[restart.index] = mine
        for index in self._running:
            self.inversions[index].trace_entry(iteration)


class _Rows:
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
        parts = [[restart.variable for restart in self.restarts]]
        if self._joint:
            parts.append([each for each in logits if each is not None])
        # Before the leaves become views: the optimisers know their states by the leaf.
        self._optimised = [torch.stack([leaf.detach() for leaf in part]) for part in parts]
        moments = [[_moments(r, leaf) for r, leaf in self._pairs(part)] for part in parts]
        self._first = [torch.stack([m[0] for m in each]) for each in moments]
        self._second = [torch.stack([m[1] for m in each]) for each in moments]
        self._steps = torch.tensor([float(m[2]) for m in moments[0]])
        for place, part in enumerate(parts):
            for row, leaf in enumerate(part):
                self._link(place, row, leaf)
        self.variable = self._optimised[0]
        known = [labels[index] for index in self.which]
        self.labels = self._optimised[1] if self._joint else torch.stack(known)
        self._link_best()

    def _pairs(self, part: Tensors) -> list[tuple[Restart, torch.Tensor]]:
        return list(zip(self.restarts, part, strict=True))

    def _link(self, place: int, row: int, leaf: torch.Tensor) -> None:
        """Make a restart's tensors views of its row."""
        leaf.data = self._optimised[place][row]
        self.restarts[row].optimizer.state[leaf] = {
            "step": self._steps[row],
            "exp_avg": self._first[place][row],
            "exp_avg_sq": self._second[place][row],
        }

    def _link_best(self) -> None:
        """Make the results so far views of one stack."""
        like = torch.zeros_like(self.variable)
        self._best = like
        self._best_labels: torch.Tensor | None = None
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

    def keep(self, improved: Sequence[int], inputs: torch.Tensor) -> None:
        """Make these rows' inputs their results so far."""
        if not improved:
            return
        rows = torch.tensor(improved, device=inputs.device)
        self._best.index_copy_(0, rows, inputs.index_select(0, rows))
        for row in improved:
            restart = self.restarts[row]
            restart.best_inputs = self._best[row]
            if restart.label_logits is not None:
                restart.best_labels = restart.loss.decided(restart.label_logits.detach())

    def step(self, gradients: Tensors, rate: float, betas: tuple[float, float]) -> None:
        """One step of Adam in every row whose last objective was finite.

        Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1, https://arxiv.org/abs/1412.6980;
        in the order of operations of `torch.optim.Adam`.
        """
        finite = [math.isfinite(restart.last_value) for restart in self.restarts]
        if not all(finite):
            keep = torch.tensor(finite)
            gradients = [_where_rows(keep, g) for g in gradients]
        self._steps += torch.tensor(finite).to(self._steps)
        steps, shrinks = self._steps.tolist(), [restart.shrink for restart in self.restarts]
        same = len(set(steps)) == 1 and len(set(shrinks)) == 1
        if same and all(finite):
            self._adam(gradients, rate * shrinks[0], steps[0], betas)
        else:
            self._adam_by_row(gradients, rate, betas, finite)

    def _adam(
        self, gradients: Tensors, rate: float, step: float, betas: tuple[float, float]
    ) -> None:
        size, root = rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
        stacks = zip(self._optimised, self._first, self._second, gradients, strict=True)
        for variable, first, second, gradient in stacks:
            first.lerp_(gradient, 1 - betas[0])
            second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            variable.addcdiv_(first, (second.sqrt() / root).add_(ADAM_EPS), value=-size)

    def _adam_by_row(
        self,
        gradients: Tensors,
        rate: float,
        betas: tuple[float, float],
        finite: Sequence[bool],
    ) -> None:
        """Where rows have taken different numbers of steps, after a divergence."""
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
        """A fresh optimiser for a row: it has been brought back."""
        self._steps[row] = 0.0
        restart = self.restarts[row]
        leaves = [restart.variable, restart.label_logits]
        for place in range(len(self._optimised)):
            self._first[place][row] = 0.0
            self._second[place][row] = 0.0
            leaf = leaves[place]
            if leaf is not None:
                self._link(place, row, leaf)


# Of `torch.optim.Adam`.
ADAM_EPS = 1e-8


def _moments(
    restart: Restart, leaf: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Adam's state of a restart's variable: both moments and the number of steps."""
    state = restart.optimizer.state.get(leaf)
    if not state:
        return torch.zeros_like(leaf.detach()), torch.zeros_like(leaf.detach()), 0.0
    return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _images(rows: torch.Tensor) -> torch.Tensor:
    """R x n x C x H x W as (R n) x C x H x W."""
    return rows.flatten(0, 1)


def _where_rows(keep: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows to keep, and zeros in place of the others."""
    mask = keep.to(rows.device).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(mask, rows, torch.zeros_like(rows))


def _of_length(rows: torch.Tensor, lengths: Sequence[float | None]) -> torch.Tensor:
    """Every row scaled to a Euclidean length."""
    norms = rows.square().flatten(1).sum(1).double().sqrt().clamp_min(1e-30)
    factors = norms.new_tensor([length or 0.0 for length in lengths]) / norms
    return rows * factors.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))


def _plain(inversion: Inversion) -> GradientMatcher:
    matcher = inversion.matcher
    assert isinstance(matcher, GradientMatcher)
    return matcher


def _row_penalty(inversions: Sequence[Inversion]) -> RowPenalty | None:
    """The weighted penalties of all targets as one."""
    all_penalties = [inversion.evaluation.penalties for inversion in inversions]
    if not all_penalties[0]:
        return None
    transferable = [
        (weight, penalty)
        for weight, penalty in all_penalties[0]
        if isinstance(penalty, TransferablePenalty)
    ]
    counts = [len(penalty.known_tensors()) for _, penalty in transferable]
    told = [
        [t for _, p in penalties if isinstance(p, TransferablePenalty) for t in p.known_tensors()]
        for penalties in all_penalties
    ]
    # With a balance only the direction of the BatchNorm term counts.
    apart = inversions[0].config.priors.balance is not None

    def make(known: Tensors) -> ModelPenalty:
        parts, first = [], 0
        for (weight, penalty), count in zip(transferable, counts, strict=True):
            parts.append((weight, penalty.knowing(known[first : first + count])))
            first += count
        return parts[0][1] if apart else weighted_penalty(parts)

    return RowPenalty(make, [torch.stack(each) for each in zip(*told, strict=True)], apart)


def reason_for_one_by_one(inversions: Sequence[Inversion]) -> str | None:
    """Why these inversions cannot run at once, for people; None where they can.

    Args:
        inversions: One per target.
    """
    first = inversions[0]
    matchers = [i.matcher for i in inversions if isinstance(i.matcher, GradientMatcher)]
    if len(matchers) < len(inversions):
        return "they compare something else than gradients"
    if first.config.optimiser.name != "Adam":
        return f"{first.config.optimiser.name} takes its steps target by target"
    if any(inversion.config != first.config for inversion in inversions):
        return "what is known of their defenses asks for different settings"
    if any(inversion.progress.iteration for inversion in inversions):
        return "they have begun"
    if any(_changes_inputs(inversion.target) for inversion in inversions):
        return "the client changed every target's inputs, or its model, in a way of its own"
    if len({inversion.problem.shape for inversion in inversions}) > 1:
        return "their batches have different sizes"
    penalties = [p for i in inversions for _, p in i.evaluation.penalties]
    if not all(isinstance(penalty, TransferablePenalty) for penalty in penalties):
        return "their priors on the model's statistics belong to each target alone"
    reason = reason_against(matchers)
    if reason is None:
        losses = [inversion.target.loss.describe() for inversion in inversions]
        reason = "their losses differ" if any(each != losses[0] for each in losses) else None
    return reason


def _changes_inputs(target: Target) -> bool:
    """Whether a model is more than its parameters and buffers say: a defense's part in front."""
    return not isinstance(target.model, (ModelSpec, GivenModel))
