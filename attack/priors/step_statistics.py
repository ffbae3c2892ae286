"""BatchNorm statistics of a client that trains in several passes, as a penalty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

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
        terms: list[torch.Tensor] = []
        passes: Counter[str] = Counter()

        def watch(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                process = passes[name] % self.processes
                passes[name] += 1
                if self._counted[process]:
                    terms.append(self._distance(name, inputs[0], process))

            return hook

        modules = dict(model.named_modules())
        handles = [modules[n].register_forward_pre_hook(watch(n)) for n in self.known[0]]

        def total() -> torch.Tensor:
            for handle in handles:
                handle.remove()
            return torch.stack(terms).sum()

        return total

    def _distance(self, name: str, features: torch.Tensor, process: int) -> torch.Tensor:
        mean, variance = self.known[min(process, len(self.known) - 1)][name]
        dims = [0, *range(2, features.dim())]
        terms = [
            _norm(features.mean(dims) - mean),
            _norm(features.var(dims, unbiased=False) - variance),
        ]
        return torch.stack(terms).sum() / self._parts


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm with a finite slope at 0."""
    return (x.square().sum() + torch.finfo(x.dtype).tiny).sqrt()
