"""Learning rates over the course of an attack."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attack.settings import SCHEDULES, setting_error


def learning_rate(
    schedule: str, iteration: int, iterations: int, lr: float, lr_min: float, warmup: int = 0
) -> float:
    """The learning rate of one iteration.

    Args:
        schedule: "cosine" (from `lr` to `lr_min`), "step" (x 0.1 at 3/8, 5/8 and 7/8, as
            Inverting Gradients does) or "constant".
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
    progress = (iteration - warmup) / max(1, iterations - warmup)
    if schedule == "cosine":
        # A learning rate below the usual final one is left as it is.
        end = min(lr, lr_min)
        return end + (lr - end) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return lr * 0.1 ** sum(progress >= drop for drop in (3 / 8, 5 / 8, 7 / 8))
    if schedule == "constant":
        return lr
    raise setting_error(f"{{schedule}} {schedule}: choose one of {', '.join(SCHEDULES)}")


def staged_learning_rate(iteration: int, ends: Sequence[int], lr: float, lr_min: float) -> float:
    """E2EGI's schedule: a line from `lr` to `lr_min`, replaced in each stage by half a cosine.

    Args:
        iteration: From 0.
        ends: Where each stage ends; the last is the end of the attack.
        lr: The largest value.
        lr_min: Learning rate at the end of each stage.
    """
    end = min(lr, lr_min)
    start, stop = 0, 0
    for stop in ends:
        if iteration < stop:
            break
        start = stop
    high, low = (end + (lr - end) * (1 - at / ends[-1]) for at in (start, stop))
    progress = (iteration - start) / max(1, stop - start)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
