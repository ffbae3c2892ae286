"""Against ATS: candidates are private images, transformed as the client transformed its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from attack.knowledge.encoded_inputs import EncodedArchitecture
from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.knowledge.likely import Attempt, Likely
from core.target import Target
from gradients.defenses.ats import ATS, Steps, encoding, transformed
from gradients.defenses.base import stated

# Gradient steps, and their length, towards the image that a transformation makes most alike.
STEPS, RATE = 60, 0.06
# Weight of total variation there: it decides where two transformations fit alike.
SMOOTH = 0.03


@register_adaptation("ats")
def _ats(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    if isinstance(target.model, EncodedArchitecture):
        adaptation.notes.append("ats: candidates are transformed like the client's images")
    else:
        adaptation.notes.append("ats: the transformed images are matched, and not taken back")


def likeliest_transformations(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    """The target whose model transforms its inputs as the client did.

    An attack that knows of no defense shows the transformed images. Of all that the policy may
    have drawn for an image, that is taken under which some image becomes most like the one
    seen: black borders, and how far their grey is from black, tell. From that image on,
    candidates are private images, and what the transformation left of them is matched exactly.

    Args:
        target: What was shared under ATS.
        labels: N labels.
        attempt: An attack.
    """
    defense = stated(target.defenses, ATS)
    if len(target.shards) > 1 or not target.local.shares_gradient:
        return Likely(target)
    rows, start = taken_back(attempt(target, 1.0).images, defense.outcomes())
    model = EncodedArchitecture(target.model, encoding(target.data, rows), target.batch_size)
    return Likely(dataclasses.replace(target, model=model), start)


def taken_back(seen: torch.Tensor, outcomes: Sequence[Steps]) -> tuple[list[Steps], torch.Tensor]:
    """Which transformation makes some image most like each of those that are seen.

    Args:
        seen: N x C x H x W in [0, 1].
        outcomes: Transformations to choose from.

    Returns:
        One for each image; and the images that they were made of, smooth where a transformation
        left nothing of them.
    """
    found = [_best_image(seen, steps) for steps in outcomes]
    best = torch.stack([loss for _, loss in found]).argmin(0).tolist()
    images = torch.stack([found[number][0][i] for i, number in enumerate(best)])
    return [outcomes[number] for number in best], images


def _best_image(seen: torch.Tensor, steps: Steps) -> tuple[torch.Tensor, torch.Tensor]:
    """The images that a transformation makes most like those seen, and what is left of each."""
    # From grey: where the transformation leaves [0, 1], nothing would pull an image back.
    image = torch.full_like(seen, 0.5, requires_grad=True)
    adam = torch.optim.Adam([image], lr=RATE)
    for _ in range(STEPS):
        adam.zero_grad()
        _losses(image, seen, steps).sum().backward()
        adam.step()
        with torch.no_grad():
            image.clamp_(0, 1)
    return image.detach(), _losses(image, seen, steps).detach()


def _losses(image: torch.Tensor, seen: torch.Tensor, steps: Steps) -> torch.Tensor:
    rest = (transformed(image, steps) - seen).square().mean((1, 2, 3))
    across, down = image.diff(dim=3).square(), image.diff(dim=2).square()
    return rest + SMOOTH * (across.mean((1, 2, 3)) + down.mean((1, 2, 3)))
