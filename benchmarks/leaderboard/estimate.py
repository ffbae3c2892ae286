"""How long an entry will take, from a few evaluations of each kind."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.leaderboard.piece import Piece, attack_piece, data_sets
from benchmarks.leaderboard.plan import Plan
from benchmarks.leaderboard.protocol import Setting
from benchmarks.run.cells import Cell
from core.data.data_sets import take_samples
from core.models.building import ModelSpec, build_model, default_stem
from gradients.received_model import Pretrained

# Evaluations of the two trials whose difference gives the time of one.
FEW, MORE = 8, 32
# Images of a training step that is timed.
BATCH = 32


def seconds_of(plan: Plan, cells: Iterable[Cell]) -> float:
    """Seconds of one core that some cells of a plan will take, to within a factor of two.

    Args:
        plan: What they belong to.
        cells: Those that are to be computed.
    """
    wanted = {cell.key for cell in cells}
    total = 0.0
    with _rules_unheard():
        for setting, pieces in plan.pieces.items():
            images = sum(cell.config["count"] for cell in pieces if cell.key in wanted)
            if images:
                total += images // setting.batch_size * _seconds_of_batch(plan, setting)
    rules = plan.protocol.utility
    trained = [
        (rules.arch, rules.width, rules.epochs, rules.rounds * rules.batch_size, cell)
        for cell in plan.trainings
    ]
    images = len(data_sets(plan.protocol.data).train)
    trained += [(v.arch, v.width, v.epochs, images, cell) for v, cell in plan.victims.items()]
    for arch, width, epochs, size, cell in trained:
        if cell.key in wanted:
            total += epochs * _seconds_of_epoch(plan, _model(plan, arch, width), size)
    return total


@contextlib.contextmanager
def _rules_unheard() -> Iterator[None]:
    """Without the doubts of label rules, which are in the logs of the pieces."""
    rules = logging.getLogger("attack.knowledge.labels")
    level = rules.level
    rules.setLevel(logging.ERROR)
    try:
        yield
    finally:
        rules.setLevel(level)


def _model(plan: Plan, arch: str, width: int) -> Pretrained:
    data = data_sets(plan.protocol.data).spec
    side = data.shape[1]
    spec = ModelSpec(arch, data.n_classes, image_size=side, stem=default_stem(side), width=width)
    return Pretrained(Path(arch), build_model(spec).state_dict(), spec)


def _seconds_of_batch(plan: Plan, setting: Setting) -> float:
    model = _model(plan, setting.victim.arch, setting.victim.width)
    _trial(plan, setting, model, 1)
    few, more = (_trial(plan, setting, model, n) for n in (FEW, MORE))
    each = max(0.0, more - few) / (MORE - FEW)
    return few + (plan.protocol.evaluations - FEW) * each


def _trial(plan: Plan, setting: Setting, model: Pretrained, evaluations: int) -> float:
    protocol, candidate = plan.protocol, plan.candidate
    piece = Piece(
        protocol.data, protocol.seed, protocol.images, 0, setting.batch_size, setting.batch_size,
        candidate.defense, candidate.plugin, candidate.threat, protocol.members, evaluations,
        candidate.sigma,
    )  # fmt: skip
    began = time.perf_counter()
    attack_piece(piece, model)
    return time.perf_counter() - began


def _seconds_of_epoch(plan: Plan, described: Pretrained, size: int) -> float:
    import torch

    data = data_sets(plan.protocol.data)
    assert described.model is not None
    model = build_model(described.model)
    count = min(BATCH, len(data.train))
    began = time.perf_counter()
    images, labels = take_samples(data.train, range(count), data.spec)
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    each = (time.perf_counter() - began) / count
    return each * (size + len(data.val))


def in_words(seconds: float, jobs: int) -> str:
    """How long that takes on so many cores, as one says it."""
    minutes = seconds / jobs / 60
    cores = f"{jobs} core{'s' if jobs != 1 else ''}"
    return f"about {max(1, round(minutes))} min on {cores}"
