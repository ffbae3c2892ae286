"""Deep Leakage from Gradients (Zhu et al. 2019)."""

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.parts import published
from attack.knowledge.threat_models import Capability


@register_attack
class DLG(OptimizationAttack):
    """L-BFGS on the squared gradient distance, over images and labels jointly.

    Source: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019,
    https://arxiv.org/abs/1906.08935; https://github.com/mit-han-lab/dlg.

    Published: 23.41 dB on one image of CIFAR-10 with a ConvNet of width 64, 1200 iterations from
    one start, in the notebook of https://github.com/JonasGeiping/breaching; 46.25 dB (deviation
    12.66) on 100 images with the LeNet, in table 1 of https://arxiv.org/abs/2003.14053.

    Reproduced:
        dlg-lenet: 46.29 (33.29 to 57.23, n = 8), 2026-11-30: reproduced.
        dlg-convnet: needs a GPU (about 4 hours).
        beyond-inferring-convnet: needs a GPU (about 2 hours).

    Needs a network with a second derivative (sigmoids; ReLU gives it little to follow) and
    gradients of a freshly initialised one. One iteration is one `step` of `torch.optim.LBFGS`
    with its default of 20 inner iterations; the line search has none, as published, so that
    some starts diverge: give `--n-seed`.

    Args:
        config: Defaults: L-BFGS, learning rate 1, 300 iterations (the paper's 1200 for
            batches), normal start, labels as free logits, no prior, no box.

    Shape:
        N x C x H x W images in [0, 1] and N labels.

    Example:
        >>> found = DLG().reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "dlg"
    requires = frozenset({Capability.BATCH_SIZE})
    published = published.DLG
