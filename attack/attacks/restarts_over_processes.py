"""Restarts spread over processes: every process inverts by itself, the best result wins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from attack.loop.inversion import InterruptedInversion
from attack.reconstruction import Reconstruction
from core.processes import distributed
from core.processes.interruption import InterruptedTogether, interruptions_noted
from core.target import Target

if TYPE_CHECKING:
    from attack.attacks.optimisation import OptimizationAttack


def reconstruct_spread(
    attack: OptimizationAttack, target: Target, **options: Any
) -> Reconstruction:
    """Run each process's share of the restarts; the same result as one process running all.

    Args:
        attack: The attack; its settings state the number of restarts.
        target: What the client shared.
        options: As for `OptimizationAttack.reconstruct`.

    Returns:
        The reconstruction of smallest objective, on every process.

    Raises:
        InterruptedInversion: At Ctrl-C to any process, with the best of all results so far.
    """
    with interruptions_noted(options["device"]) as stop_if_interrupted:
        best = _best_of_all(_own_share(attack, target, options))
        try:
            stop_if_interrupted()
        except InterruptedTogether:
            if best is None:
                raise
            best = dataclasses.replace(best, status="interrupted")
            raise InterruptedInversion(best) from None
    assert best is not None
    return best


def _own_share(
    attack: OptimizationAttack, target: Target, options: Mapping[str, Any]
) -> Reconstruction | None:
    """What this process's restarts found, to their end or to an interruption."""
    n_processes, rank = distributed.world_size(), distributed.rank()
    counts = distributed.shard_sizes(attack.config.starts.restarts, n_processes)
    if not counts[rank]:
        return None
    share = type(attack)(attack.config.changed(restarts=counts[rank]))
    first = sum(counts[:rank])
    with distributed.alone():
        try:
            return share.reconstruct(target, first_restart=first, **options)
        except InterruptedInversion as stopped:
            if n_processes == 1:
                raise
            return stopped.reconstruction
        except InterruptedTogether:
            return None


def _best_of_all(mine: Reconstruction | None) -> Reconstruction | None:
    """The result of smallest objective of all processes."""
    n_processes = distributed.world_size()
    if n_processes == 1:
        return mine
    objectives: list[Any] = [None] * n_processes
    dist.all_gather_object(objectives, math.inf if mine is None else mine.objective)
    box = [mine]
    dist.broadcast_object_list(box, src=objectives.index(min(objectives)))
    return box[0]
