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
from attack.loop.rows import AdamRows, LBFGSRows, Part, Rows
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
        self._rows: Rows | None = None
        # Of each row's last evaluation, and its place in it.
        self._terms: dict[int, tuple[dict[str, torch.Tensor], int]] = {}
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
                    if self._rows is not None:
                        self._rows.write_back()
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

        def evaluate(part: Part) -> tuple[torch.Tensor, Tensors]:
            return self._evaluate(rows, part, consensus, iteration)

        rows.step(scheduled_rate(self.config, iteration), evaluate)
        self._after_step(rows, iteration)
        self._iteration = iteration + 1
        for index in self._running:
            self.inversions[index].progress.iteration = iteration + 1
        if iteration % print_every == 0 or iteration + 1 == self.config.optimiser.iterations:
            self._trace(rows, iteration)

    def _stacked(self) -> Rows:
        """The rows of the running inversions; new ones where other restarts go on."""
        wanted = [(i, restart) for i in self._running for restart in self.inversions[i].restarts]
        if self._rows is None or not self._rows.holds(wanted):
            if self._rows is not None:
                self._rows.write_back()
            labels = [inversion.problem.labels for inversion in self.inversions]
            settings = self.config.optimiser
            if settings.name == "LBFGS":
                self._rows = LBFGSRows(wanted, labels)
            else:
                self._rows = AdamRows(wanted, labels, settings.betas)
        return self._rows

    def _evaluate(
        self,
        rows: Rows,
        part: Part,
        consensus: dict[int, torch.Tensor | None],
        iteration: int,
    ) -> tuple[torch.Tensor, Tensors]:
        """What some rows minimise where they stand, and the gradients for the optimizer."""
        weight = self.config.matching.gradient_weight
        inputs = self._inputs(part)
        matches = self._matcher(inputs, part.labels, part.which, weight)
        _plain(self.inversions[0]).calls = self._matcher.calls
        prior, terms = self._prior(inputs, self._regularizers(part, consensus))
        self._keep(rows, part, inputs, matches.values.tolist(), iteration)
        terms = {"gradient": matches.values * weight, **terms}
        self._note_terms(part, terms, matches.penalty)
        gradient = _images(self._combined(part, matches, prior))
        pulled = self._per_row(self._problem.coordinates.pull_back(gradient), part)
        gradients = [self._direction.signed(pulled, iteration)]
        if matches.label_gradient is not None:
            gradients.append(matches.label_gradient)
        return torch.stack([term.double() for term in terms.values()]).sum(0), gradients

    def _inputs(self, rows: Part) -> torch.Tensor:
        """R x n x C x H x W network inputs."""
        return self._per_row(self._problem.coordinates.decode(_images(rows.variable)), rows)

    @staticmethod
    def _per_row(images: torch.Tensor, rows: Part) -> torch.Tensor:
        return images.view(len(rows.which), -1, *images.shape[1:])

    def _regularizers(
        self, rows: Part, consensus: dict[int, torch.Tensor | None]
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
        gradient = self.inversions[0].evaluation.less_contrast(gradient, leaf.detach())
        names = [type(regularizer).__name__ for _, regularizer in weighted]
        sums = [value.detach().view(len(inputs), -1).sum(1) for value in values]
        return gradient.view_as(inputs), dict(zip(names, sums, strict=True))

    def _keep(
        self,
        rows: Rows,
        part: Part,
        inputs: torch.Tensor,
        values: Sequence[float],
        iteration: int,
    ) -> None:
        """Take note of the objectives, and of the best inputs."""
        stopping, improved = self.config.stopping, []
        for row, (restart, value) in enumerate(zip(part.restarts, values, strict=True)):
            restart.last_value = value
            if not math.isfinite(value):
                continue
            if restart.note(value, iteration, stopping.min_improvement) or (
                not stopping.smallest_loss
            ):
                restart.best_value = value
                improved.append(row)
            self._direction.advance_balance(restart, value)
        rows.keep(part, improved, inputs)

    def _after_step(self, rows: Rows, iteration: int) -> None:
        """Rows that have diverged go back; the others get their noise, and all the box."""
        every, settings = rows.part(), self.config.optimiser
        back = self._recover(rows)
        if settings.input_noise and not self.inversions[rows.which[0]].progress.in_final_stage:
            rate = scheduled_rate(self.config, iteration)
            self._add_noise(every, settings.input_noise * rate, back)
        if settings.box and self._problem.target.data.bounded:
            self._box(every)

    def _combined(
        self, rows: Part, matches: RowMatches, prior: torch.Tensor | None
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

    def _recover(self, rows: Rows) -> set[int]:
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

    def _add_noise(self, rows: Part, scale: float, back: set[int]) -> None:
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

    def _box(self, rows: Part) -> None:
        inputs = self._inputs(rows)
        boxed = self._per_row(self._problem.boxed(_images(inputs)), rows)
        outside = (boxed != inputs).flatten(1).any(1).view(-1, *[1] * (inputs.dim() - 1))
        encoded = self._per_row(self._problem.coordinates.encode(_images(boxed)), rows)
        rows.variable.copy_(torch.where(outside, encoded, rows.variable))

    def _note_terms(
        self, part: Part, terms: dict[str, torch.Tensor], penalty: torch.Tensor | None
    ) -> None:
        """Keep the weighted terms of each row for its trace."""
        if penalty is not None:
            terms = {**terms, "statistics": penalty}
        self._terms.update((place, (terms, row)) for row, place in enumerate(part.places))

    def _trace(self, rows: Rows, iteration: int) -> None:
        """Write down how far every target is."""
        members = zip(rows.which, rows.restarts, strict=True)
        for place, (index, restart) in enumerate(members):
            values, row = self._terms[place]
            mine = {name: value[row] for name, value in values.items()}
            self.inversions[index].stepper.terms[restart.index] = mine
        for index in self._running:
            self.inversions[index].trace_entry(iteration)


def _images(rows: torch.Tensor) -> torch.Tensor:
    """R x n x C x H x W as (R n) x C x H x W."""
    return rows.flatten(0, 1)


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
    if first.config.optimiser.name not in ("Adam", "LBFGS"):
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
