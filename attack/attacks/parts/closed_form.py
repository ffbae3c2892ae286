"""What attacks without an optimisation loop share: from solved inputs to a reconstruction."""

from __future__ import annotations

import time
from typing import Any

import torch

from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.reconstruction import Reconstruction
from core.processes import distributed
from core.target import Target


def gradient_loss(
    target: Target, inputs: torch.Tensor, labels: torch.Tensor, device: torch.device
) -> float:
    """Cosine distance of a candidate batch's gradient to the shared one, in float64.

    Args:
        target: What the client shared.
        inputs: N x C x H x W, normalised; or N x T token ids.
        labels: N class indices, or what else the client's loss takes.
        device: Device that runs the computation.
    """
    with distributed.alone():
        replica = Replica(target, device, torch.float64)
        matcher = GradientMatcher(replica, Cosine(), "exact")
        placed = target.data.placed(inputs, replica.parameters[0])
        return float(matcher.value(placed, labels.to(device)))


def closed_form_reconstruction(
    target: Target,
    solved: torch.Tensor,
    labels: torch.Tensor,
    *,
    device: torch.device,
    began: float,
    objective: float | None = None,
    **result: Any,
) -> Reconstruction:
    """A reconstruction from solved network inputs.

    Args:
        target: What the client shared.
        solved: k x (C * H * W) network inputs, k at most the batch size; images that
            were not found are shown in the mean colour.
        labels: N class indices, those of `solved` first.
        device: Device that evaluates the gradient loss.
        began: `time.perf_counter()` at the start of the attack.
        objective: The gradient loss, where the target's own model does not tell it; None: it
            is computed.
        result: Further fields of the reconstruction.
    """
    inputs = torch.zeros((target.batch_size, *target.data.shape), dtype=torch.float64)
    found = solved.reshape(-1, *target.data.shape)[: target.batch_size]
    inputs[: len(found)] = found.cpu().nan_to_num()
    images = target.data.clamp(target.data.denormalize(inputs))
    details = {"solved": len(found), **result.pop("details", {})}
    if objective is None:
        objective = gradient_loss(target, target.data.normalize(images), labels, device)
    return Reconstruction(
        images=images.float(),
        labels=labels.cpu(),
        objective=objective,
        seconds=time.perf_counter() - began,
        details=details,
        **result,
    )
