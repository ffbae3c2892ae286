"""The "modern" recipe of Geiping's `breaching`: what later work added to Inverting Gradients."""

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.knowledge.threat_models import Capability
from attack.settings import InversionConfig


@register_attack
class Modern(OptimizationAttack):
    """Cosine matching with soft signs, tiled start, coupled colours and known features.

    Source: the attack "modern" of https://github.com/JonasGeiping/breaching (2022), which
    combines Inverting Gradients (https://arxiv.org/abs/2003.14053) with warm-up and cosine
    decay (Yin et al. 2021, https://arxiv.org/abs/2104.07586), the tiled start of Wei et al.
    (2020, https://arxiv.org/abs/2004.10397), double-opponent total variation, and features
    of the last layer from its gradient's quotient.

    Published: 12.04 dB, LPIPS 0.39, on one image of ImageNet with a ResNet-18, in its own
    notebook.

    Reproduced:
        modern: needs a GPU (about 4 hours).

    Args:
        config: Defaults: Adam 0.1, cosine to 0 after 50 iterations of warm-up, 24000
            iterations, tanh(s g) / s in place of the sign with s falling to 0, start of
            tiled 4 x 4 noise, total variation 0.1, features 0.1, boxed.

    Shape:
        N x C x H x W images in [0, 1] and N labels.

    Example:
        >>> found = Modern().reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "modern"
    requires = frozenset({Capability.BATCH_SIZE})
    published = InversionConfig(
        iterations=24000,
        lr_min=0.0,
        warmup=50,
        signed=False,
        soft_sign=True,
        tv=0.1,
        tv_kind="double-opponents",
        features=0.1,
        start="pattern",
    )
