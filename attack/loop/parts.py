"""The parts of an inversion that may be exchanged, and those that a configuration names.

A part is a function that makes it once, when the inversion is set up. Another way to compare
what was shared (an update with its running statistics, `audit.inversion`), other variables or
another start is another `Parts`; the loop stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attack.loop.loss_terms import make_objective, make_penalties, make_regularizers
from attack.loop.restarts import Starter
from attack.matching.acceleration import AcceleratedMatcher
from attack.matching.clipping import CLIPPED_FROM
from attack.matching.matcher import GradientMatcher
from attack.matching.pieces import PieceMatcher
from attack.priors.coordinates import make_coordinates
from attack.settings import setting_error

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.matching.match import Matcher
    from attack.priors.coordinates import Coordinates
    from attack.priors.regularizers import ModelPenalty, Regularizer
    from attack.settings import InversionConfig
    from core.target import Target


def make_variables(
    target: Target, config: InversionConfig, device: torch.device, dtype: torch.dtype
) -> Coordinates:
    """The coordinates that a configuration names, for a target's samples."""
    size = tuple(target.data.shape[1:])
    return make_coordinates(config.optimiser.coordinates, size, device, dtype)


def make_matcher(problem: InversionProblem) -> GradientMatcher:
    """The comparison of gradients that a configuration names."""
    config, adaptation = problem.config, problem.adaptation
    objective = adaptation.objective(make_objective(config, len(problem.target.gradient)))
    hvp = config.matching.hvp
    clipping = adaptation.clipping(problem.replica)
    if config.speed.images_at_once:
        if clipping is not None:
            raise setting_error("{images_at_once}: the client clipped every image's gradient alone")
        return PieceMatcher(problem.replica, objective, hvp, config.speed.images_at_once)
    if not config.speed.changes_passes:
        return GradientMatcher(
            problem.replica, objective, hvp, clipping=clipping, clipped_from=CLIPPED_FROM
        )
    return AcceleratedMatcher(problem.replica, objective, hvp, config.speed, clipping, CLIPPED_FROM)


@dataclass(frozen=True)
class Parts:
    """How the parts of an inversion are made; by default as its configuration says.

    Attributes:
        coordinates: What is optimised in place of pixels, from the target, the
            configuration, the device and the precision.
        matcher: Compares candidates with what was shared.
        penalties: Weighted penalties on what the model shows of the candidates.
        regularizers: Weighted penalties on the images alone.
        starter: Begins restarts, from the problem, the seed and the images to start from
            (N x C x H x W in [0, 1]; None: as configured).
    """

    coordinates: Callable[[Target, InversionConfig, torch.device, torch.dtype], Coordinates] = (
        make_variables
    )
    matcher: Callable[[InversionProblem], Matcher] = make_matcher
    penalties: Callable[[InversionProblem], Sequence[tuple[float, ModelPenalty]]] = make_penalties
    regularizers: Callable[[InversionProblem], Sequence[tuple[float, Regularizer]]] = (
        make_regularizers
    )
    starter: Callable[[InversionProblem, int, torch.Tensor | None], Starter] = Starter
