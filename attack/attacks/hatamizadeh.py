"""The attack on BatchNorm-updating clients of Hatamizadeh et al. (2022)."""

from typing import Any

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.knowledge.threat_models import Capability
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.target import Target


@register_attack
class Hatamizadeh(OptimizationAttack):
    """Weight differences and the batch's BatchNorm statistics, from a prior image on.

    Source: Hatamizadeh, Yin, Molchanov, Myronenko, Li, Dogra, Feng, Flores, Kautz, Xu, Roth,
    "Do Gradient Inversion Attacks Make Federated Learning Unsafe?", IEEE TMI 42(7), 2023,
    https://arxiv.org/abs/2202.06924; settings of the example `quantifying-data-leakage` of
    https://github.com/NVIDIA/NVFlare.

    Reproduced:
        rdlv-round-20: needs a GPU (about 20 hours).
        rdlv-round-40: needs a GPU (about 20 hours).
        rdlv-round-60: needs a GPU (about 20 hours).
        rdlv-round-80: needs a GPU (about 20 hours).

    The client runs in train mode, and its batch statistics follow from the running ones it
    shares. What is matched is the weight difference, per layer by its Euclidean norm: the
    weight of the gradient is the paper's times the client's learning rate and steps. Their
    program adds the noise to a copy of the images that it throws away; here it acts. Labels
    are optimised as logits of a softmax. Batch statistics are those of the model that was
    sent, not of the updated one.

    Args:
        config: Defaults: Adam with betas 0.9 and 0.9, learning rate 0.1 after 100 iterations
            of warm-up, cosine to 0, 40000 iterations, gradient 1e-3, BatchNorm 0.1, energy
            noise 0.1, total variation (l2) 1e-4, l2 1e-5, start from the prior image
            (`--start zeros` without one), the last iterate.

    Shape:
        N x C x H x W images in [0, 1] and N labels; the prior image likewise, or one of it.

    Example:
        >>> attack = Hatamizadeh()
        >>> found = attack.reconstruct(target, labels=labels, device=device, seed=0, prior=mean)
    """

    name = "hatamizadeh"
    requires = frozenset(
        {
            Capability.BATCH_SIZE,
            Capability.BATCH_STATISTICS,
            Capability.LOCAL_TRAINING,
            Capability.PRIOR_DATA,
        }
    )
    published = InversionConfig(
        objective="layer-L2",
        iterations=40000,
        betas=(0.9, 0.9),
        lr=0.1,
        lr_min=0.0,
        warmup=100,
        signed=False,
        gradient_weight=1e-3,
        tv=1e-4,
        tv_kind="norm",
        input_norm=1e-5,
        bn=0.1,
        exact_bn=True,
        input_noise=0.1,
        box=False,
        start="prior",
        joint_labels=True,
        smallest_loss=False,
    )

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `OptimizationAttack.reconstruct`."""
        step = target.local.lr * target.local.updates
        weighted = self.config.changed(gradient_weight=self.config.matching.gradient_weight * step)
        attack = OptimizationAttack(weighted)
        return attack.reconstruct(target, labels=labels, device=device, seed=seed, **run)
