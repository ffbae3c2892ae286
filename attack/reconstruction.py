"""What an attack returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Reconstruction:
    """The outcome of one attack on one target.

    Attributes:
        images: N x C x H x W in [0, 1], on the CPU.
        labels: N recovered class indices.
        objective: The gradient loss of `images`.
        trace: One dictionary per printed iteration (iteration, objective, ...).
        seconds: Wall-clock time of the attack.
        iterations: Iterations done.
        status: "finished", "target-tv", "patience", "time" or "diverged".
        details: Anything else worth recording, plain values.
        members: Of an ensemble, every attack's own result by its name.
    """

    images: torch.Tensor
    labels: torch.Tensor
    objective: float
    trace: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    iterations: int = 0
    status: str = "finished"
    details: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Reconstruction] = field(default_factory=dict)
