"""Restarts: how they begin, what each keeps, and which of them go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attack.loop.adam import PlainAdam
from core.losses import DEFAULT_LOSS, Loss

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.settings import InversionConfig

MAKE_OPTIMIZER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": PlainAdam,
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "LBFGS": torch.optim.LBFGS,
}
MAX_DIVERGENCES = 5
# Shares of the iterations at which successive halving drops the worse restarts.
HALVING_AT = (1 / 8, 1 / 4, 1 / 2)


@dataclass
class Restart:
    """One start of the attack, as it stands.

    Attributes:
        index: Its number; with the seed it determines the start.
        variable: Coordinates of this process's images, a leaf.
        label_logits: Optimised labels; None where they are fixed.
        optimizer: Optimizer of the variable and of the label logits.
        generator: Generator of the restart's noise.
        smallest: Smallest objective so far.
        best_value: The objective of `best_inputs`: the smallest, or (without
            `smallest_loss`) the last.
        best_inputs: The result so far.
        best_labels: The labels that go with it, where they are optimised.
        best_iteration: Iteration at which the objective was smallest.
        counted: The objective when it last improved by as much as counts for patience.
        counted_iteration: The iteration at which that was.
        shrink: Factor on the learning rate, below 1 after a divergence.
        divergences: Number of those.
        fallen: Iterations in which the balance has fallen.
        last_value: The objective of the last evaluation.
        loss: What the client minimises: says which labels the optimised ones stand for.
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
    counted: float = math.inf
    counted_iteration: int = 0
    shrink: float = 1.0
    divergences: int = 0
    fallen: int = 0
    last_value: float = math.nan
    loss: Loss = DEFAULT_LOSS

    @property
    def alive(self) -> bool:
        """Whether it has not diverged too often."""
        return self.divergences < MAX_DIVERGENCES

    def keep(
        self,
        inputs: torch.Tensor,
        value: float,
        iteration: int,
        *,
        smallest: bool = True,
        margin: float = 0.0,
    ) -> None:
        """Make these inputs the result so far.

        Args:
            inputs: n x C x H x W network inputs.
            value: Value of the objective at these inputs.
            iteration: Number of the iteration, from 0.
            smallest: Only if the objective is smaller than ever before.
            margin: See `note`.
        """
        if self.note(value, iteration, margin) or not smallest:
            # Together: an interrupted attack's result is the one of its objective.
            self.best_value, self.best_inputs = value, inputs.clone()
            if self.label_logits is not None:
                self.best_labels = self.loss.decided(self.label_logits.detach())

    def note(self, value: float, iteration: int, margin: float = 0.0) -> bool:
        """Take note of an objective; whether it is smaller than ever before.

        Args:
            value: Value of the objective.
            iteration: Number of the iteration, from 0.
            margin: Share by which it must fall to count as improved for patience.
        """
        if value < self.counted * (1 - margin):
            self.counted, self.counted_iteration = value, iteration
        if not value < self.smallest:
            return False
        self.smallest, self.best_iteration = value, iteration
        return True

    def forget_values(self) -> None:
        """The objective is another one from here on: no earlier value is a measure."""
        self.smallest = self.best_value = self.counted = math.inf


def best_of(restarts: Sequence[Restart]) -> Restart:
    """The restart whose result has the smallest objective."""
    return min(restarts, key=by_objective)


def thin_out(restarts: list[Restart], iteration: int, config: InversionConfig) -> list[Restart]:
    """Successive halving, by the objective alone: the restarts that go on."""
    marks = [int(config.optimiser.iterations * share) for share in HALVING_AT]
    if not config.starts.halving or iteration not in marks or iteration == 0 or len(restarts) < 2:
        return restarts
    return sorted(restarts, key=by_objective)[: math.ceil(len(restarts) / 2)]


def by_objective(restart: Restart) -> tuple[float, int]:
    """Orders restarts, the best first."""
    return restart.best_value, restart.index


class Starter:
    """Begins restarts, and brings diverged ones back.

    Args:
        problem: The target and how this process inverts it.
        seed: Restart r uses `seed` and r only, so that the same restart is the same
            whatever else runs beside it.
        prior: Images to start from (N x C x H x W in [0, 1]) instead of `config.starts.start`.
        noise: Standard deviation of grey noise of each restart's own on its start (network
            inputs), without which the images of a batch that starts from one prior could
            not become different; None: no such noise.
    """

    def __init__(
        self,
        problem: InversionProblem,
        seed: int,
        prior: torch.Tensor | None = None,
        noise: float | None = None,
    ) -> None:
        self.problem, self.seed, self.prior, self.noise = problem, seed, prior, noise
        self.config = problem.config

    def start(self, index: int, amplitude: float = 1.0) -> Restart:
        """The restart of that number, at its beginning.

        Args:
            index: Number of the restart.
            amplitude: Factor of its first coordinates; at 0 all images are the mean colour.
        """
        problem = self.problem
        generator = torch.Generator().manual_seed(self._first_seed + self.seed * 100_003 + index)
        inputs = problem.mine(self.first_inputs(generator)).to(problem.device, problem.dtype)
        if self.prior is None and self.config.starts.start == "normal":
            # Noise in the coordinates has the spectrum they are made for.
            return self.restart(index, amplitude * inputs, generator)
        encoded = problem.coordinates.encode(problem.boxed(inputs))
        return self.restart(index, amplitude * encoded, generator)

    @property
    def _first_seed(self) -> int:
        """0 for images, whose numbers stand in tables; else far from seeds that people choose.

        Rows and signals for a trial are often drawn as normal numbers from seed 0, as the
        start is: it would be the truth.
        """
        return 0 if len(self.problem.shape) == 4 else 0x5EED_0DD5

    def first_inputs(self, generator: torch.Generator) -> torch.Tensor:
        """Network inputs of the whole batch, so that any sharding starts alike."""
        inputs = self._drawn(generator)
        if self.noise is None:
            return inputs
        # Features of a table are no colours of one pixel.
        like = inputs[:, :1] if inputs.dim() > 2 else inputs
        return inputs + self.noise * torch.randn(like.shape, generator=generator)

    def _drawn(self, generator: torch.Generator) -> torch.Tensor:
        shape, data = self.problem.shape, self.problem.target.data
        if self.prior is not None:
            return data.normalize(self.prior)
        if self.config.starts.start == "normal":
            return torch.randn(shape, generator=generator)
        if self.config.starts.start == "uniform":
            return self._uniform(torch.rand(shape, generator=generator))
        if self.config.starts.start == "zeros":
            return torch.zeros(shape)
        if self.config.starts.start == "pattern":
            tile = torch.randn((*shape[:2], *[4] * len(shape[2:])), generator=generator)
            repeats = [math.ceil(side / 4) for side in shape[2:]]
            return tile.repeat(1, 1, *repeats)[tuple(slice(side) for side in shape)]
        raise ValueError(f"unknown start {self.config.starts.start}")

    def _uniform(self, shares: torch.Tensor) -> torch.Tensor:
        """Network inputs from random numbers in [0, 1]: of the valid range, or of unit variance."""
        data = self.problem.target.data
        return data.normalize(shares) if data.bounded else math.sqrt(12) * (shares - 0.5)

    def restart(self, index: int, variable: torch.Tensor, generator: torch.Generator) -> Restart:
        """A restart that begins at these coordinates of this process's images."""
        variable = variable.clone().requires_grad_()
        logits = None
        if self.config.matching.joint_labels:
            shape = (self.problem.shape[0], *self.problem.replica.variables_shape())
            whole = torch.randn(shape, generator=generator)
            mine = self.problem.mine(whole).to(self.problem.device, self.problem.dtype)
            logits = mine.requires_grad_()
        optimizer = self.optimizer(variable, logits)
        loss = self.problem.target.loss
        return Restart(index, variable, logits, optimizer, generator, loss=loss)

    def optimizer(
        self, variable: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.optim.Optimizer:
        """A fresh optimizer over a restart's variables."""
        settings = self.config.optimiser
        options: dict[str, Any] = {"lr": settings.lr}
        if settings.name.startswith("Adam"):
            options["betas"] = settings.betas
        parameters = [variable] if logits is None else [variable, logits]
        return MAKE_OPTIMIZER[settings.name](parameters, **options)

    def recover(self, restart: Restart) -> None:
        """After a NaN: back to the best iterate with half the learning rate."""
        restart.divergences += 1
        restart.shrink /= 2
        good = restart.best_inputs
        if good is None:
            first = self.first_inputs(restart.generator)
            good = self.problem.mine(first).to(restart.variable)
        with torch.no_grad():
            restart.variable.copy_(self.problem.coordinates.encode(good))
        restart.optimizer = self.optimizer(restart.variable, restart.label_logits)
