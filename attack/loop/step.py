"""One step of one restart: direction, learning rate, noise, box, divergence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from attack.loop.schedules import scheduled_rate
from core.processes import distributed

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.loop.restarts import Restart, Starter
    from attack.loop.state import Progress
    from attack.loop.weighted_loss import WeightedLoss
    from attack.matching.match import Match
    from attack.settings import InversionConfig


class Direction:
    """From the gradients of the terms to the gradient that the optimizer sees.

    Args:
        config: Weights, balance and sign.
    """

    def __init__(self, config: InversionConfig) -> None:
        self.config = config

    def combine(
        self, match: Match, prior: torch.Tensor | None, balance: float | None
    ) -> torch.Tensor:
        """The direction in image space: weighted sum, or balanced lengths."""
        if balance is None:
            return match.input_gradient if prior is None else match.input_gradient + prior
        parts = [
            (1.0, match.input_gradient),
            (balance, prior),
            (self.config.priors.bn, match.penalty_gradient),
        ]
        present = [(length, g) for length, g in parts if g is not None]
        squares = torch.stack([g.square().sum().double() for _, g in present])
        lengths = distributed.all_reduce(squares).sqrt().clamp_min(1e-30).tolist()
        units = [part * (k / norm) for (k, part), norm in zip(present, lengths, strict=True)]
        return torch.stack(units).sum(0)

    def advance_balance(self, restart: Restart, value: float) -> None:
        """Let the balance fall by one iteration, unless the prior stands in nobody's way."""
        if value > self.config.priors.balance_hold:
            restart.fallen += 1

    def balance(self, restart: Restart) -> float | None:
        """Length of the prior's step relative to the objective's; None: fixed weights."""
        priors = self.config.priors
        start, end = priors.balance, priors.balance_end
        if start is None or end is None:
            return start
        return start + restart.fallen / self.config.optimiser.iterations * (end - start)

    def signed(self, gradient: torch.Tensor, iteration: int) -> torch.Tensor:
        """The gradient, its sign, or something in between."""
        if self.config.optimiser.signed:
            return gradient.sign()
        if self.config.optimiser.soft_sign:
            scale = 1 - iteration / self.config.optimiser.iterations
            return (gradient * scale).tanh() / scale
        return gradient


class Stepper:
    """Takes the steps.

    Args:
        problem: The target and how this process inverts it.
        evaluation: Computes the values and gradients of the loss terms.
        starter: Brings diverged restarts back.
        progress: Takes note of those.
    """

    def __init__(
        self,
        problem: InversionProblem,
        evaluation: WeightedLoss,
        starter: Starter,
        progress: Progress,
    ) -> None:
        self.problem, self.evaluation, self.starter = problem, evaluation, starter
        self.config, self.progress = problem.config, progress
        self.direction = Direction(problem.config)
        # Weighted loss terms of each restart's last evaluation, by its number.
        self.terms: dict[int, dict[str, torch.Tensor]] = {}

    def step(
        self,
        restart: Restart,
        iteration: int,
        consensus: torch.Tensor | None,
        match: Match | None = None,
    ) -> None:
        """Move a restart by one iteration.

        Args:
            restart: The restart that takes the step.
            iteration: From 0.
            consensus: Images that group consistency pulls the restart towards; None for none.
            match: The evaluation where it stands, if there is one already.
        """
        for group in restart.optimizer.param_groups:
            group["lr"] = restart.shrink * scheduled_rate(self.config, iteration)

        def closure() -> float:
            return self._set_gradients(restart, iteration, consensus, match)

        if self.config.optimiser.name == "LBFGS":
            restart.optimizer.step(closure)
        elif math.isfinite(closure()):
            restart.optimizer.step()
        if not math.isfinite(restart.last_value) or not _all_finite(restart.variable):
            self.starter.recover(restart)
            event = f"restart {restart.index} diverged at iteration {iteration}"
            self.progress.events.append(event)
            return
        if self.config.optimiser.input_noise and not self.progress.in_final_stage:
            self.add_noise(restart, iteration)
        if self.config.optimiser.box:
            self._box(restart.variable)

    def _set_gradients(
        self,
        restart: Restart,
        iteration: int,
        consensus: torch.Tensor | None,
        match: Match | None,
    ) -> float:
        """Evaluate the restart where it stands and fill the gradients for its optimizer."""
        inputs = self.problem.inputs(restart)
        match = match or self.evaluation.match(restart, inputs)
        prior_value, prior_gradient = self.evaluation.prior(inputs, consensus)
        value = float(match.value)
        restart.last_value = value
        self.terms[restart.index] = {
            "gradient": match.value.detach() * self.config.matching.gradient_weight,
            **({} if match.penalty is None else {"statistics": match.penalty}),
            **({} if prior_gradient is None else self.evaluation.last_terms),
        }
        if not math.isfinite(value):
            return value
        stopping = self.config.stopping
        restart.keep(
            inputs,
            value,
            iteration,
            smallest=stopping.smallest_loss,
            margin=stopping.min_improvement,
        )
        self.direction.advance_balance(restart, value)
        balance = self.direction.balance(restart)
        total = self.direction.combine(match, prior_gradient, balance)
        gradient = self.problem.coordinates.pull_back(total)
        restart.variable.grad = self.direction.signed(gradient, iteration)
        if restart.label_logits is not None:
            restart.label_logits.grad = match.label_gradient
        return value * self.config.matching.gradient_weight + prior_value

    def add_noise(self, restart: Restart, iteration: int) -> None:
        """Langevin noise: as much smaller than the step as `input_noise` says."""
        noise = self.problem.mine(torch.randn(self.problem.shape, generator=restart.generator))
        level, rate = self.config.optimiser.input_noise, scheduled_rate(self.config, iteration)
        scale = level * restart.shrink * rate
        with torch.no_grad():
            inputs = self.problem.inputs(restart)
            noisy = inputs + scale * noise.to(inputs)
            restart.variable.copy_(self.problem.coordinates.encode(noisy))

    def _box(self, variable: torch.Tensor) -> None:
        if not self.problem.target.data.bounded:
            return
        coordinates = self.problem.coordinates
        with torch.no_grad():
            inputs = coordinates.decode(variable)
            boxed = self.problem.boxed(inputs)
            if not torch.equal(boxed, inputs):
                variable.copy_(coordinates.encode(boxed))


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether every process's part is finite; one answer for all."""
    tensor = tensor.detach()
    # What is not finite makes the sum so, which alone is quicker to ask for.
    finite = bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
    if distributed.world_size() == 1:
        return finite
    return float(distributed.all_reduce(tensor.new_tensor(float(not finite)))) == 0
