"""Learning rates, and the stages of E2EGI, over the course of an attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attack.settings import SCHEDULES, setting_error

if TYPE_CHECKING:
    from attack.settings import InversionConfig

# Iterations that the published tool's cosine goes on after the attack: it ends above its end.
PUBLISHED_EXTRA = 10
# Iterations between two looks for Ctrl-C to another process.
LOOK_EVERY = 4


def learning_rate(
    schedule: str, iteration: int, iterations: int, lr: float, lr_min: float, warmup: int = 0
) -> float:
    """The learning rate of one iteration.

    Args:
        schedule: "cosine" (from `lr` to `lr_min`), "cosine-published" (the same with a period
            that is 10 iterations longer than the attack, as the tool of E2EGI and gradient
            heterogeneity has it), "step" (x 0.1 at 3/8, 5/8 and 7/8, as Inverting Gradients
            does) or "constant".
        iteration: From 0.
        iterations: Number of iterations of the whole attack.
        lr: The largest value.
        lr_min: Learning rate at the end of the cosine schedule.
        warmup: Iterations of linear growth at the start.

    Raises:
        InputError: Unknown schedule.
    """
    if iteration < warmup:
        return lr * (iteration + 1) / warmup
    if schedule == "cosine-published":
        iterations += PUBLISHED_EXTRA
    progress = (iteration - warmup) / max(1, iterations - warmup)
    if schedule in ("cosine", "cosine-published"):
        # A learning rate below the usual final one is left as it is.
        end = min(lr, lr_min)
        return end + (lr - end) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return lr * 0.1 ** sum(progress >= drop for drop in (3 / 8, 5 / 8, 7 / 8))
    if schedule == "constant":
        return lr
    raise setting_error(f"{{schedule}} {schedule}: choose one of {', '.join(SCHEDULES)}")


def staged_learning_rate(
    iteration: int, ends: Sequence[int], lr: float, lr_min: float, extra: int = 0
) -> float:
    """E2EGI's schedule: a line from `lr` to `lr_min`, replaced in each stage by half a cosine.

    Args:
        iteration: From 0.
        ends: Where each stage ends; the last is the end of the attack.
        lr: The largest value.
        lr_min: Learning rate at the end of each stage.
        extra: Iterations by which each half cosine is longer than its stage.
    """
    end = min(lr, lr_min)
    start, stop = 0, 0
    for stop in ends:
        if iteration < stop:
            break
        start = stop
    high, low = (end + (lr - end) * (1 - at / ends[-1]) for at in (start, stop))
    progress = (iteration - start) / max(1, stop - start + extra)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def fusions(config: InversionConfig) -> list[int]:
    """Iterations at which E2EGI's stages begin with a fusion; the last begins the final."""
    iterations = config.optimiser.iterations
    initial, middle, _ = config.consensus.stages
    first, last = int(iterations * initial), int(iterations * (initial + middle))
    return [*range(first, last, config.consensus.combine_every), last]


def stage_ends(config: InversionConfig) -> list[int]:
    """Iterations that end E2EGI's initial and middle stage; empty without stages."""
    if not config.consensus.combine:
        return []
    begins = fusions(config)
    return sorted({begins[0], begins[-1]})


def scheduled_rate(config: InversionConfig, iteration: int) -> float:
    """The learning rate of an iteration."""
    steps = config.optimiser
    if config.consensus.combine and steps.schedule in ("cosine", "cosine-published"):
        ends = [*fusions(config), steps.iterations]
        extra = 0 if steps.schedule == "cosine" else PUBLISHED_EXTRA
        return staged_learning_rate(iteration, ends, steps.lr, steps.lr_min, extra)
    return learning_rate(
        steps.schedule, iteration, steps.iterations, steps.lr, steps.lr_min, steps.warmup
    )
