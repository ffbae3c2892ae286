"""E2EGI, end-to-end gradient inversion (Li et al. 2022)."""

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.knowledge.threat_models import Capability
from attack.settings import InversionConfig


@register_attack
class E2EGI(OptimizationAttack):
    """Signed cosine matching whose seeds are fused per image by minimum loss (MLCO).

    Source: Li, Wang, Chen, Zhang, Shafiq, Gu, "E2EGI: End-to-End Gradient Inversion in
    Federated Learning", IEEE JBHI 27(2), 2023, https://doi.org/10.1109/JBHI.2022.3204455;
    https://github.com/zhaohuali/E2EGI.

    Reproduced:
        e2egi: needs a GPU (about 100 hours).

    Three stages: seeds on their own (0.3 of the iterations), seeds drawn to a fusion that is
    renewed every 1000 iterations (0.3), and the newest fusion alone without noise (0.4). The
    published program continues from the fusion before the newest one, an oversight.

    Args:
        config: Defaults: signed Adam 0.1046, falling stage by stage, 24000 iterations,
            8 seeds, total variation 0.0114, BatchNorm 0.0357 on the exact statistics of the
            batch, group 0.01, noise 0.2.

    Shape:
        N x C x H x W images in [0, 1] and N labels (label rule "llg").

    Example:
        >>> found = E2EGI().reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "e2egi"
    label_rule = "llg"
    requires = frozenset({Capability.BATCH_SIZE, Capability.BATCH_STATISTICS})
    published = InversionConfig(
        iterations=24000,
        lr=0.1046,
        tv=0.0114,
        bn=0.0357,
        exact_bn=True,
        input_noise=0.2,
        restarts=8,
        combine=True,
        combine_every=1000,
        stages=(0.3, 0.3, 0.4),
        group=0.01,
    )
