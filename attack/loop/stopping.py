"""When an inversion ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attack.priors.regularizers import AnisotropicTV
from core.processes import distributed

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.loop.restarts import Restart
    from attack.loop.state import Progress


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
        last_improvement = max(restart.best_iteration for restart in alive)
        if limits.patience and progress.iteration - last_improvement > limits.patience:
            return "patience"
        # Clocks differ between processes; rank 0's decides.
        if limits.time_budget is not None and distributed.broadcast_object(
            progress.seconds > limits.time_budget
        ):
            return "time"
        if limits.target_tv is not None and self._fell_below(limits.target_tv, restarts):
            return "target-tv"
        return "finished"

    def _fell_below(self, target_tv: float, restarts: Sequence[Restart]) -> bool:
        """Whether total variation is below now and was not before: a flat start is no end."""
        rough = self._smallest_tv(restarts) >= target_tv
        self.progress.was_rough |= rough
        return self.progress.was_rough and not rough

    def _smallest_tv(self, restarts: Sequence[Restart]) -> float:
        values = [AnisotropicTV()(self.problem.inputs(restart)).sum() for restart in restarts]
        total = distributed.all_reduce(torch.stack(values).double())
        return float((total / self.problem.target.batch_size).min())
