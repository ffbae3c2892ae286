"""Robbing the Fed: an imprint block in front of the model (Fowl et al. 2022)."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.bins import read_bins
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.attacks.parts.first_layer import first_layer
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.models.malicious import malice_of
from core.target import Target

# A bin whose bias gradient is below this share of the largest is empty.
EMPTY = {torch.float64: 1e-10, torch.float32: 1e-4}


@register_attack
class RobbingTheFed(Attack):
    """Read the images out of the bins of an imprint block.

    The server put the block there (stage 2: `--malicious imprint:BINS`). The gradients of
    two neighbouring neurons differ by the images whose brightness lies between their
    thresholds; an image that is alone in its bin is (difference of weight gradients) /
    (difference of bias gradients), exactly. Images that share a bin come out as a mixture.

    Source: Fowl, Geiping, Czaja, Goldblum, Goldstein, "Robbing the Fed: Directly Obtaining
        Private Data in Federated Learning with Modified Models", ICLR 2022,
        https://arxiv.org/abs/2110.13057.

    Published: 47.08 dB of the image that the one-shot block finds among 32,768 of ImageNet, in the
        notebook of https://github.com/JonasGeiping/breaching.

    Reproduced:
        robbing-the-fed: 98.88 (98.08 to 99.57, n = 8), 2026-11-28: above.

    Example:
        python training/get_gradients.py --data photo-patches -b 8 --malicious imprint:256
        python main_run.py --attack robbing-the-fed --checkpoint CHECKPOINT --metric
    """

    name = "robbing-the-fed"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random.

        Raises:
            InputError: The model has no imprint block.
        """
        began = time.perf_counter()
        if not malice_of(target.model).startswith("imprint"):
            raise InputError(
                f"--attack {self.name}: {target.model.name} has no imprint block; a malicious "
                "server adds it in stage 2 with --malicious imprint:BINS"
            )
        if not target.local.shares_gradient:
            raise InputError(f"--attack {self.name}: needs the gradient of one local step")
        layer = first_layer(target, self.name, device)
        dtype = target.gradient[f"{layer.name}.weight"].dtype
        found = read_bins(
            -layer.bias,
            layer.weight_gradient,
            layer.bias_gradient,
            target.batch_size,
            EMPTY.get(dtype, 1e-3),
        )
        return closed_form_reconstruction(
            target,
            layer.network_inputs(found),
            labels,
            device=device,
            began=began,
            iterations=1,
            details={"bins": len(layer.bias), "filled_bins": len(found)},
        )
