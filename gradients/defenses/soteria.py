"""Soteria: perturb the representation in front of the classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from core.models.head import find_linear_head
from gradients.defenses.base import ClientView, Defense, Gradient, register_defense, require


@register_defense("soteria")
@dataclass(frozen=True)
class Soteria(Defense):
    """Hide the features of the last layer that say most about the input.

    With r the representation in front of the last fully connected layer, the
    features with the smallest |dr_i/dX| / |r_i|, summed over the batch, are set to
    zero; the layer's weight gradient (dL/dz) r^T loses the corresponding columns.
    Takes one backward pass per feature.

    Args:
        fraction: Share of the features that is set to zero (rounded down).

    Source: Sun et al., "Soteria: Provable Defense Against Privacy Leakage in
        Federated Learning From Representation Perspective", CVPR 2021, equations 7
        and 8, https://arxiv.org/abs/2012.06043.
    """

    fraction: float = 0.8

    def __post_init__(self) -> None:
        require(0 <= self.fraction < 1, "the fraction must lie in [0, 1)")

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """Mask the weight gradient of the last fully connected layer."""
        name, _ = find_linear_head(client.model, client.images[:1])
        weight = f"{name}.weight" if name else "weight"
        if weight not in gradient:
            return dict(gradient)
        sensitivity = feature_sensitivity(client.model, client.images)
        hidden = sensitivity.topk(int(self.fraction * len(sensitivity)), largest=False).indices
        masked = gradient[weight].clone()
        masked[:, hidden] = 0
        return {**gradient, weight: masked}


def feature_sensitivity(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """|dr_i/dX| / |r_i| for every feature i, summed over the batch.

    Args:
        model: Has a last fully connected layer; its buffers are left unchanged.
        images: N x C x H x W, normalised.

    Returns:
        One value per input feature of the layer.
    """
    captured: list[torch.Tensor] = []
    _, layer = find_linear_head(model, images[:1])
    hook = layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    inputs = images.detach().clone().requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        torch.func.functional_call(model, buffers, (inputs,))
    finally:
        hook.remove()
    features = captured[0].flatten(1)
    total = torch.zeros(features.shape[1], device=images.device)
    for index in tqdm(range(features.shape[1]), desc="soteria", disable=None):
        column = features[:, index]
        (derivative,) = torch.autograd.grad(column.sum(), inputs, retain_graph=True)
        # A feature that is zero for an image says nothing about it: infinite, kept.
        ratio = derivative.flatten(1).norm(dim=1) / column.detach().abs()
        total[index] = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).sum()
    return total
