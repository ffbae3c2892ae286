"""What restarts are drawn to: their mean, or E2EGI's minimum-loss fusion of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attack.loop.fusion import combine, group_target
from attack.loop.schedules import fusions

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.loop.restarts import Restart, Starter
    from attack.loop.state import Progress
    from attack.matching.match import Matcher


class Consensus:
    """Group consistency, and E2EGI's three stages.

    Args:
        problem: The target and how this process inverts it.
        matcher: The gradient loss, which chooses among combinations.
        starter: Begins the final stage.
        progress: Holds the newest fusion, so that a resumed run has it.
    """

    def __init__(
        self,
        problem: InversionProblem,
        matcher: Matcher,
        starter: Starter,
        progress: Progress,
    ) -> None:
        self.problem, self.matcher, self.starter = problem, matcher, starter
        self.config, self.progress = problem.config, progress

    def advance(self, restarts: list[Restart], iteration: int) -> list[Restart]:
        """E2EGI: independent starts, starts drawn to their fusion, then the fusion alone."""
        if not self.config.consensus.combine or iteration not in fusions(self.config):
            return restarts
        fusion = self.fuse(restarts)
        if iteration != fusions(self.config)[-1]:
            self.progress.fusion = fusion
            return restarts
        self.progress.fusion, self.progress.final_stage_from = None, iteration
        generator = torch.Generator().manual_seed(self.starter.seed)
        start = self.problem.coordinates.encode(fusion)
        return [self.starter.restart(0, start, generator)]

    def target(self, restarts: Sequence[Restart], iteration: int) -> torch.Tensor | None:
        """What group consistency pulls towards: inputs of this process; None for nothing."""
        settings, progress = self.config.consensus, self.progress
        if settings.combine:
            return progress.fusion
        begin = int(self.config.optimiser.iterations * settings.group_start)
        if settings.group == 0 or len(restarts) < 2 or iteration < begin:
            return None
        if progress.fusion is None or (iteration - begin) % settings.group_every == 0:
            inputs = torch.stack([self.problem.inputs(restart) for restart in restarts])
            progress.fusion = group_target(inputs, registration=settings.registration)
        return progress.fusion

    def fuse(self, restarts: Sequence[Restart]) -> torch.Tensor:
        """The combination of the restarts' images with the smallest objective."""
        problem = self.problem
        candidates = [
            problem.inputs(r) if r.best_inputs is None else r.best_inputs for r in restarts
        ]
        whole = torch.stack([problem.whole(candidate) for candidate in candidates])

        def losses(batches: torch.Tensor) -> torch.Tensor:
            mine = batches[:, problem.replica.share]
            return torch.stack([self.matcher.value(inputs, problem.labels) for inputs in mine])

        labels = problem.whole(problem.labels).cpu()
        return problem.mine(combine(whole, losses, labels=labels).images)
