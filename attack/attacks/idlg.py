"""Improved Deep Leakage from Gradients (Zhao et al. 2020)."""

from typing import Any

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.parts import published
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import Targets
from core.target import Target


@register_attack
class IDLG(OptimizationAttack):
    """DLG on one image, whose label the sign of the last layer's gradient gives away.

    Source: Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020,
    https://arxiv.org/abs/2001.02610.

    Published: the right label of every image (table 1).

    Reproduced:
        idlg-lenet: 46.95 (35.58 to 56.88, n = 8), 2026-11-30: reproduced.

    Args:
        config: Defaults: those of `DLG` with the label fixed (label rule "idlg").

    Shape:
        1 x C x H x W image in [0, 1] and 1 label.

    Example:
        >>> labels = recover_labels("idlg", target)
        >>> found = IDLG().reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "idlg"
    requires = frozenset({Capability.BATCH_SIZE})
    fits = frozenset({Targets.CLASSES})
    label_rule = "idlg"
    published = published.DLG.changed(joint_labels=False)

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`.

        Raises:
            InputError: More than one image is behind the gradient.
        """
        if target.batch_size != 1:
            raise InputError(
                f"--attack idlg: made for one image and this gradient has {target.batch_size}; "
                "use dlg"
            )
        return super().reconstruct(target, labels=labels, device=device, seed=seed, **run)
