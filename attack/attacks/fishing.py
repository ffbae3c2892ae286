"""Fishing: one class, or one feature of it, drowns out the rest (Wen et al. 2022)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.parts import published
from attack.knowledge.threat_models import Capability
from attack.loop.inversion import Snapshot
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.losses import Targets
from core.models.building import last_linear
from core.models.kinds import BatchNorm
from core.models.malicious import malice_of, parse_malice
from core.target import Target

# Features' gradients below this share of the largest come from the drowned classes.
SILENCE = 1e-20
# So far below the other logits that every candidate passes.
PASSING_LOGIT = -1e6


@register_attack
class Fishing(OptimizationAttack):
    """Invert the few images that a tampered last layer lets through, as if they were alone.

    The server sent a last layer that only some images move; for all others the gradient of
    the features vanishes. What is shared of the layers before is the gradient of a smaller
    batch, whose size the last layer's bias tells. Any attack by optimisation will do; here
    it is this project's own, with its setting. The rest of the batch stays unknown.

    - Class fishing (stage 2: `--malicious fishing:CLASS`): the images of one class pass.
      One alone is inverted as a batch of one; several of the class are as hard to tell
      apart as any small batch of one label.
    - Feature fishing (`--malicious fishing-feature:CLASS[:FEATURE[:CUT]]`): of the images
      of the class only those pass whose feature lies below a cut, which the server puts
      where it expects one. In one shot, as here, exactly one passes with probability 1/e
      for a batch of one class; the paper's search for the cut over rounds raises that.
      Images of other classes with the feature above the cut pass as well and spoil it.

    Source: Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch
        Federated Learning via Gradient Magnification", ICML 2022,
        https://arxiv.org/abs/2202.00580.

    Published: a registered PSNR of 20.23 dB of the best of 256 images of ImageNet with a trained
        ResNet-18, in the notebook of https://github.com/JonasGeiping/breaching.

    Reproduced:
        fishing: needs a GPU (about 4 hours).

    Example:
        python training/get_gradients.py --data photo-patches --model-eval --malicious fishing:3
        python main_run.py --attack fishing --checkpoint CHECKPOINT --metric
    """

    name = "fishing"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.MALICIOUS_SERVER})
    fits = frozenset({Targets.CLASSES})
    published = published.SPECTRAL
    # What was fished is one image.
    shares_a_batch: ClassVar[bool] = False

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
        """See `Attack.reconstruct`; the first images are those that were fished.

        Raises:
            InputError: The model was not tampered with, or BatchNorm mixes the images.
        """
        alone = fished_target(target, self.name)
        fished = alone.batch_size
        label = parse_malice(malice_of(target.model), target.data.n_classes).number
        mean = target.data.clamp(target.data.denormalize(torch.zeros((1, *target.data.shape))))
        rest = mean.expand(target.batch_size - fished, *target.data.shape)

        def whole(images: torch.Tensor) -> torch.Tensor:
            return torch.cat([images, rest])

        found = super().reconstruct(
            alone,
            labels=torch.full((fished,), label),
            device=device,
            seed=seed,
            prior=None if prior is None else prior[:fished],
            first_restart=first_restart,
            on_snapshot=None if on_snapshot is None else lambda i, x: on_snapshot(i, whole(x)),
            **run,
        )
        others = _without(labels.tolist(), label, fished)[: target.batch_size - fished]
        return dataclasses.replace(
            found,
            images=whole(found.images),
            labels=torch.tensor([*[label] * fished, *others]),
            details={**found.details, "solved": fished},
        )


def fished_target(target: Target, attack: str) -> Target:
    """The smaller batch behind the shared gradient of a model tampered with by fishing.

    Args:
        target: What the client shared.
        attack: Who asks, for messages.

    Returns:
        The target of the images that passed, and of a model through which they do: one
        that is not fished by the feature would silence candidates above the cut.

    Raises:
        InputError: The model was not tampered with, BatchNorm mixes the images, several
            local steps, or no image passed.
    """
    model = _fishing_model(target, attack)
    last, layer = last_linear(model)
    malice = parse_malice(malice_of(target.model), target.data.n_classes)
    before = {n: g for n, g in target.gradient.items() if n.rpartition(".")[0] != last}
    bias = target.gradient.get(f"{last}.bias")
    # Every image that passes is classified wrongly for certain: its loss pulls by one.
    passed = 1 if bias is None else round(-target.batch_size * float(bias[malice.number]))
    largest = max(float(g.abs().max()) for g in target.gradient.values())
    silent = not any(float(g.abs().max()) > SILENCE * largest for g in before.values())
    if silent or passed < 1:
        raise InputError(f"--attack {attack}: no image of the class passes (its gradient is zero)")
    fished = min(passed, target.batch_size)
    state = dict(target.state_dict)
    if malice.kind == "fishing-feature":
        state[f"{last}.bias"] = torch.zeros_like(layer.bias)
        state[f"{last}.bias"][malice.number] = PASSING_LOGIT
    return dataclasses.replace(
        target,
        state_dict=state,
        gradient={name: g * (target.batch_size / fished) for name, g in before.items()},
        batch_size=fished,
        shards=(fished,),
        synchronized=True,
        bn_statistics=None,
        clients=(),
    )


def _fishing_model(target: Target, attack: str) -> nn.Module:
    """The shared model, if it fishes and nothing mixes what it fishes with the rest."""
    if not malice_of(target.model).startswith("fishing"):
        raise InputError(
            f"--attack {attack}: the last layer of {target.model.name} is honest; a malicious "
            "server changes it in stage 2 with --malicious fishing:CLASS"
        )
    model = target.build_model()
    if target.train_mode and any(isinstance(m, BatchNorm) for m in model.modules()):
        raise InputError(
            f"--attack {attack}: train-mode BatchNorm mixes the fished image with the others; "
            "take the gradient with --model-eval, or a model with --norm group"
        )
    if not target.local.shares_gradient:
        raise InputError(f"--attack {attack}: needs the gradient of one local step")
    return model


def _without(labels: list[int], label: int, times: int) -> list[int]:
    """The labels less so many occurrences of `label`."""
    for _ in range(min(times, labels.count(label))):
        labels.remove(label)
    return labels
