"""Restarts spread over processes: every process inverts by itself, the best result wins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from attack.reconstruction import Reconstruction
from core.processes import distributed
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
    """
    counts = distributed.shard_sizes(attack.config.starts.restarts, distributed.world_size())
    rank, n_processes = distributed.rank(), distributed.world_size()
    mine = None
    with distributed.alone():
        if counts[rank]:
            config = attack.config.changed(restarts=counts[rank])
            share = type(attack)(config)
            first = sum(counts[:rank])
            mine = share.reconstruct(target, first_restart=first, **options)
    objectives: list[Any] = [None] * n_processes
    if n_processes == 1:
        assert mine is not None
        return mine
    dist.all_gather_object(objectives, math.inf if mine is None else mine.objective)
    best = objectives.index(min(objectives))
    box = [mine]
    dist.broadcast_object_list(box, src=best)
    assert box[0] is not None
    return box[0]
