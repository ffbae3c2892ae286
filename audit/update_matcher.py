"""How candidates are compared with a site's update: its local training, step by step.

`attack.matching.matcher` compares gradients, and after several local steps it unrolls them as
well. A federation's client sends its running BatchNorm statistics along with its weights, and
they weigh as much as the weights: what counts here is the sum of both distances. ReLUs may be
softened at the beginning (see `attack.matching.smooth_relu`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack.matching.match import (
    Match,
    Penalty,
    Tensors,
    filled,
    fresh_variables,
    match_of,
    penalty_gradient,
    pulled_back,
)
from attack.matching.objectives import Objective
from attack.matching.replica import Replica
from attack.matching.second_derivative import TwiceDifferentiable
from attack.matching.smooth_relu import SmoothReLU, width_at
from attack.priors.watched_layers import smooth_norm
from core.errors import InputError
from core.processes import distributed
from core.target import BatchStatistics
from gradients.batch_statistics import observe_passes


class UpdateMatcher:
    """The distance of a simulated update from the site's, and its gradient in the images.

    Args:
        replica: The site's computation.
        objective: Distance between updates.
        smoothing: Width of the softened ReLUs in the first iteration; 0: none.
        smoothing_end: The same in the last one.

    Attributes:
        width: Of the softened ReLUs now; 0: the network as it is.

    Raises:
        InputError: There are several processes.
    """

    def __init__(
        self,
        replica: Replica,
        objective: Objective,
        smoothing: float = 0.0,
        smoothing_end: float = 0.0,
    ) -> None:
        if distributed.world_size() > 1:
            raise InputError("the inversion of an update runs on one process")
        replica.lay_out(torch.contiguous_format)
        self.replica, self.objective = replica, objective
        self.smoothing, self.smoothing_end = smoothing, smoothing_end
        self.width = 0.0

    def __call__(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        *,
        weight: float = 1.0,
        penalty: Callable[[nn.Module], Penalty] | None = None,
        apart: bool = False,
    ) -> Match:
        """See `attack.matching.match.Matcher`; the value is that of objective and penalty.

        With a weight of 0 the weights do not move: the batches pass the network as the site
        received it, for the penalty alone.
        """
        variables = fresh_variables(inputs, labels, self.replica.optimises(labels))
        observe = None if penalty is None else penalty(self.replica.model)
        value = torch.zeros((), dtype=torch.float64, device=inputs.device)
        outputs: Tensors = []
        cotangents: Tensors = []
        # Around the derivative as well: many steps are computed again in it.
        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable(), SmoothReLU(self.width):
            if weight == 0:
                self.replica.pass_batches(variables[0])
            else:
                # A penalty watches the forward passes: they are not to run twice.
                segments = None if penalty is None else 1
                found = filled(variables, labels)
                outputs = self.replica.update(*found, create_graph=True, segments=segments)
                distance, seed = self._compared(outputs)
                cotangents, value = list(torch._foreach_mul(seed, weight)), weight * distance
            extra = None if observe is None else observe()
            alone = penalty_gradient(extra, variables[0]) if apart else None
            if extra is not None:
                value = value + extra.detach().double()
            if extra is not None and not apart:
                outputs, cotangents = [*outputs, extra], [*cotangents, torch.ones_like(extra)]
            gradients = pulled_back(outputs, cotangents, variables)
        return match_of(value, gradients, extra, alone)

    def _compared(self, update: Tensors) -> tuple[torch.Tensor, Tensors]:
        detached = [u.detach() for u in update]
        return self.objective.value_and_seed(detached, self.replica.target_gradient)

    def several(self, inputs: torch.Tensor, labels: torch.Tensor) -> list[Match]:
        """One restart after the other."""
        return [self(one, labels) for one in inputs]

    def value(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The distance of the updates alone, a scalar in float64."""
        with SmoothReLU(self.width):
            update = self.replica.update(inputs, labels, create_graph=False)
        return self._compared(update)[0]

    def at(self, iteration: int, iterations: int) -> bool:
        """Take the softening back a little; see `attack.matching.match.Matcher`."""
        progress = iteration / max(1, iterations - 1)
        self.width = width_at(progress, self.smoothing, self.smoothing_end)
        return False

    def exact(self) -> UpdateMatcher:
        """The same comparison through the network as it is."""
        return UpdateMatcher(self.replica, self.objective)

    def details(self) -> dict[str, Any]:
        """Nothing: every derivative is exact."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the width follows from the iteration."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class AverageStatistics:
    """Distance of the local steps' average BatchNorm statistics from those that were sent.

    The sum over layers of the Euclidean distances of means and of (unbiased) variances; a
    penalty on forward passes as those of `attack.priors.regularizers`.

    Args:
        known: Average mean and unbiased variance, per layer.
        momentum: Of the running statistics: how much each step's count in the average.

    Source: DeepInversion (Yin et al. 2020), eq. 4, https://arxiv.org/abs/1912.08795.
    """

    def __init__(self, known: BatchStatistics, momentum: float) -> None:
        self.known, self.momentum = known, momentum

    def __call__(self, model: nn.Module) -> Penalty:
        """Watch the forward passes of `model`; the result gives the distance after them."""
        passes, close = observe_passes(model, unbiased=True)

        def total() -> torch.Tensor:
            close()
            return statistics_distance(average_of_steps(passes, self.momentum), self.known)

        return total


def average_of_steps(passes: list[BatchStatistics], momentum: float) -> BatchStatistics:
    """The statistics of local steps, weighted as running statistics weigh them.

    Args:
        passes: Of every step, the first one first.
        momentum: Of the running statistics.
    """
    steps = len(passes)
    raw = [momentum * (1 - momentum) ** (steps - 1 - k) for k in range(steps)]
    weights = [w / sum(raw) for w in raw]
    return {
        name: (
            _weighted([step[name][0] for step in passes], weights),
            _weighted([step[name][1] for step in passes], weights),
        )
        for name in passes[0]
    }


def _weighted(values: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)


def statistics_distance(found: BatchStatistics, known: BatchStatistics) -> torch.Tensor:
    """Sum over layers of the Euclidean distances of means and of variances."""
    terms = []
    for name, (mean, variance) in known.items():
        terms += [smooth_norm(found[name][0] - mean), smooth_norm(found[name][1] - variance)]
    return torch.stack(terms).sum()
