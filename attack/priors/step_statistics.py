"""BatchNorm statistics of a client that trains in several passes, as a penalty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from attack.priors.watched_layers import smooth_norm, watch_layers

if TYPE_CHECKING:
    from core.target import BatchStatistics


class StepStatisticsPenalty:
    """Distance of the BatchNorm statistics of every local step's passes from known ones.

    As `attack.priors.regularizers.BatchNormPenalty`, where each forward pass is one group: a
    local batch, or one process's shard of it. The sum over steps is the mean over the passes
    that make up an epoch, so that every epoch counts the same however it is cut.

    Args:
        known: One set of statistics per process of the client; or one for all.
        batches: Local batches per epoch.
        processes: Of the client; they pass the model in turn.
        counted: Whether each process's statistics are known at all; default: they are.
    """

    def __init__(
        self,
        known: Sequence[BatchStatistics],
        batches: int,
        processes: int = 1,
        counted: Sequence[bool] | None = None,
    ) -> None:
        self.known, self.processes = known, processes
        self._counted = counted or [True] * processes
        self._parts = float(batches * sum(self._counted))

    def __call__(self, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        """Watch the forward passes of `model`; the result gives the penalty after them."""
        passes: Counter[str] = Counter()

        def term(name: str, features: torch.Tensor) -> torch.Tensor | None:
            process = passes[name] % self.processes
            passes[name] += 1
            return self._distance(name, features, process) if self._counted[process] else None

        return watch_layers(model, self.known[0], term)

    def _distance(self, name: str, features: torch.Tensor, process: int) -> torch.Tensor:
        mean, variance = self.known[min(process, len(self.known) - 1)][name]
        dims = [0, *range(2, features.dim())]
        terms = [
            smooth_norm(features.mean(dims) - mean),
            smooth_norm(features.var(dims, unbiased=False) - variance),
        ]
        return torch.stack(terms).sum() / self._parts
