"""One attack on many targets in one process: at once where that is possible, else in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attack.attacks.base import Attack
from attack.loop.many_targets import ManyInversions, OneByOneError

if TYPE_CHECKING:
    from attack.loop.inversion import Inversion, Snapshot
    from attack.reconstruction import Reconstruction
    from core.target import Target

logger = logging.getLogger(__name__)

# Restarts of all targets below which batching does not pay on a CPU: with 4 rows of LeNet or a
# small CNN it took 0.65 to 0.85 of the processor time, with one row twice as much, with 16 rows
# 0.3 to 0.45.
FEWEST_ROWS = 4


@dataclass(frozen=True)
class Begun:
    """One target among several, and what an attack on it is given.

    Attributes:
        target: What was shared.
        labels: N labels; None where the attack recovers them itself.
        on_snapshot: Who is shown the best images on the way.
        snapshot_every: Iterations between two snapshots; 0: none.
        state_file: Where the state is kept.
        prior: Images to start from.
    """

    target: Target
    labels: torch.Tensor | None
    on_snapshot: Snapshot
    snapshot_every: int = 0
    state_file: Path | None = None
    prior: torch.Tensor | None = None


def reconstruct_many(
    attack: Attack,
    targets: Sequence[Begun],
    *,
    device: torch.device,
    seed: int,
    at_once: int = 0,
    print_every: int = 10,
    save_every: int = 500,
) -> list[Reconstruction]:
    """What `attack.reconstruct` gives for each target, up to rounding.

    Args:
        attack: The attack.
        targets: What was shared, and what belongs to it.
        device: Device that runs the computation.
        seed: Of every target's random numbers.
        at_once: Targets per batched run; 1: each alone; 0: all, where that pays.
        print_every: Iterations between two entries of a trace.
        save_every: Iterations between two saves of the state.

    Returns:
        One reconstruction per target.
    """
    found: dict[int, Reconstruction] = {}
    size = at_once or len(targets)
    for group in _groups(attack, targets, device, seed):
        for first in range(0, len(group), size):
            part = group[first : first + size]
            chosen = [targets[index] for index in part]
            together = len(part) > 1 and (at_once > 0 or _pays(attack, len(part), device))
            run = _together if together else _in_turn
            results = run(attack, chosen, device, seed, print_every, save_every)
            found |= zip(part, results, strict=True)
    return [found[index] for index in range(len(targets))]


def _groups(
    attack: Attack, targets: Sequence[Begun], device: torch.device, seed: int
) -> list[list[int]]:
    """Targets whose settings are the same, told defenses included."""
    groups: list[tuple[Inversion, list[int]]] = []
    alone: list[list[int]] = []
    for index, each in enumerate(targets):
        mine = _begin(attack, each, device, seed)
        if mine is None:
            alone.append([index])
            continue
        for first, members in groups:
            alike = first.problem.shape == mine.problem.shape
            if alike and first.problem.config == mine.problem.config:
                members.append(index)
                break
        else:
            groups.append((mine, [index]))
    return [*(members for _, members in groups), *alone]


def _begin(attack: Attack, each: Begun, device: torch.device, seed: int) -> Inversion | None:
    if each.labels is None:
        # The attack recovers them itself.
        return None
    return attack.begin(each.target, labels=each.labels, device=device, seed=seed, prior=each.prior)


def _pays(attack: Attack, n_targets: int, device: torch.device) -> bool:
    """Whether so many targets at once are faster than one after the other."""
    config = getattr(attack, "config", None)
    if config is None or device.type != "cpu":
        return True
    return n_targets * int(config.starts.restarts) >= FEWEST_ROWS


def _together(
    attack: Attack,
    targets: Sequence[Begun],
    device: torch.device,
    seed: int,
    print_every: int,
    save_every: int,
) -> list[Reconstruction]:
    """All at once, or in turn where they cannot be."""
    try:
        begun = [_begin(attack, each, device, seed) for each in targets]
        return ManyInversions([each for each in begun if each is not None]).run(
            print_every=print_every,
            on_snapshots=[each.on_snapshot for each in targets],
            snapshot_every=targets[0].snapshot_every,
            state_files=[each.state_file for each in targets if each.state_file is not None],
            save_every=save_every,
        )
    except OneByOneError as reason:
        logger.warning("%d targets one by one: %s", len(targets), reason)
        return _in_turn(attack, targets, device, seed, print_every, save_every)


def _in_turn(
    attack: Attack,
    targets: Sequence[Begun],
    device: torch.device,
    seed: int,
    print_every: int,
    save_every: int,
) -> list[Reconstruction]:
    return [_alone(attack, each, device, seed, print_every, save_every) for each in targets]


def _alone(
    attack: Attack,
    each: Begun,
    device: torch.device,
    seed: int,
    print_every: int,
    save_every: int,
) -> Reconstruction:
    start = {} if each.prior is None else {"prior": each.prior}
    reconstruct: Callable[..., Reconstruction] = attack.reconstruct
    return reconstruct(
        each.target,
        labels=each.labels,
        device=device,
        seed=seed,
        **start,
        print_every=print_every,
        on_snapshot=each.on_snapshot,
        snapshot_every=each.snapshot_every,
        state_file=each.state_file,
        save_every=save_every,
    )
