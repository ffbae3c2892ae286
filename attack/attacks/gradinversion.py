"""GradInversion (Yin et al. 2021)."""

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.knowledge.threat_models import Capability
from attack.settings import InversionConfig


@register_attack
class GradInversion(OptimizationAttack):
    """Gradient, BatchNorm and image priors, and several seeds that are drawn to each other.

    Source: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, "See through Gradients: Image
    Batch Recovery via GradInversion", CVPR 2021, https://arxiv.org/abs/2104.07586.

    Published: 13.92 dB, LPIPS 0.72, on one image of ImageNet with a ResNet-50, in the notebook
    of https://github.com/JonasGeiping/breaching.

    Reproduced:
        gradinversion-1: needs a GPU (about 12 hours).
        gradinversion-2: needs a GPU (about 12 hours).
        gradinversion-3: needs a GPU (about 12 hours).
        gradinversion-4: needs a GPU (about 90 hours).

    The norms are those of the paper (sums over layers and pixels, not means), so that its
    weights mean what they mean there. After a quarter of the iterations (5000 of 20000) the
    seeds are registered onto their mean every 100 iterations and drawn to the result. The
    paper registers by RANSAC-flow, a trained network; here it is the best whole-pixel
    translation, by cross-correlation, which follows shifts and no warps.
    Without BatchNorm in the network give `--BN 0`.

    Args:
        config: Defaults: Adam 0.1, cosine after 50 iterations of warm-up, 20000 iterations,
            8 seeds, gradient 1e-3, total variation 1e-4, l2 1e-6, BatchNorm 0.1 (running
            statistics; `--exact-bn` for the batch's), group 0.01, noise 0.2.

    Shape:
        N x C x H x W images in [0, 1] and N labels without repetition (label rule "yin").

    Example:
        >>> labels = recover_labels("yin", target)
        >>> found = GradInversion().reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "gradinversion"
    requires = frozenset({Capability.BATCH_SIZE, Capability.RUNNING_STATISTICS})
    label_rule = "yin"
    published = InversionConfig(
        objective="layer-L2",
        iterations=20000,
        lr=0.1,
        lr_min=0.0,
        warmup=50,
        signed=False,
        gradient_weight=1e-3,
        tv=1e-4,
        tv_kind="norm",
        input_norm=1e-6,
        bn=0.1,
        input_noise=0.2,
        restarts=8,
        group=0.01,
        group_start=0.25,
        group_every=100,
        registration=True,
    )
