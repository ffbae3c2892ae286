"""What a target is, as plain values for records and reports."""

from __future__ import annotations

import dataclasses
from typing import Any

from core.target import Target


def describe(target: Target) -> dict[str, Any]:
    """The setting of a target.

    Returns:
        Model, data, the client's local training, its processes and its defenses. The mode is
        there twice, as a word and as a flag, since records of stage 2 have held the one and
        records of stage 3 the other.
    """
    return {
        "model": target.model.to_dict(),
        "data": target.data.to_dict(),
        "mode": "train" if target.train_mode else "eval",
        "train_mode": target.train_mode,
        "batch_size": target.batch_size,
        "local_training": {**dataclasses.asdict(target.local), "steps": target.local.steps},
        "shards": list(target.shards),
        "synchronized": target.synchronized,
        "bn_statistics": 0 if target.bn_statistics is None else len(target.bn_statistics),
        "defenses": list(target.defenses),
        "dropout_seed": target.dropout_seed,
        "running_after": target.running_after is not None,
    }


def describe_gradient(target: Target) -> dict[str, Any]:
    """The size of the shared gradient: L2 norm by parameter and of all together."""
    norms = {name: float(g.double().norm()) for name, g in target.gradient.items()}
    return {
        "n_gradients": len(norms),
        "gradient_norms": norms,
        "gradient_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
    }
