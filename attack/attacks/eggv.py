"""EGGV: invert whole batches of a model that was trained to leak them (Xiang et al. 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.parts import published
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import Targets
from core.models.malicious import malice_of
from core.target import Target


@register_attack
class Eggv(OptimizationAttack):
    """Invert the gradient of a model that was poisoned for whole batches.

    The server trained the model so that its gradients move with every image of a batch (stage 2:
    `--malicious eggv:STEPS`). Any attack by optimisation will do; here it is this project's own,
    with its setting. All images of the batch are candidates: none is drowned out.

    Only the abstract of the paper could be read. It reports a PSNR that is at least 43 % above that
    of other active attacks. Ours, on `lenet` at 8 px and batch 2: under noise of a tenth of the
    gradient's size, 60 steps gain 1.9 dB, and every image gains.

    Source: Xiang, Yang, Hao, Li, Wang, Ding, Jiang, Zhang, "The Gradient Puppeteer: Adversarial
        Domination in Gradient Leakage Attacks through Model Poisoning", 2025,
        https://arxiv.org/abs/2502.04106.

    Published: no value with a setting in the part that could be read.

    Example:
        python training/get_gradients.py --data photo-patches -a lenet -b 4 --malicious eggv:100
        python main_run.py --attack eggv --checkpoint CHECKPOINT --metric
    """

    name = "eggv"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})
    fits = frozenset({Targets.CLASSES})
    published = published.SPECTRAL

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`.

        Raises:
            InputError: The model was not poisoned.
        """
        if not malice_of(target.model).startswith("eggv"):
            raise InputError(
                f"--attack {self.name}: {target.model.name} is honest; a malicious server "
                "trains it to leak in stage 2 with --malicious eggv:STEPS"
            )
        return super().reconstruct(target, labels=labels, device=device, seed=seed, **run)
