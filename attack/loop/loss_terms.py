"""The terms that a configuration names: objective, regularisers, penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attack.matching.objectives import OBJECTIVES, LayerWeighted, Objective, layer_weights
from attack.priors.regularizers import (
    TOTAL_VARIATIONS,
    BatchNormPenalty,
    ColourPrior,
    FeaturePenalty,
    InputNorm,
    ModelPenalty,
    MovingAveragePenalty,
    PatchPrior,
    Regularizer,
    shared_features,
)
from attack.priors.shared_statistics import layer_momentum, recovered_statistics
from attack.priors.step_statistics import StepStatisticsPenalty
from attack.settings import InversionConfig, setting_error
from core.models.head import head_for
from core.processes import distributed

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from core.target import BatchStatistics


def make_objective(config: InversionConfig, n_parameters: int) -> Objective:
    """The objective that a configuration names, for so many shared parameters."""
    objective = OBJECTIVES[config.matching.objective]()
    if config.matching.layers is None:
        return objective
    return LayerWeighted(objective, layer_weights(n_parameters, config.matching.layers))


def make_regularizers(problem: InversionProblem) -> list[tuple[float, Regularizer]]:
    """Weighted penalties on the images alone.

    The rows of a table have no neighbours and no colour: of all the priors only the length of
    the input is left for them, which is a normal prior on standardised features.
    """
    priors = problem.config.priors
    weighted: list[tuple[float, Regularizer]] = [
        (priors.tv, TOTAL_VARIATIONS[priors.tv_kind]()),
        (priors.input_norm, InputNorm()),
        (priors.colour, ColourPrior()),
        (priors.patch, PatchPrior(priors.patch_size)),
    ]
    if len(problem.target.data.shape) == 1:
        weighted = [(priors.input_norm, InputNorm())]
    return [(weight, regularizer) for weight, regularizer in weighted if weight != 0]


def make_penalties(problem: InversionProblem) -> list[tuple[float, ModelPenalty]]:
    """Weighted penalties on what the forward pass shows beside the logits."""
    priors, target = problem.config.priors, problem.target
    penalties: list[tuple[float, ModelPenalty]] = []
    if priors.bn > 0:
        penalties.append((priors.bn, batch_norm_penalty(problem)))
    if priors.features > 0:
        last, _ = head_for(target.build_model(), target.data)
        known = shared_features(target, problem.labels, last).to(problem.device, problem.dtype)
        penalties.append((priors.features, FeaturePenalty(known, target.batch_size, last)))
    return penalties


def batch_norm_penalty(problem: InversionProblem) -> ModelPenalty:
    """The distance of BatchNorm statistics from those that the attacker knows.

    Raises:
        InputError: The model has no BatchNorm layer.
    """
    priors, target, replica = problem.config.priors, problem.target, problem.replica
    known, groups = _known_statistics(problem)
    known = [_moved(statistics, problem) for statistics in known]
    if not known[0]:
        raise setting_error(f"{{bn}}: {target.model.name} has no BatchNorm layer to match")
    whole_batch = replica.groups is None
    processes = len(replica.placement.shards) or 1
    if priors.bn_from_update and target.local.steps > 1:
        return MovingAveragePenalty(known[0], layer_momentum(target), processes)
    if not target.local.shares_gradient:
        # An update keeps the running statistics of its first process alone.
        told = [not priors.bn_from_update or process == 0 for process in range(processes)]
        return StepStatisticsPenalty(known, target.local.batches, processes, told)
    if not priors.bn_from_update:
        return BatchNormPenalty(known, groups, whole_batch)
    # The client shares the buffers of one process; its others' statistics are unknown.
    first = replica.first_group
    counted = [whole_batch or first + index == 0 for index in range(len(groups))]
    return BatchNormPenalty(known, groups, whole_batch, counted)


def _known_statistics(problem: InversionProblem) -> tuple[list[BatchStatistics], list[int]]:
    """Statistics of each of this process's groups (or of all), and the groups' sizes."""
    priors, target, replica = problem.config.priors, problem.target, problem.replica
    groups = replica.groups or [replica.sizes[distributed.rank()]]
    if priors.bn_from_update:
        return [recovered_statistics(target)], groups
    if not priors.exact_bn:
        return [running_statistics(replica.model)], groups
    exact = target.bn_statistics
    assert exact is not None
    if replica.groups is None:
        return [exact[0]], groups
    return list(exact[replica.first_group :][: len(groups)]), groups


def _moved(statistics: BatchStatistics, problem: InversionProblem) -> BatchStatistics:
    return {
        name: (mean.to(problem.device, problem.dtype), variance.to(problem.device, problem.dtype))
        for name, (mean, variance) in statistics.items()
    }


def running_statistics(model: torch.nn.Module) -> BatchStatistics:
    """Running mean and variance of every BatchNorm layer, by module name."""
    return {
        name: (module.running_mean.clone(), module.running_var.clone())
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
    }
