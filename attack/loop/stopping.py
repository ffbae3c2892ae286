"""When an inversion ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attack.loop.schedules import scheduled_rate
from attack.priors.regularizers import AnisotropicTV
from core.processes import distributed

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.loop.restarts import Restart
    from attack.loop.state import Progress

# Share of the largest learning rate below which a cosine has nearly come to its end.
NEARLY_FALLEN = 0.1


class Stopping:
    """Decides whether to go on, the same on all processes.

    Args:
        problem: What is inverted, and its limits.
        progress: State of the loop.
    """

    def __init__(self, problem: InversionProblem, progress: Progress) -> None:
        self.problem, self.progress = problem, progress

    def status(self, restarts: Sequence[Restart]) -> str:
        """Why to stop: "diverged", "patience", "time" or "target-tv"; "finished": go on."""
        limits, progress = self.problem.config.stopping, self.progress
        alive = [restart for restart in restarts if restart.alive]
        if not alive:
            return "diverged"
        if self._waited_enough(progress.iteration - max(r.counted_iteration for r in alive)):
            return "patience"
        # Clocks differ between processes; rank 0's decides.
        if limits.time_budget is not None and distributed.broadcast_object(
            progress.seconds > limits.time_budget
        ):
            return "time"
        if limits.target_tv is not None and self._fell_below(limits.target_tv, restarts):
            return "target-tv"
        return "finished"

    def _waited_enough(self, waited: int) -> bool:
        """Whether so many iterations without improvement end the inversion."""
        config, limits = self.problem.config, self.problem.config.stopping
        if limits.patience and waited > limits.patience:
            return True
        share = limits.patience_share * config.optimiser.iterations
        return 0 < share < waited and self._rate_has_fallen()

    def _rate_has_fallen(self) -> bool:
        """Whether the learning rate has no great fall before it, which a plateau waits for."""
        config, last = self.problem.config, self.problem.config.optimiser.iterations - 1
        now = scheduled_rate(config, min(self.progress.iteration, last))
        if config.optimiser.schedule == "constant":
            return True
        if config.optimiser.schedule == "step":
            return now <= scheduled_rate(config, last)
        return now <= NEARLY_FALLEN * config.optimiser.lr

    def _fell_below(self, target_tv: float, restarts: Sequence[Restart]) -> bool:
        """Whether total variation is below now and was not before: a flat start is no end."""
        rough = self._smallest_tv(restarts) >= target_tv
        self.progress.was_rough |= rough
        return self.progress.was_rough and not rough

    def _smallest_tv(self, restarts: Sequence[Restart]) -> float:
        values = [AnisotropicTV()(self.problem.inputs(restart)).sum() for restart in restarts]
        total = distributed.all_reduce(torch.stack(values).double())
        return float((total / self.problem.target.batch_size).min())
