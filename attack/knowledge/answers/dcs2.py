"""Against DCS-2: a batch of twice as many images, half of which are not asked for."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from attack.knowledge.likely import Attempt, Likely
from core.errors import InputError
from core.models.head import head_for
from core.target import Target
from gradients.defenses.base import stated
from gradients.defenses.dcs2 import DCS2


@register_adaptation("dcs2")
def _dcs2(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Directions are compared: where the mean was projected, its length says nothing."""
    if adaptation.config.matching.objective == "L2":
        adaptation.config = adaptation.config.changed(objective="sim")
    adaptation.notes.append("dcs2: directions are compared")


def with_concealing_images(target: Target, labels: torch.Tensor, attempt: Attempt) -> Likely:
    """The target as what it is: the gradient of the private and the concealing images together.

    The mean of two gradients of N images each is that of 2 N. The concealing images are
    variables like the private ones, and are thrown away in the end. How much of every class
    their labels hold follows from the gradient of the last bias, at the outputs that the model
    gives of grey; which of them belongs to which private image is not known, and assumed.

    Args:
        target: What was shared under DCS-2.
        labels: N classes.
        attempt: Not needed.
    """
    alone = len(target.shards) == 1 and target.local.shares_gradient and target.n_clients == 1
    if not alone or labels.is_floating_point() or target.train_mode:
        return Likely(target)
    drawn = drawn_classes(target, labels)
    if drawn is None:
        return Likely(target)
    n, classes = len(labels), target.data.n_classes
    own, other = (F.one_hot(each, classes).float() for each in (labels.cpu(), drawn))
    share = stated(target.defenses, DCS2).share
    both = torch.cat([own, share * other + (1 - share) * own]).to(labels.device)
    doubled = dataclasses.replace(target, batch_size=2 * n, shards=(2 * n,))
    return Likely(doubled, labels=both, kept=n)


def drawn_classes(target: Target, labels: torch.Tensor) -> torch.Tensor | None:
    """The classes that were drawn for the concealing images, in ascending order.

    Args:
        target: What was shared.
        labels: N classes of the private images.

    Returns:
        N classes; None where the last bias is not shared.
    """
    model = target.build_model().eval()
    try:
        name, _ = head_for(model, target.data)
    except InputError:
        return None
    gradient = target.gradient.get(f"{name}.bias" if name else "bias")
    if gradient is None:
        return None
    n, share = len(labels), stated(target.defenses, DCS2).share
    grey = target.data.normalize(torch.full((1, *target.data.shape), 0.5))
    with torch.no_grad():
        given = model(grey).softmax(1)[0]
    masses = 2 * n * (given - gradient)
    masses = masses - (2 - share) * F.one_hot(labels.cpu(), len(masses)).sum(0)
    found = []
    for _ in range(n):
        found.append(int(masses.argmax()))
        masses[found[-1]] -= share
    return torch.tensor(sorted(found))
