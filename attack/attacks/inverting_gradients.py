"""Inverting Gradients (Geiping et al. 2020)."""

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.settings import InversionConfig


@register_attack
class InvertingGradients(OptimizationAttack):
    """Cosine distance, signed Adam, total variation, boxed images.

    Source: Geiping, Bauermeister, Droege, Moeller, "Inverting Gradients - How easy is it to
    break privacy in federated learning?", NeurIPS 2020, https://arxiv.org/abs/2003.14053.
    Setting for trained networks: 24000 iterations, total variation 1e-1, learning rate 0.1
    falling tenfold at 3/8, 5/8 and 7/8.

    Published: 14.21 dB, LPIPS 0.42, on one image of ImageNet with a ResNet-18, in the notebook
    of https://github.com/JonasGeiping/breaching; 18.00 dB (deviation 3.33) on 100 images of
    CIFAR-10 with the untrained LeNet of DLG, in table 1 of the paper.

    Reproduced:
        inverting-gradients-lenet: 15.49 (13.71 to 17.53, n = 8), 2026-11-28: below: where the
          second implementation ran on the same gradients it finds as much; the table's total
          variation and restarts are not stated where we read them.
        inverting-gradients-resnet18: needs a GPU (about 3 hours).
        inverting-gradients-imagenet: needs a GPU (about 4 hours).
    """

    name = "inverting-gradients"
    published = InversionConfig(iterations=24000, schedule="step", tv=1e-1, restarts=1)
