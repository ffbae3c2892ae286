"""Closed form of the first fully connected layer (Phong et al. 2018; Geiping et al. 2020)."""

from __future__ import annotations

import time
from typing import Any

import torch

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.attacks.parts.first_layer import FirstLayer, first_layer
from attack.reconstruction import Reconstruction
from core.target import Target

# Rows whose quotients agree to this relative precision see the same single image.
SAME_IMAGE = {torch.float64: 1e-6, torch.float32: 1e-3}
# A bias gradient below this share of the largest is rounding and no divisor.
NO_SIGNAL = 1e-9


@register_attack
class Analytic(Attack):
    """Divide the weight gradient of the first fully connected layer by its bias gradient.

    One image activates neuron i: dL/dW_i = dL/db_i x^T, thus x = (dL/dW_i) / (dL/db_i).
    In a batch this holds for every neuron that a single image activates; such rows are
    told apart by agreeing with each other, then by lying in the valid range. Rows that
    several images activate give mixtures of them.

    Any number of local steps on one image leaves the quotient as it is.

    Source: Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via
        Additively Homomorphic Encryption", IEEE TIFS 2018, section 3,
        https://eprint.iacr.org/2017/715; Geiping et al., "Inverting Gradients", NeurIPS
        2020, proposition 3.1, https://arxiv.org/abs/2003.14053.

    Example:
        python main_run.py --attack analytic --checkpoint CHECKPOINT --metric
    """

    name = "analytic"

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random.

        Raises:
            InputError: The model has no such layer, or did not share its gradient.
        """
        began = time.perf_counter()
        layer = first_layer(target, self.name, device)
        dtype = target.gradient[f"{layer.name}.weight"].dtype
        candidates, rows = layer_inputs(layer, target.batch_size, SAME_IMAGE.get(dtype, 1e-3))
        images = layer.network_inputs(candidates)
        best = _most_plausible(target, images, rows)[: target.batch_size]
        return closed_form_reconstruction(
            target,
            images[best],
            labels,
            device=device,
            began=began,
            iterations=1,
            details={"rows_per_image": rows[best].tolist()},
        )


def layer_inputs(
    layer: FirstLayer, batch_size: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate inputs of the layer.

    Args:
        layer: What the client shared of the layer.
        batch_size: Of one image all rows speak, and noise is averaged out.
        tolerance: Relative distance of rows that are counted as the same.

    Returns:
        Candidates (k x d) and the number of rows that agree on each.
    """
    weight, bias = layer.weight_gradient, layer.bias_gradient
    live = bias.abs() > NO_SIGNAL * bias.abs().max()
    weight, bias = weight[live], bias[live]
    if batch_size == 1 and len(bias):
        whole = (bias @ weight) / bias.square().sum()
        return whole[None], torch.tensor([len(bias)], device=bias.device)
    return _agreeing(weight / bias[:, None], tolerance)


def _agreeing(rows: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One representative of each group of equal rows, and the groups' sizes."""
    # Not by the product of matrices, which loses half the digits.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    near = apart <= tolerance * rows.norm(dim=1, keepdim=True)
    counts = near.sum(1)
    # The first row of a group speaks for it.
    first = near.double().argmax(1) == torch.arange(len(rows), device=rows.device)
    return rows[first], counts[first]


def _most_plausible(target: Target, inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Order of candidates: confirmed by other rows first, then by how far out of range."""
    images = target.data.denormalize(inputs.reshape(-1, *target.data.shape).cpu())
    columns = target.data.columns
    valid = target.data.clamp(images) if columns is None else columns.project(images)
    outside = (images - valid).flatten(1).norm(dim=1).to(rows.device)
    outside = outside + images.shape[1:].numel() * (rows == 1)
    return outside.argsort(stable=True)
