"""Fishing: one class drowns out all others (Wen et al. 2022)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from attack.attacks.base import OptimizationAttack, register_attack
from attack.attacks.spectral import Spectral
from attack.inversion import Snapshot
from attack.reconstruction import Reconstruction
from attack.threat import Capability
from gradients.checkpoint import Target
from training.errors import InputError
from training.malicious import parse_malice
from training.models import last_linear

# Features' gradients below this share of the largest come from the drowned classes.
SILENCE = 1e-20


@register_attack
class Fishing(OptimizationAttack):
    """Invert the one image that a tampered last layer lets through, as if it were alone.

    The server sent a last layer that only images of one class move (stage 2: `--malicious
    fishing:CLASS`): for all others the gradient of the features vanishes. What is shared of
    the layers before, times the batch size, is the gradient of a batch of one. Any attack
    by optimisation will do; here it is this project's own, with its setting.

    One image per class: several of the class mix (the paper's feature fishing, which
    separates them over rounds, is not built in). The rest of the batch stays unknown.

    Source: Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch
        Federated Learning via Gradient Magnification", ICML 2022,
        https://arxiv.org/abs/2202.00580.

    Example:
        python training/get_gradients.py --data photo-patches --model-eval --malicious fishing:3
        python main_run.py --attack fishing --checkpoint CHECKPOINT --metric
    """

    name = "fishing"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})
    published = Spectral.published

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor,
        device: torch.device,
        seed: int,
        prior: torch.Tensor | None = None,
        first_restart: int = 0,
        on_snapshot: Snapshot | None = None,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`; the first image is the one that was fished.

        Raises:
            InputError: The model was not tampered with, or BatchNorm mixes the images.
        """
        alone = fished_target(target, self.name)
        label = parse_malice(target.model.malicious, target.model.n_classes).number
        mean = target.data.denormalize(torch.zeros((1, *target.data.shape))).clamp(0, 1)
        rest = mean.expand(target.batch_size - 1, *target.data.shape)

        def whole(fished: torch.Tensor) -> torch.Tensor:
            return torch.cat([fished, rest])

        found = super().reconstruct(
            alone,
            labels=torch.tensor([label]),
            device=device,
            seed=seed,
            prior=prior,
            first_restart=first_restart,
            on_snapshot=None if on_snapshot is None else lambda i, x: on_snapshot(i, whole(x)),
            **run,
        )
        others = _without(labels.tolist(), label)[: target.batch_size - 1]
        return dataclasses.replace(
            found,
            images=whole(found.images),
            labels=torch.tensor([label, *others]),
            details={**found.details, "solved": 1},
        )


def fished_target(target: Target, attack: str) -> Target:
    """The batch of one behind the shared gradient of a model tampered with by fishing.

    Args:
        target: What was shared.
        attack: Who asks, for messages.

    Raises:
        InputError: The model was not tampered with, BatchNorm mixes the images, several
            local steps, or the layers before the last were not shared.
    """
    if not target.model.malicious.startswith("fishing"):
        raise InputError(
            f"--attack {attack}: the last layer of {target.model.arch} is honest; a malicious "
            "server changes it in stage 2 with --malicious fishing:CLASS"
        )
    model = target.build_model()
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    if target.train_mode and any(isinstance(m, batch_norm) for m in model.modules()):
        raise InputError(
            f"--attack {attack}: train-mode BatchNorm mixes the fished image with the others; "
            "take the gradient with --model-eval, or a model with --norm group"
        )
    if target.local.steps > 1:
        raise InputError(f"--attack {attack}: needs the gradient of one local step")
    last, _ = last_linear(model)
    gradient = {
        name: g * target.batch_size
        for name, g in target.gradient.items()
        if name.rpartition(".")[0] != last
    }
    largest = max(float(g.abs().max()) for g in target.gradient.values())
    if not any(float(g.abs().max()) > SILENCE * largest for g in gradient.values()):
        raise InputError(
            f"--attack {attack}: no image of the class is in the batch (its gradient is zero)"
        )
    return dataclasses.replace(
        target, gradient=gradient, batch_size=1, shards=(1,), synchronized=True, bn_statistics=None
    )


def _without(labels: list[int], label: int) -> list[int]:
    """The labels less one occurrence of `label`."""
    at = labels.index(label) if label in labels else len(labels)
    return [*labels[:at], *labels[at + 1 :]]
