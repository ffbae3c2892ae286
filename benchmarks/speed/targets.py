"""Several targets of one model attacked at once, against one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attack.matching.acceleration import product_precision
from benchmarks.speed import references
from benchmarks.speed.cases import CASES, SMALL_CASE, Case, make_problems
from benchmarks.speed.timing import interleaved, medians, paired_ratio, synchronised
from core.models.building import ModelSpec

COUNTS = (1, 4, 16)
# Small networks, for which it is meant, and two that keep a processor busy by themselves.
CASES_OF_TARGETS = (
    Case(ModelSpec("lenet", 10, 32, width=12), 1, False),
    Case(ModelSpec("cnn", 10, 16, width=8), 1, False),
    SMALL_CASE,
    CASES["convnet-32px-b1-eval"],
    CASES["resnet18-32px-b1-eval"],
)


def measure_targets(
    case: Case,
    device: torch.device,
    repeats: int,
    seed: int,
    counts: tuple[int, ...] = COUNTS,
) -> Iterator[dict[str, Any]]:
    """One iteration of Inverting Gradients on so many targets: in turn, and in one call.

    Args:
        case: The model and the batch of every target.
        device: Device that is timed.
        repeats: Number of rounds.
        seed: Of the model, the images and the candidates.
        counts: Numbers of targets.
    """
    for count in counts:
        problems = [problem.to(device) for problem in make_problems(case, count, seed)]
        ways = {
            "in turn": references.targets_in_turn(problems),
            "at once": references.targets_at_once(problems),
        }
        with product_precision("float32"):
            timed = {name: synchronised(way, device) for name, way in ways.items()}
            times = interleaved(timed, repeats)
        yield {
            "case": case.name,
            "device": device.type,
            "targets": count,
            "seconds": medians(times),
            "gain": paired_ratio(times["in turn"], times["at once"]),
        }
