"""Against the shadow defense: the noise's size is known wherever it is."""

from __future__ import annotations

import torch

from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.knowledge.likely import Attempt, Likely
from attack.knowledge.noised_inputs import denoised, disturbed, is_plain, trained_on
from core.target import Target
from gradients.defenses.base import stated
from gradients.defenses.shadow import Shadow


@register_adaptation("shadow")
def _shadow(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    if isinstance(target.model, EncodedArchitecture):
        adaptation.notes.append("shadow: candidates get the noise that the client's images have")
    else:
        adaptation.notes.append("shadow: the noised images are matched, and the noise stays")


def likeliest_noise_map(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    """The target whose model adds to private images the noise that the client added.

    The gradient determines the noised images. The shadow model is the received one: at the
    noised images it is sensitive about where it is at the private ones, and tells the noise's
    size at every place. The likeliest smooth image behind noise of that size is taken.

    Args:
        target: What was shared under the shadow defense.
        labels: N, as the loss takes them.
        attempt: An attack.
    """
    if not is_plain(target):
        return Likely(target)
    defense = stated(target.defenses, Shadow)
    seen = trained_on(target, attempt)
    model = target.build_model().to(seen)
    model.train(target.train_mode)
    inputs = target.data.normalize(seen)
    size = defense.noise_size(model, inputs, labels.to(seen.device), target.loss)
    images = denoised(seen, size.square())
    return Likely(disturbed(target, 1.0, seen - images), images)
