"""The optimisation loop: from a target gradient to a reconstruction.

All restarts advance together, one iteration at a time, so that they can be compared,
thinned out and fused on the way. The loop is the same on one process and on many;
each process holds its own images of the batch (see `attack.matching`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attack.adaptive import Adaptation, adapt
from attack.combination import combine, group_target
from attack.coordinates import Coordinates, make_coordinates
from attack.matching import GradientMatcher, Match, Replica
from attack.objectives import OBJECTIVES, LayerWeighted, Objective, layer_weights
from attack.reconstruction import Reconstruction
from attack.regularizers import (
    TOTAL_VARIATIONS,
    AnisotropicTV,
    BatchNormPenalty,
    ColourPrior,
    FeaturePenalty,
    GroupConsistency,
    InputNorm,
    ModelPenalty,
    MovingAveragePenalty,
    PatchPrior,
    Regularizer,
    shared_features,
    weighted_penalty,
)
from attack.schedules import learning_rate, staged_learning_rate
from attack.settings import OPTIMIZERS, InversionConfig
from attack.shared_statistics import layer_momentum, recovered_statistics
from gradients.checkpoint import BatchStatistics, Target
from training import distributed
from training.errors import InputError
from training.storage import load_checkpoint, save_checkpoint

# Called on rank 0 with the iteration and the best images so far (N x C x H x W in [0, 1]).
Snapshot = Callable[[int, torch.Tensor], None]
# Called with the iteration and the smallest objective so far; may raise to stop the attack.
Report = Callable[[int, float], None]

MAX_DIVERGENCES = 5
# Parameters below which batched restarts pay on a CPU: 1.4 times faster with a ResNet-18 of
# 0.7 million at 32 px, no faster with a ConvNet of 2.9 million.
SMALL_MODEL = 1_000_000


@dataclass
class Restart:
    """One start of the attack, as it stands.

    Attributes:
        index: Its number; with the seed it determines the start.
        variable: Coordinates of this process's images, a leaf.
        label_logits: Optimised labels; None where they are fixed.
        optimizer: Over both.
        generator: Of its noise.
        smallest: Smallest objective so far.
        best_value: The objective of `best_inputs`: the smallest, or (without
            `smallest_loss`) the last.
        best_inputs: The result so far.
        best_iteration: When the objective was smallest.
        shrink: Factor on the learning rate, below 1 after a divergence.
        divergences: Number of those.
        fallen: Iterations in which the balance has fallen.
    """

    index: int
    variable: torch.Tensor
    label_logits: torch.Tensor | None
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    smallest: float = math.inf
    best_value: float = math.inf
    best_inputs: torch.Tensor | None = None
    best_labels: torch.Tensor | None = None
    best_iteration: int = 0
    shrink: float = 1.0
    divergences: int = 0
    fallen: int = 0
    last_value: float = math.nan


@dataclass
class _Progress:
    """What a resumed run needs beside the restarts."""

    iteration: int = 0
    seconds: float = 0.0
    trace: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    fusion: torch.Tensor | None = None
    final_stage_from: int = 0
    was_rough: bool = False


class Inversion:
    """One inversion of one target.

    Args:
        target: What was shared. The truth is never seen here.
        labels: N recovered labels of the whole batch.
        config: Hyper-parameters.
        device: Where to compute.
        seed: Of the starts and the noise; restart r uses `seed` and r only, so that the
            same restart is the same whatever else runs beside it.
        prior: Images to start from (N x C x H x W in [0, 1]) instead of `config.start`.
        first_restart: Number of the first restart, where others run elsewhere.
        regularizers: Weighted penalties on the images beside those of `config`.

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
        regularizers: Sequence[tuple[float, Regularizer]] = (),
    ) -> None:
        config.validate()
        if config.start == "prior" and prior is None:
            raise InputError("--start prior: give the image to start from with --prior")
        if config.exact_bn and target.bn_statistics is None:
            raise InputError("--exact-bn: the checkpoint holds no batch statistics")
        if config.bn_from_update and target.running_after is None:
            raise InputError(
                "--bn-from-update: the checkpoint holds no running statistics after training"
            )
        if config.optimizer == "LBFGS" and distributed.world_size() > 1:
            raise InputError("--optim LBFGS runs on one process; use Adam and --polish here")
        self.adaptation = (
            adapt(target, config) if config.adaptive else Adaptation.none(target, config)
        )
        config = self.adaptation.config
        self.target, self.config, self.seed, self.prior = target, config, seed, prior
        self.device = device
        self.dtype = torch.float64 if config.double else torch.float32
        self.replica = Replica(target, device, self.dtype)
        self.matcher = self._make_matcher()
        self.labels = labels[self.replica.share].to(device)
        self.coordinates = self._make_coordinates()
        self.regularizers = [*_make_regularizers(config), *regularizers]
        self.penalties = self._make_penalties()
        self.progress = _Progress()
        numbers = range(first_restart, first_restart + config.restarts)
        self.restarts = [self._start(number) for number in numbers]

    # -- What other kinds of targets replace -----------------------------------------

    def _make_matcher(self) -> GradientMatcher:
        objective = make_objective(self.config, len(self.target.gradient))
        return GradientMatcher(self.replica, self.adaptation.objective(objective), self.config.hvp)

    def _make_coordinates(self) -> Coordinates:
        size = (self.target.data.shape[1], self.target.data.shape[2])
        return make_coordinates(self.config.coordinates, size, self.device, self.dtype)

    # -- Starting -----------------------------------------------------------------

    def _start(self, index: int) -> Restart:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        inputs = self._first_inputs(generator)[self.replica.share].to(self.device, self.dtype)
        if self.prior is None and self.config.start == "normal":
            # Noise in the coordinates has the spectrum they are made for.
            return self._restart(index, inputs, generator)
        return self._restart(index, self.coordinates.encode(self._boxed(inputs)), generator)

    def _first_inputs(self, generator: torch.Generator) -> torch.Tensor:
        """Network inputs of the whole batch, so that any sharding starts alike."""
        shape = (self.target.batch_size, *self.target.data.shape)
        if self.prior is not None:
            return self.target.data.normalize(self.prior)
        if self.config.start == "normal":
            return torch.randn(shape, generator=generator)
        if self.config.start == "uniform":
            return self.target.data.normalize(torch.rand(shape, generator=generator))
        if self.config.start == "zeros":
            return torch.zeros(shape)
        if self.config.start == "pattern":
            tile = torch.randn((*shape[:2], 4, 4), generator=generator)
            repeats = [math.ceil(side / 4) for side in shape[2:]]
            return tile.repeat(1, 1, *repeats)[..., : shape[2], : shape[3]]
        raise ValueError(f"unknown start {self.config.start}")

    def _restart(self, index: int, variable: torch.Tensor, generator: torch.Generator) -> Restart:
        variable = variable.clone().requires_grad_()
        logits = None
        if self.config.joint_labels:
            whole = torch.randn(
                (self.target.batch_size, self.target.data.n_classes), generator=generator
            )
            logits = whole[self.replica.share].to(self.device, self.dtype).requires_grad_()
        optimizer = self._optimizer([variable] if logits is None else [variable, logits])
        return Restart(index, variable, logits, optimizer, generator)

    def _optimizer(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": self.config.lr}
        if self.config.optimizer.startswith("Adam"):
            options["betas"] = self.config.betas
        return OPTIMIZERS[self.config.optimizer](parameters, **options)

    def _make_penalties(self) -> list[tuple[float, ModelPenalty]]:
        """Weighted penalties on what the forward pass shows beside the logits."""
        penalties: list[tuple[float, ModelPenalty]] = []
        if self.config.bn > 0:
            penalties.append((self.config.bn, self._batch_norm_penalty()))
        if self.config.features > 0:
            known = shared_features(self.target, self.labels).to(self.device, self.dtype)
            penalties.append((self.config.features, FeaturePenalty(known, self.target.batch_size)))
        return penalties

    def _batch_norm_penalty(self) -> ModelPenalty:
        known, groups = self._known_statistics()
        known = [self._moved(statistics) for statistics in known]
        if not known[0]:
            raise InputError(f"--BN: {self.target.model.arch} has no BatchNorm layer to match")
        whole_batch = self.replica.groups is None
        if not self.config.bn_from_update:
            return BatchNormPenalty(known, groups, whole_batch)
        if self.target.local.steps > 1:
            processes = len(self.replica.placement.shards) or 1
            return MovingAveragePenalty(known[0], layer_momentum(self.target), processes)
        # The client shares the buffers of one process; its others' statistics are unknown.
        first = self.replica.first_group
        counted = [whole_batch or first + index == 0 for index in range(len(groups))]
        return BatchNormPenalty(known, groups, whole_batch, counted)

    def _moved(self, statistics: BatchStatistics) -> BatchStatistics:
        return {
            name: (mean.to(self.device, self.dtype), variance.to(self.device, self.dtype))
            for name, (mean, variance) in statistics.items()
        }

    def _known_statistics(self) -> tuple[list[BatchStatistics], list[int]]:
        groups = self.replica.groups or [self.replica.sizes[distributed.rank()]]
        if self.config.bn_from_update:
            return [recovered_statistics(self.target)], groups
        if not self.config.exact_bn:
            return [running_statistics(self.replica.model)], groups
        exact = self.target.bn_statistics
        assert exact is not None
        if self.replica.groups is None:
            return [exact[0]], groups
        return list(exact[self.replica.first_group :][: len(groups)]), groups

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
        """
        if state_file is not None:
            self._load_state(state_file)
        started = time.perf_counter() - self.progress.seconds
        bar = tqdm(
            total=self.config.iterations,
            initial=self.progress.iteration,
            desc="inversion",
            unit="it",
            disable=not (progress and distributed.rank() == 0),
        )
        status = "finished"
        while self.progress.iteration < self.config.iterations and status == "finished":
            iteration = self.progress.iteration
            self._iterate(iteration)
            self.progress.iteration = iteration + 1
            self.progress.seconds = time.perf_counter() - started
            bar.update()
            if iteration % print_every == 0 or iteration + 1 == self.config.iterations:
                entry = self._trace_entry(iteration)
                bar.set_postfix(loss=f"{entry['objective']:.4g}", refresh=False)
                if report is not None:
                    report(iteration, entry["objective"])
            status = self._status()
            if on_snapshot and snapshot_every and (iteration + 1) % snapshot_every == 0:
                self._snapshot(on_snapshot)
            if state_file is not None and (iteration + 1) % save_every == 0:
                self._save_state(state_file)
        bar.close()
        if self.config.polish:
            self._polish(self._best())
        self.progress.seconds = time.perf_counter() - started
        return self._result(status)

    def _iterate(self, iteration: int) -> None:
        """One iteration of every restart."""
        self._thin_out(iteration)
        consensus = self._consensus(iteration)
        together = self._evaluate_together()
        for restart in self.restarts:
            self._step(restart, iteration, consensus, together.get(restart.index))

    def _evaluate_together(self) -> dict[int, Match]:
        """The matches of all restarts from batched calls, by index; empty where not batched."""
        at_once = self._restarts_at_once()
        matches: dict[int, Match] = {}
        for first in range(0, len(self.restarts) if at_once > 1 else 0, at_once):
            group = self.restarts[first : first + at_once]
            inputs = [self.coordinates.decode(r.variable.detach()) for r in group]
            found = self.matcher.several(torch.stack(inputs), self.labels)
            for restart, match in zip(group, found, strict=True):
                match.input_gradient.mul_(self.config.gradient_weight)
                matches[restart.index] = match
        return matches

    def _restarts_at_once(self) -> int:
        """How many restarts one call evaluates; 1 where a batched call is not possible."""
        possible = (
            len(self.restarts) > 1
            and not self.penalties
            and not self.config.joint_labels
            and self.config.optimizer != "LBFGS"
            and self.target.local.steps == 1
            and self.replica.groups is None
            and distributed.world_size() == 1
        )
        if not possible:
            return 1
        if self.config.restarts_at_once:
            return min(self.config.restarts_at_once, len(self.restarts))
        n_parameters = sum(p.numel() for p in self.replica.parameters)
        if self.device.type == "cpu":
            # Batching saves the overhead of many small kernels; large layers gain nothing.
            return len(self.restarts) if n_parameters < SMALL_MODEL else 1
        # Gradient, perturbed copy and its update are kept per restart.
        bytes_each = 16 * n_parameters
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(len(self.restarts), free // (4 * bytes_each)))

    def _step(
        self,
        restart: Restart,
        iteration: int,
        consensus: torch.Tensor | None,
        match: Match | None = None,
    ) -> None:
        for group in restart.optimizer.param_groups:
            group["lr"] = restart.shrink * self._learning_rate(iteration)

        def closure() -> float:
            return self._set_gradients(restart, iteration, consensus, match)

        if self.config.optimizer == "LBFGS":
            restart.optimizer.step(closure)
        else:
            value = closure()
            if math.isfinite(value):
                restart.optimizer.step()
        if not math.isfinite(restart.last_value) or not _all_finite(restart.variable):
            self._recover(restart, iteration)
            return
        if self.config.input_noise and not self._in_final_stage():
            self._add_noise(restart, iteration)
        if self.config.box:
            self._box(restart.variable)

    def _evaluate(self, restart: Restart, inputs: torch.Tensor) -> Match:
        labels = self.labels if restart.label_logits is None else restart.label_logits.detach()
        return self.matcher(
            inputs,
            labels,
            weight=self.config.gradient_weight,
            penalty=self._weighted_penalty(),
            apart=self.config.balance is not None,
        )

    def _set_gradients(
        self,
        restart: Restart,
        iteration: int,
        consensus: torch.Tensor | None,
        match: Match | None,
    ) -> float:
        """Evaluate the restart where it stands and fill the gradients for its optimizer."""
        inputs = self.coordinates.decode(restart.variable.detach())
        match = match or self._evaluate(restart, inputs)
        prior_value, prior_gradient = self._prior(inputs, consensus)
        value = float(match.value)
        restart.last_value = value
        if not math.isfinite(value):
            return value
        self._keep_best(restart, inputs, value, iteration)
        self._advance_balance(restart, value)
        total = self._combine(match, prior_gradient, self._balance(restart))
        gradient = self.coordinates.pull_back(total)
        restart.variable.grad = self._signed(gradient, iteration)
        if restart.label_logits is not None:
            restart.label_logits.grad = match.label_gradient
        return value * self.config.gradient_weight + prior_value

    def _signed(self, gradient: torch.Tensor, iteration: int) -> torch.Tensor:
        if self.config.signed:
            return gradient.sign()
        if self.config.soft_sign:
            scale = 1 - iteration / self.config.iterations
            return (gradient * scale).tanh() / scale
        return gradient

    def _weighted_penalty(self) -> ModelPenalty | None:
        if not self.penalties:
            return None
        if self.config.balance is not None:
            # Only the direction of the BatchNorm term counts there.
            return self.penalties[0][1]
        return weighted_penalty(self.penalties)

    def _prior(
        self, inputs: torch.Tensor, consensus: torch.Tensor | None
    ) -> tuple[float, torch.Tensor | None]:
        """Value and gradient of the weighted regularisers, as this process's part."""
        terms = list(self.regularizers)
        if consensus is not None and self.config.group > 0:
            squared = not self.config.registration
            terms.append((self.config.group, GroupConsistency(consensus, squared)))
        if not terms:
            return 0.0, None
        leaf = inputs.detach().requires_grad_()
        total = torch.stack([weight * r(leaf).sum() for weight, r in terms]).sum()
        total = total / self.target.batch_size
        (gradient,) = torch.autograd.grad(total, leaf)
        return float(total.detach()), gradient

    def _combine(
        self, match: Match, prior: torch.Tensor | None, balance: float | None
    ) -> torch.Tensor:
        """The direction in image space: weighted sum, or balanced lengths."""
        if balance is None:
            return match.input_gradient if prior is None else match.input_gradient + prior
        parts = [
            (1.0, match.input_gradient),
            (balance, prior),
            (self.config.bn, match.penalty_gradient),
        ]
        present = [(length, g) for length, g in parts if g is not None]
        squares = torch.stack([g.square().sum().double() for _, g in present])
        lengths = distributed.all_reduce(squares).sqrt().clamp_min(1e-30).tolist()
        units = [part * (k / norm) for (k, part), norm in zip(present, lengths, strict=True)]
        return torch.stack(units).sum(0)

    def _advance_balance(self, restart: Restart, value: float) -> None:
        """Let the balance fall by one iteration, unless the prior stands in nobody's way."""
        if value > self.config.balance_hold:
            restart.fallen += 1

    def _balance(self, restart: Restart) -> float | None:
        start, end = self.config.balance, self.config.balance_end
        if start is None or end is None:
            return start
        return start + restart.fallen / self.config.iterations * (end - start)

    def _learning_rate(self, iteration: int) -> float:
        config = self.config
        if config.combine and config.schedule == "cosine":
            ends = [*self._fusions(), config.iterations]
            return staged_learning_rate(iteration, ends, config.lr, config.lr_min)
        return learning_rate(
            config.schedule,
            iteration,
            config.iterations,
            config.lr,
            config.lr_min,
            config.warmup,
        )

    def _in_final_stage(self) -> bool:
        return self.progress.final_stage_from > 0

    def _add_noise(self, restart: Restart, iteration: int) -> None:
        """Langevin noise: as much smaller than the step as `input_noise` says."""
        shape = (self.target.batch_size, *self.target.data.shape)
        noise = torch.randn(shape, generator=restart.generator)[self.replica.share]
        scale = self.config.input_noise * restart.shrink * self._learning_rate(iteration)
        with torch.no_grad():
            inputs = self.coordinates.decode(restart.variable)
            noisy = inputs + scale * noise.to(inputs)
            restart.variable.copy_(self.coordinates.encode(noisy))

    def _keep_best(
        self, restart: Restart, inputs: torch.Tensor, value: float, iteration: int
    ) -> None:
        improved = value < restart.smallest
        if improved:
            restart.smallest, restart.best_iteration = value, iteration
        if improved or not self.config.smallest_loss:
            restart.best_value = value
            restart.best_inputs = inputs.clone()
            if restart.label_logits is not None:
                restart.best_labels = restart.label_logits.detach().argmax(-1)

    def _box(self, variable: torch.Tensor) -> None:
        with torch.no_grad():
            inputs = self.coordinates.decode(variable)
            boxed = self._boxed(inputs)
            if not torch.equal(boxed, inputs):
                variable.copy_(self.coordinates.encode(boxed))

    def _boxed(self, inputs: torch.Tensor) -> torch.Tensor:
        low = self.target.data.normalize(torch.zeros_like(inputs[:1, :, :1, :1]))
        high = self.target.data.normalize(torch.ones_like(inputs[:1, :, :1, :1]))
        return torch.minimum(torch.maximum(inputs, low), high)

    def _recover(self, restart: Restart, iteration: int) -> None:
        """After a NaN: back to the best iterate with half the learning rate."""
        restart.divergences += 1
        restart.shrink /= 2
        self.progress.events.append(f"restart {restart.index} diverged at iteration {iteration}")
        good = restart.best_inputs
        if good is None:
            good = self._first_inputs(restart.generator)[self.replica.share].to(restart.variable)
        with torch.no_grad():
            restart.variable.copy_(self.coordinates.encode(good))
        held = [p for g in restart.optimizer.param_groups for p in g["params"]]
        restart.optimizer = self._optimizer(held)

    # -- Several restarts ---------------------------------------------------------

    def _thin_out(self, iteration: int) -> None:
        """Successive halving, by the objective alone."""
        marks = [int(self.config.iterations * share) for share in (1 / 8, 1 / 4, 1 / 2)]
        if self.config.halving and 0 < iteration in marks and len(self.restarts) > 1:
            ranked = sorted(self.restarts, key=lambda r: (r.best_value, r.index))
            self.restarts = ranked[: math.ceil(len(ranked) / 2)]

    def _consensus(self, iteration: int) -> torch.Tensor | None:
        """What group consistency pulls towards: the fusion (E2EGI) or the mean."""
        if self.config.combine:
            self._advance_stages(iteration)
            return self.progress.fusion
        begin = int(self.config.iterations * self.config.group_start)
        if self.config.group == 0 or len(self.restarts) < 2 or iteration < begin:
            return None
        if self.progress.fusion is None or (iteration - begin) % self.config.group_every == 0:
            inputs = [self.coordinates.decode(r.variable.detach()) for r in self.restarts]
            self.progress.fusion = group_target(
                torch.stack(inputs), registration=self.config.registration
            )
        return self.progress.fusion

    def _fusions(self) -> list[int]:
        """Iterations at which E2EGI's stages begin with a fusion; the last begins the final."""
        initial, middle, _ = self.config.stages
        first = int(self.config.iterations * initial)
        last = int(self.config.iterations * (initial + middle))
        return [*range(first, last, self.config.combine_every), last]

    def _advance_stages(self, iteration: int) -> None:
        """E2EGI: independent starts, starts drawn to their fusion, then the fusion alone."""
        if iteration not in self._fusions():
            return
        self.progress.fusion = self._fuse()
        if iteration == self._fusions()[-1]:
            generator = torch.Generator().manual_seed(self.seed)
            start = self.coordinates.encode(self.progress.fusion)
            self.restarts = [self._restart(0, start, generator)]
            self.progress.fusion, self.progress.final_stage_from = None, iteration

    def _fuse(self) -> torch.Tensor:
        """The combination of the restarts' images with the smallest objective."""
        candidates = [
            self.coordinates.decode(r.variable.detach()) if r.best_inputs is None else r.best_inputs
            for r in self.restarts
        ]
        whole = torch.stack(
            [distributed.all_gather_rows(c, self.replica.sizes) for c in candidates]
        )

        def losses(batches: torch.Tensor) -> torch.Tensor:
            mine = batches[:, self.replica.share]
            return torch.stack([self.matcher.value(inputs, self.labels) for inputs in mine])

        labels = distributed.all_gather_rows(self.labels, self.replica.sizes).cpu()
        return combine(whole, losses, labels=labels).images[self.replica.share]

    # -- Ending -------------------------------------------------------------------

    def _status(self) -> str:
        config, state = self.config, self.progress
        alive = [r for r in self.restarts if r.divergences < MAX_DIVERGENCES]
        if not alive:
            return "diverged"
        last_improvement = max(r.best_iteration for r in alive)
        if config.patience and state.iteration - last_improvement > config.patience:
            return "patience"
        # Clocks differ between processes; rank 0's decides.
        if config.time_budget is not None and distributed.broadcast_object(
            state.seconds > config.time_budget
        ):
            return "time"
        if config.target_tv is not None and self._fell_below(config.target_tv):
            return "target-tv"
        return "finished"

    def _fell_below(self, target_tv: float) -> bool:
        """Whether total variation is below now and was not before: a flat start is no end."""
        rough = self._smallest_tv() >= target_tv
        self.progress.was_rough |= rough
        return self.progress.was_rough and not rough

    def _smallest_tv(self) -> float:
        values = [
            AnisotropicTV()(self.coordinates.decode(r.variable.detach())).sum()
            for r in self.restarts
        ]
        total = distributed.all_reduce(torch.stack(values).double()) / self.target.batch_size
        return float(total.min())

    def _best(self) -> Restart:
        return min(self.restarts, key=lambda r: (r.best_value, r.index))

    def _trace_entry(self, iteration: int) -> dict[str, float]:
        entry = {
            "iteration": iteration,
            "objective": self._best().best_value,
            "last": min(r.last_value for r in self.restarts),
            "lr": self._learning_rate(iteration),
            "seconds": self.progress.seconds,
        }
        self.progress.trace.append(entry)
        return entry

    def _snapshot(self, on_snapshot: Snapshot) -> None:
        images = self._images(self._best())
        if distributed.rank() == 0:
            on_snapshot(self.progress.iteration, images)

    def _images(self, restart: Restart) -> torch.Tensor:
        inputs = restart.best_inputs
        if inputs is None:
            inputs = self.coordinates.decode(restart.variable.detach())
        whole = distributed.all_gather_rows(inputs, self.replica.sizes)
        # Pictures and metrics are in float32 whatever the attack computed in.
        return self.target.data.denormalize(whole).clamp(0, 1).float().cpu()

    def _polish(self, restart: Restart) -> None:
        """L-BFGS on the objective alone, from the best iterate, with exact gradients."""
        if restart.best_inputs is None:
            return
        labels = self.labels if restart.best_labels is None else restart.best_labels
        # Every process takes the same steps of the whole batch; its share of the
        # gradient alone would give each its own curvature.
        sizes, share = self.replica.sizes, self.replica.share
        variable = distributed.all_gather_rows(restart.best_inputs, sizes).clone().requires_grad_()
        exact = GradientMatcher(self.replica, self.matcher.objective, "exact")
        optimizer = torch.optim.LBFGS(
            [variable], max_iter=self.config.polish, max_eval=5 * self.config.polish,
            history_size=50, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip

        def closure() -> float:
            mine = variable.detach()[share]
            match = exact(mine, labels)
            variable.grad = distributed.all_gather_rows(match.input_gradient, sizes)
            value = float(match.value)
            # The trial points of a line search may be worse than where it began.
            if value < restart.best_value:
                self._keep_best(restart, mine, value, self.progress.iteration)
            return value

        optimizer.step(closure)

    def _result(self, status: str) -> Reconstruction:
        best = self._best()
        labels = self.labels if best.best_labels is None else best.best_labels
        return Reconstruction(
            images=self._images(best),
            labels=distributed.all_gather_rows(labels, self.replica.sizes).cpu(),
            objective=best.best_value,
            trace=self.progress.trace,
            seconds=self.progress.seconds,
            iterations=self.progress.iteration,
            status=status,
            details={
                "restart": best.index,
                "restart_objectives": {str(r.index): r.best_value for r in self.restarts},
                "events": self.progress.events,
                "hvp_agreement": self.matcher.agreement,
                "hvp_step": self.matcher.step,
                **({"adaptations": self.adaptation.notes} if self.config.adaptive else {}),
            },
        )

    # -- Resuming -----------------------------------------------------------------

    @staticmethod
    def _state_path(state_file: Path) -> Path:
        if distributed.world_size() == 1:
            return state_file
        return state_file.with_suffix(f".rank{distributed.rank()}{state_file.suffix}")

    def _save_state(self, state_file: Path) -> None:
        state_file = self._state_path(state_file)
        restarts = [
            {
                **{k: v for k, v in vars(r).items() if k not in ("optimizer", "generator")},
                "variable": r.variable.detach(),
                "optimizer": r.optimizer.state_dict(),
                "generator": r.generator.get_state(),
            }
            for r in self.restarts
        ]
        matcher = self.matcher.state_dict()
        save_checkpoint(
            {"progress": vars(self.progress), "restarts": restarts, "matcher": matcher}, state_file
        )

    def _load_state(self, state_file: Path) -> None:
        """Continue where all processes have a state of the same iteration."""
        path = self._state_path(state_file)
        saved = load_checkpoint(path, "--root") if path.exists() else None
        at = torch.tensor(float(saved["progress"]["iteration"]) if saved else -1.0)
        at = at.view(1).to(self.device)
        everywhere = distributed.all_gather_rows(at, [1] * distributed.world_size())
        if saved is None or not (everywhere == at).all():
            return
        self.progress = _Progress(**saved["progress"])
        if self.progress.fusion is not None:
            self.progress.fusion = self.progress.fusion.to(self.device)
        self.matcher.load_state_dict(saved["matcher"])
        self.restarts = [self._restored(restart) for restart in saved["restarts"]]

    def _restored(self, state: dict[str, Any]) -> Restart:
        generator = torch.Generator()
        generator.set_state(state.pop("generator"))
        variable = state.pop("variable").to(self.device, self.dtype).requires_grad_()
        for name in ("best_inputs", "best_labels"):
            if state[name] is not None:
                state[name] = state[name].to(self.device)
        logits = state.pop("label_logits")
        if logits is not None:
            logits = logits.detach().to(self.device, self.dtype).requires_grad_()
        optimizer = self._optimizer([variable] if logits is None else [variable, logits])
        optimizer.load_state_dict(state.pop("optimizer"))
        return Restart(
            variable=variable,
            label_logits=logits,
            optimizer=optimizer,
            generator=generator,
            **state,
        )


def make_objective(config: InversionConfig, n_parameters: int) -> Objective:
    """The objective that a configuration names, for so many shared parameters.

    Raises:
        InputError: Unknown layer weights.
    """
    objective = OBJECTIVES[config.objective]()
    if config.layers is None:
        return objective
    try:
        return LayerWeighted(objective, layer_weights(n_parameters, config.layers))
    except ValueError as error:
        raise InputError(f"--layers: {error}") from None


def _make_regularizers(config: InversionConfig) -> list[tuple[float, Regularizer]]:
    weighted = [
        (config.tv, TOTAL_VARIATIONS[config.tv_kind]()),
        (config.input_norm, InputNorm()),
        (config.colour, ColourPrior()),
        (config.patch, PatchPrior(config.patch_size)),
    ]
    return [(weight, regularizer) for weight, regularizer in weighted if weight != 0]


def running_statistics(model: torch.nn.Module) -> BatchStatistics:
    """Running mean and variance of every BatchNorm layer, by module name."""
    return {
        name: (module.running_mean.clone(), module.running_var.clone())
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
    }


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether every process's part is finite; one answer for all."""
    bad = (~torch.isfinite(tensor.detach())).any().double()
    return float(distributed.all_reduce(bad)) == 0
