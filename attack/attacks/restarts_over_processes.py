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
        mine, interrupted = _own_share(attack, target, options)
        best, interrupted = _best_of_all(mine, interrupted)
        try:
            # Who is done waits for the others, and may be interrupted then.
            stop_if_interrupted()
        except InterruptedTogether:
            interrupted = True
    if best is None:
        raise KeyboardInterrupt
    if interrupted:
        raise InterruptedInversion(dataclasses.replace(best, status="interrupted"))
    return best


def _own_share(
    attack: OptimizationAttack, target: Target, options: Mapping[str, Any]
) -> tuple[Reconstruction | None, bool]:
    """What this process's restarts found, if anything, and whether they were interrupted."""
    counts = distributed.shard_sizes(attack.config.starts.restarts, distributed.world_size())
    rank = distributed.rank()
    if not counts[rank]:
        return None, False
    share = type(attack)(attack.config.changed(restarts=counts[rank]))
    first = sum(counts[:rank])
    with distributed.alone():
        try:
            return share.reconstruct(target, first_restart=first, **options), False
        except InterruptedInversion as stopped:
            return stopped.reconstruction, True
        except KeyboardInterrupt:
            return None, True


def _best_of_all(
    mine: Reconstruction | None, interrupted: bool
) -> tuple[Reconstruction | None, bool]:
    """The result of smallest objective of all processes, and whether any was interrupted."""
    n_processes = distributed.world_size()
    if n_processes == 1:
        return mine, interrupted
    found: list[Any] = [None] * n_processes
    objective = math.inf if mine is None else mine.objective
    dist.all_gather_object(found, (objective, interrupted))
    objectives = [each for each, _ in found]
    box = [mine]
    dist.broadcast_object_list(box, src=objectives.index(min(objectives)))
    return box[0], any(each for _, each in found)
