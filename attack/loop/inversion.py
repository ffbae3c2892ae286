"""The optimisation loop: from a target gradient to a reconstruction.

All restarts advance together, one iteration at a time, so that they can be compared,
thinned out and fused on the way. The loop is the same on one process and on many;
each process holds its own images of the batch (see `attack.matching.matcher`).

    attack.loop.problem      what all parts look at
    attack.loop.restarts     starts, their best iterates, divergences, successive halving
    attack.loop.race       starts that compete for the iterations of one
    attack.loop.parts         what may be exchanged: variables, matcher, priors, starts
    attack.loop.loss_terms    objective, regularisers and penalties of a configuration
    attack.loop.weighted_loss their values and gradients, for one restart or several at once
    attack.loop.consensus       group consistency and E2EGI's stages
    attack.matching.acceleration faster passes, where asked for
    attack.loop.step     direction, learning rate, noise, box
    attack.loop.stopping     why it ends
    attack.loop.polish    L-BFGS at the end
    attack.loop.many_targets   inversions of many targets of one model, step by step at once
    attack.loop.state        saving and resuming
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from attack.knowledge.known_defenses import Adaptation, adapt
from attack.loop.consensus import Consensus
from attack.loop.loss_terms import make_objective, running_statistics
from attack.loop.parts import Parts
from attack.loop.polish import polish
from attack.loop.problem import InversionProblem
from attack.loop.race import LARGEST_SHARE, SHARE_BESIDE_HALVING, plan_race
from attack.loop.restarts import Restart, best_of, thin_out
from attack.loop.schedules import LOOK_EVERY, scheduled_rate, stage_ends
from attack.loop.state import Progress, StateFile
from attack.loop.step import Stepper
from attack.loop.stopping import Stopping
from attack.loop.weighted_loss import WeightedLoss
from attack.matching.acceleration import product_precision
from attack.matching.replica import Replica
from attack.priors.contrast import (
    hidden_contrast,
    natural_length,
    normalises_each,
    with_length,
)
from attack.reconstruction import Reconstruction
from attack.settings import RANDOM_STARTS, UNROLL, InversionConfig, setting_error
from core.processes import distributed
from core.processes.interruption import InterruptedTogether, interruptions_noted
from core.target import LocalTraining, Target

__all__ = [
    "InterruptedInversion",
    "Inversion",
    "Parts",
    "Report",
    "Restart",
    "Snapshot",
    "make_objective",
    "running_statistics",
]

# Called on rank 0 with the iteration and the best images so far (N x C x H x W in [0, 1]).
Snapshot = Callable[[int, torch.Tensor], None]
# Called with the iteration and the smallest objective so far; may raise to stop the attack.
Report = Callable[[int, float], None]

DEFAULT_PARTS = Parts()
# By which share the objective may grow where the scale of images is said to be hidden.
SCALE_TOLERANCE = 0.05
ASSUMED_ORDER = (
    "the client's epochs mix the images in an order that is not told; every epoch is simulated "
    "with the same batches"
)
logger = logging.getLogger(__name__)


class InterruptedInversion(KeyboardInterrupt):
    """An inversion that was interrupted: whoever does not know it is interrupted as well.

    Args:
        reconstruction: The best result so far.
    """

    def __init__(self, reconstruction: Reconstruction) -> None:
        super().__init__()
        self.reconstruction = reconstruction


class Inversion:
    """One inversion of one target.

    Args:
        target: What was shared. The truth is never seen here.
        labels: N recovered labels of the whole batch.
        config: Hyper-parameters.
        device: Device that runs the computation.
        seed: Of the starts and the noise; restart r uses `seed` and r only, so that the
            same restart is the same whatever else runs beside it.
        prior: Images to start from (N x C x H x W in [0, 1]) instead of `config.starts.start`.
        first_restart: Number of the first restart, where others run elsewhere.
        parts: How its parts are made; by default as `config` says.
        kept: So many of the first images are the result, where others stand behind the gradient
            that nobody asks for; None: all.

    Raises:
        InputError: A configuration that does not fit the target.
    """

    def __init__(
        self,
        target: Target,
        labels: torch.Tensor,
        config: InversionConfig,
        *,
        device: torch.device,
        seed: int = 0,
        prior: torch.Tensor | None = None,
        first_restart: int = 0,
        parts: Parts = DEFAULT_PARTS,
        kept: int | None = None,
    ) -> None:
        self.kept = kept
        target = as_matched(target, config)
        _check(target, config, prior)
        knows = config.matching.adaptive
        adaptation = adapt(target, config) if knows else Adaptation.none(target, config)
        config, target = adaptation.config, adaptation.matched(target)
        random = prior is None and config.starts.start in RANDOM_STARTS
        halved = config.starts.halving and config.starts.restarts > 1
        self.race = plan_race(
            config.optimiser.iterations,
            config.starts.race if random else 1,
            SHARE_BESIDE_HALVING if halved else LARGEST_SHARE,
        )
        config = config.changed(iterations=self.race.iterations)
        self.target, self.config, self.device = target, config, device
        self.dtype = torch.float64 if config.matching.double else torch.float32
        self.replica = Replica(
            target, device, self.dtype, config.matching.joint_labels, config.matching.known_masks
        )
        self.problem = InversionProblem(
            target, config, adaptation, self.replica, labels[self.replica.share].to(device),
            parts.coordinates(target, config, device, self.dtype), device, self.dtype,
        )  # fmt: skip
        self.matcher = parts.matcher(self.problem)
        self.progress = Progress()
        self.starter = parts.starter(self.problem, seed, prior)
        self.evaluation = WeightedLoss(
            self.problem,
            self.matcher,
            parts.penalties(self.problem),
            parts.regularizers(self.problem),
        )
        self.consensus = Consensus(self.problem, self.matcher, self.starter, self.progress)
        self.stepper = Stepper(self.problem, self.evaluation, self.starter, self.progress)
        self.stopping = Stopping(self.problem, self.progress)
        last = first_restart + config.starts.restarts
        numbers = range(first_restart * self.race.starts, last * self.race.starts)
        self.restarts = [self.starter.start(n, self.race.amplitude(n)) for n in numbers]

    # -- Running ------------------------------------------------------------------

    def run(
        self,
        *,
        progress: bool = False,
        print_every: int = 10,
        on_snapshot: Snapshot | None = None,
        snapshot_every: int = 0,
        report: Report | None = None,
        state_file: Path | None = None,
        save_every: int = 500,
    ) -> Reconstruction:
        """Optimise until the iterations, the time or the patience are used up.

        Args:
            progress: Show a bar on rank 0.
            print_every: Iterations between two entries of the trace.
            on_snapshot: See `Snapshot`.
            snapshot_every: Iterations between two snapshots; 0: none.
            report: See `Report`; called with every entry of the trace.
            state_file: Where the state is kept, and continued from if it is there.
            save_every: Iterations between two saves of the state.

        Raises:
            InterruptedInversion: At Ctrl-C, with the best result so far; the last saved state
                stays, and a further run continues from it.
        """
        precision = product_precision(self.config.speed.precision)
        with precision, interruptions_noted(self.device) as stop_if_interrupted:
            try:
                return self._run(
                    progress, print_every, on_snapshot, snapshot_every, report, state_file,
                    save_every, stop_if_interrupted,
                )  # fmt: skip
            except KeyboardInterrupt as interruption:
                # The result is put together by all processes.
                together = isinstance(interruption, InterruptedTogether)
                several = distributed.world_size() > 1
                if (several and not together) or not math.isfinite(self._best_objective()):
                    raise
                raise InterruptedInversion(self.result("interrupted")) from None

    def _run(
        self,
        progress: bool,
        print_every: int,
        on_snapshot: Snapshot | None,
        snapshot_every: int,
        report: Report | None,
        state_file: Path | None,
        save_every: int,
        stop_if_interrupted: Callable[[], None],
    ) -> Reconstruction:
        state = None if state_file is None else self.state(state_file)
        if state is not None:
            self.restarts = state.load(self.restarts)
        started = time.perf_counter() - self.progress.seconds
        cpu_started = time.process_time() - self.progress.cpu_seconds
        bar = self._bar(progress)
        status = "finished"
        ends = stage_ends(self.config)
        while self.progress.iteration < self.config.optimiser.iterations and status == "finished":
            iteration = self.progress.iteration
            self._iterate(iteration)
            self.progress.iteration = iteration + 1
            self.progress.seconds = time.perf_counter() - started
            self.progress.cpu_seconds = time.process_time() - cpu_started
            if iteration % LOOK_EVERY == 0:
                stop_if_interrupted()
            bar.update()
            if iteration % print_every == 0 or iteration + 1 == self.config.optimiser.iterations:
                entry = self.trace_entry(iteration)
                bar.set_postfix(loss=f"{entry['objective']:.4g}", refresh=False)
                if report is not None:
                    report(iteration, entry["objective"])
            status = self.stopping.status(self.restarts)
            due = snapshot_every > 0 and (iteration + 1) % snapshot_every == 0
            if on_snapshot and (due or iteration + 1 in ends):
                self.take_snapshot(on_snapshot)
            if state is not None and (iteration + 1) % save_every == 0:
                state.save(self.restarts)
        bar.close()
        if self.config.optimiser.polish:
            polish(best_of(self.restarts), self.problem, self.matcher, self.progress.iteration)
        self.progress.seconds = time.perf_counter() - started
        self.progress.cpu_seconds = time.process_time() - cpu_started
        return self.result(status)

    def _iterate(self, iteration: int) -> None:
        """One iteration of every restart."""
        consensus = self.advance(iteration)
        together = self.evaluation.together(self.restarts)
        for restart in self.restarts:
            self.stepper.step(restart, iteration, consensus, together.get(restart.index))

    def advance(self, iteration: int) -> torch.Tensor | None:
        """Choose the restarts that take this iteration.

        Returns:
            What group consistency pulls them to; None for nothing.
        """
        if self.matcher.at(iteration, self.config.optimiser.iterations):
            # Values of another objective are no measure.
            for restart in self.restarts:
                restart.forget_values()
        restarts = self.race.thin_out(self.restarts, iteration)
        restarts = thin_out(restarts, iteration, self.config)
        self.restarts = self.consensus.advance(restarts, iteration)
        return self.consensus.target(self.restarts, iteration)

    def state(self, path: Path) -> StateFile:
        """The file that this inversion is saved to and continued from."""
        return StateFile(path, self.problem, self.matcher, self.starter, self.progress)

    # -- What is shown and returned ------------------------------------------------

    def _bar(self, shown: bool) -> tqdm:
        return tqdm(
            total=self.config.optimiser.iterations,
            initial=self.progress.iteration,
            desc="inversion",
            unit="it",
            disable=not (shown and distributed.rank() == 0),
        )

    def trace_entry(self, iteration: int) -> dict[str, float]:
        """Write down how far the objective is."""
        entry = {
            "iteration": iteration,
            "objective": best_of(self.restarts).best_value,
            "last": min(r.last_value for r in self.restarts),
            "lr": scheduled_rate(self.config, iteration),
            "seconds": self.progress.seconds,
            **self._terms(),
        }
        self.progress.trace.append(entry)
        logger.debug("%s", ", ".join(f"{name} {value:.6g}" for name, value in entry.items()))
        return entry

    def _terms(self) -> dict[str, float]:
        """The weighted terms that the restart of smallest last objective minimises."""
        current = min(self.restarts, key=lambda restart: (restart.last_value, restart.index))
        found = self.stepper.terms.get(current.index, {})
        # Regularisers are each process's part; the objective and its penalty are of all.
        parts = [name for name in found if name not in ("gradient", "statistics")]
        values = {name: float(value) for name, value in found.items() if name not in parts}
        if parts:
            mine = torch.stack([found[name].double() for name in parts])
            values |= dict(zip(parts, distributed.all_reduce(mine).tolist(), strict=True))
        return {f"{name} term": value for name, value in values.items()}

    def take_snapshot(self, on_snapshot: Snapshot) -> None:
        """Hand the best images so far over, on rank 0."""
        images = self.images(best_of(self.restarts))
        if distributed.rank() == 0:
            on_snapshot(self.progress.iteration, images)

    def images(self, restart: Restart) -> torch.Tensor:
        """A restart's result so far, see `InversionProblem.images`."""
        inputs = self.problem.found(restart)
        if self.config.priors.natural_scale and self.target.data.bounded:
            inputs = self._naturally_scaled(inputs, restart)
        return self.problem.images(inputs)

    def _naturally_scaled(self, inputs: torch.Tensor, restart: Restart) -> torch.Tensor:
        """Inputs at the scale of photographs where theirs is hidden and the objective stays.

        What stands before the first normalisation, a bias in front of GroupNorm say, may show the
        scale after all.
        """
        replica = self.replica
        hidden = hidden_contrast(replica.model, self.target.batch_size, replica.groups)
        if normalises_each(replica.model):
            hidden = [True] * len(inputs)
        # All processes together, whether they have such an image or not.
        if float(distributed.all_reduce(inputs.new_tensor(float(hidden is not None)))) == 0:
            return inputs
        scaled = inputs
        if hidden is not None:
            scaled = with_length(inputs, natural_length(self.target.data), hidden)
        labels = self.problem.found_labels(restart)
        before, after = (float(self.matcher.value(x, labels)) for x in (inputs, scaled))
        return scaled if after <= before * (1 + SCALE_TOLERANCE) else inputs

    def _best_objective(self) -> float:
        best = best_of(self.restarts)
        return math.inf if best.best_inputs is None else best.best_value

    def result(self, status: str) -> Reconstruction:
        """The best result so far.

        Args:
            status: Why the inversion ends.
        """
        best = best_of(self.restarts)
        labels = self.problem.found_labels(best)
        adaptation = self.problem.adaptation
        return Reconstruction(
            images=self.images(best)[: self.kept],
            labels=self.problem.whole(labels).cpu()[: self.kept],
            objective=best.best_value,
            trace=self.progress.trace,
            seconds=self.progress.seconds,
            iterations=self.progress.iteration,
            status=status,
            details={
                "restart": best.index,
                "restart_objectives": {str(r.index): r.best_value for r in self.restarts},
                "events": self.progress.events,
                "cpu_seconds": round(self.progress.cpu_seconds, 3),
                **self.matcher.details(),
                **({"adaptations": adaptation.notes} if self.config.matching.adaptive else {}),
                **({"assumed": [ASSUMED_ORDER]} if self.target.local.order_assumed else {}),
            },
        )


def as_matched(target: Target, config: InversionConfig) -> Target:
    """The target as the attack takes it: of several local steps, or of one.

    Args:
        target: What the client shared.
        config: Says what is made of several local steps.

    Returns:
        The target itself where nothing changes.
    """
    local = target.local
    if config.matching.local_steps == UNROLL or local.shares_gradient:
        return target
    one = LocalTraining(lr=local.lr, weight_decay=local.weight_decay, bn_momentum=local.bn_momentum)
    # What several steps left in the running statistics is not what one would have left.
    return dataclasses.replace(target, local=one, running_after=None)


def label_trial(
    target: Target, config: InversionConfig, *, device: torch.device, seed: int
) -> Callable[[torch.Tensor, int], float]:
    """A function that tries labels out, for `attack.knowledge.label_search`.

    Args:
        target: What the client shared.
        config: Settings of the inversion; the trial sets iterations and restarts itself.
        device: Device that runs the computation.
        seed: Seed of the start, which all labels share.

    Returns:
        From N labels and a number of iterations to the objective that is reached.
    """

    def objective(labels: torch.Tensor, iterations: int) -> float:
        short = config.changed(
            iterations=iterations, restarts=1, combine=False, polish=0, warmup=0, time_budget=None
        )
        try:
            return Inversion(target, labels, short, device=device, seed=seed).run().objective
        except InterruptedInversion:
            # A trial of labels is no result of the attack.
            raise KeyboardInterrupt from None

    return objective


def _check(target: Target, config: InversionConfig, prior: torch.Tensor | None) -> None:
    """Refuse a configuration that does not fit the target."""
    config.validate()
    if config.starts.start == "prior" and prior is None:
        raise setting_error("{start} prior: give the image to start from with {prior}")
    if config.priors.exact_bn and target.bn_statistics is None:
        raise setting_error("{exact_bn}: the checkpoint holds no batch statistics")
    if config.priors.bn_from_update and target.running_after is None:
        raise setting_error(
            "{bn_from_update}: the checkpoint holds no running statistics after training"
        )
    if config.matching.known_masks:
        _check_masks(target)
    if config.optimiser.name == "LBFGS" and distributed.world_size() > 1:
        raise setting_error("{optimizer} LBFGS runs on one process; use Adam and {polish} here")


def _check_masks(target: Target) -> None:
    """Refuse to draw the client's dropout masks where that cannot be done."""
    if target.dropout_seed is None:
        raise setting_error("{known_masks}: the target holds no seed of dropout masks")
    if len(target.shards) > 1 or distributed.world_size() > 1:
        raise setting_error(
            "{known_masks}: masks are drawn again for a client on one process, by one process"
        )
    if any(word.startswith("dp-sgd") for word in target.defenses):
        raise setting_error("{known_masks}: DP-SGD draws masks for every image by itself")
