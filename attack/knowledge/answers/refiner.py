"""Against Refiner: robust data are found first, then what they were refined from."""

from __future__ import annotations

import torch

from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.knowledge.likely import Attempt, Likely
from attack.knowledge.noised_inputs import denoised, disturbed, is_plain, trained_on
from core.target import Target
from gradients.defenses.base import stated
from gradients.defenses.refiner import RATE, Refiner

# A descent does not go further, in pixels of [0, 1], than images have room.
FARTHEST = 0.25


@register_adaptation("refiner")
def _refiner(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    if isinstance(target.model, EncodedArchitecture):
        adaptation.notes.append("refiner: candidates are mixed with what the refinement added")
    else:
        adaptation.notes.append("refiner: the robust data are matched, and nothing taken back")


def likeliest_refinement(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    """The target whose model adds to private images what the refinement added.

    The gradient determines the robust data r as well as it does images without a defense. On
    average over the noise that the client drew, r is (1 - share) x + share / 2, moved by the
    descent: (r - share / 2) / (1 - share) is x with a disturbance of known size, and the
    likeliest smooth image behind it is taken. Counting key parameters more, whose gradient is
    that of x, told nothing; nor did what the descent does on average, computed at that image.

    Args:
        target: What was shared under Refiner.
        labels: Not needed.
        attempt: An attack.
    """
    if not is_plain(target):
        return Likely(target)
    defense, seen = stated(target.defenses, Refiner), trained_on(target, attempt)
    kept = 1 - defense.share
    mean, variance = disturbance(defense)
    images = denoised((seen - mean) / kept, seen.new_tensor(variance / kept**2))
    return Likely(disturbed(target, kept, seen - kept * images), images)


def disturbance(defense: Refiner) -> tuple[float, float]:
    """Mean and variance of what is added to (1 - share) x: uniform noise, and the descent."""
    moved = min(FARTHEST, RATE * defense.iterations / 2)
    return defense.share / 2, defense.share**2 / 12 + moved**2
