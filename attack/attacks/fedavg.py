"""Attacks on the update of several local steps (federated averaging)."""

import dataclasses
from typing import Any

import torch

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.knowledge.threat_models import Capability
from attack.loop.inversion import Inversion, Parts
from attack.loop.loss_terms import make_regularizers
from attack.loop.problem import InversionProblem
from attack.metrics import assign
from attack.priors.regularizers import EpochOrderPrior, Regularizer
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.errors import InputError
from core.target import Target


@register_attack
class InvertingGradientsFedAvg(OptimizationAttack):
    """Inverting Gradients on a weight update: the client's local steps are unrolled.

    Source: Geiping, Bauermeister, Droege, Moeller, "Inverting Gradients", NeurIPS 2020,
    section 6, https://arxiv.org/abs/2003.14053;
    https://github.com/JonasGeiping/invertinggradients ("Recovery from Weight Updates").

    Published: 20.78 dB on four images of CIFAR-10 with a ResNet-18, in the notebook of
    https://github.com/JonasGeiping/breaching.

    Reproduced:
        inverting-gradients-fedavg: needs a GPU (about 12 hours).

    Args:
        config: Defaults: signed Adam 0.1, tenfold down at 3/8, 5/8 and 7/8, 8000 iterations,
            total variation 1e-6, boxed.

    Shape:
        N x C x H x W images in [0, 1] and N labels (label rule "fedavg").

    Example:
        >>> attack = InvertingGradientsFedAvg()
        >>> found = attack.reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "inverting-gradients-fedavg"
    requires = frozenset({Capability.BATCH_SIZE, Capability.LOCAL_TRAINING})
    label_rule = "fedavg"
    published = InversionConfig(iterations=8000, schedule="step", tv=1e-6)


@register_attack
class DataLeakageFedAvg(OptimizationAttack):
    """Images of every local epoch of their own, tied by a prior that ignores their order.

    Source: Dimitrov, Balunovic, Konstantinov, Vechev, "Data Leakage in Federated Averaging",
    TMLR 2022, https://openreview.net/forum?id=e7A0B99zJf;
    https://github.com/eth-sri/fedavg_leakage (CIFAR-100).

    The attacker does not know in which order an epoch visits the images, so that each of the
    E epochs gets N images; a random convolution's maxima over each epoch's images must
    agree. In the end the copies are matched to those of the first epoch and averaged.
    The published gradient weight falls from 4 to 2 and is 2 here; the box replaces a penalty
    on values outside it.

    Args:
        config: Defaults: squared distance whose weight falls by e from layer to layer, Adam
            0.1, cosine in place of a slow exponential decay, 400 iterations, total variation
            2e-4.

    Shape:
        N x C x H x W images in [0, 1] and N labels (label rule "fedavg").

    Example:
        >>> attack = DataLeakageFedAvg()
        >>> found = attack.reconstruct(target, labels=labels, device=device, seed=0)
    """

    name = "data-leakage-fedavg"
    requires = frozenset({Capability.BATCH_SIZE, Capability.LOCAL_TRAINING})
    label_rule = "fedavg"
    order_weight = 6.075
    published = InversionConfig(
        objective="L2",
        layers="decay",
        iterations=400,
        signed=False,
        gradient_weight=2.0,
        tv=2e-4,
    )

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor,
        device: torch.device,
        seed: int,
        prior: torch.Tensor | None = None,
        first_restart: int = 0,
        **run: Any,
    ) -> Reconstruction:
        """See `OptimizationAttack.reconstruct`."""
        epochs = target.local.epochs
        # The published distance is of the sum over steps and divided by their number.
        config = self.config.changed(
            gradient_weight=self.config.matching.gradient_weight * target.local.updates
        )
        order = EpochOrderPrior(epochs, target.data.shape[0], seed, dims=len(target.data.shape) - 1)

        def regularizers(problem: InversionProblem) -> list[tuple[float, Regularizer]]:
            tied = [(self.order_weight, order)] if epochs > 1 else []
            return [*make_regularizers(problem), *tied]

        inversion = Inversion(
            one_long_epoch(target),
            labels.repeat(epochs, *[1] * (labels.dim() - 1)),
            config,
            device=device,
            seed=seed,
            prior=None if prior is None else prior.repeat(epochs, *[1] * (prior.dim() - 1)),
            first_restart=first_restart,
            parts=Parts(regularizers=regularizers),
        )
        found = inversion.run(**run)
        found.images = average_of_epochs(found.images, epochs)
        found.labels = labels.cpu()
        return found


def one_long_epoch(target: Target) -> Target:
    """The same update, as of one epoch over `epochs` times as many images.

    Raises:
        InputError: The local batches differ in size, epochs mix the images, or the update is the
            mean of several clients'.
    """
    local = target.local
    if target.n_clients > 1:
        raise InputError(
            "--attack data-leakage-fedavg: it inverts one client's update, and this is the mean of "
            f"{target.n_clients}"
        )
    if local.order is not None:
        raise InputError(
            "--attack data-leakage-fedavg: it does not know which images share which local "
            "steps, and this target states it"
        )
    if target.batch_size % local.batches:
        raise InputError(
            f"--attack data-leakage-fedavg: {target.batch_size} images do not make "
            f"{local.batches} local batches of one size"
        )
    long = dataclasses.replace(local, epochs=1, batches=local.steps)
    return dataclasses.replace(
        target,
        batch_size=target.batch_size * local.epochs,
        local=long,
        shards=tuple(n * local.epochs for n in target.shards),
    )


def average_of_epochs(images: torch.Tensor, epochs: int) -> torch.Tensor:
    """The mean over epochs (E N x C x H x W to N x C x H x W), matched to the first."""
    first, *others = images.chunk(epochs)
    return torch.stack([first, *(other[assign(other, first)] for other in others)]).mean(0)
