"""Which classes an update betrays, and what its attack is told of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from attack.knowledge.labels import DEFAULT_RULE, label_accuracy, recover_labels
from audit.record import LabelSection
from audit.request import AuditRequest
from core.errors import InputError, first_line
from core.losses import Targets

# Drawn guesses behind the chance of labels.
_GUESSES = 1000


@dataclass(frozen=True)
class KnownLabels:
    """What is known of labels.

    Attributes:
        section: For the record; None where the client has no classes.
        granted: Whether the attack is told what the update does not betray.
    """

    section: LabelSection | None
    granted: bool


def known_labels(request: AuditRequest) -> KnownLabels:
    """Which classes the update betrays; what it does not is granted to the attack."""
    target, truth = request.target, request.data.members.labels
    if target.loss.targets is Targets.TOKENS:
        return KnownLabels(None, False)
    if target.loss.targets is not Targets.CLASSES or truth.dim() != 1:
        return KnownLabels(None, True)
    true_counts = torch.bincount(truth, minlength=target.data.n_classes)
    section = LabelSection(DEFAULT_RULE, tuple(true_counts.tolist()), (), None, None)
    section = dataclasses.replace(section, chance=_chance(request, true_counts.numpy()))
    try:
        recovered = recover_labels(DEFAULT_RULE, target)
    except InputError as error:
        return KnownLabels(dataclasses.replace(section, note=first_line(error)), True)
    counts = torch.bincount(recovered, minlength=target.data.n_classes)
    accuracy = label_accuracy(recovered, truth)
    section = dataclasses.replace(
        section, recovered_counts=tuple(counts.tolist()), accuracy=accuracy
    )
    return KnownLabels(section, accuracy < 1)


def _chance(request: AuditRequest, true_counts: np.ndarray) -> float:
    """The accuracy of a guess that knows the class shares of the non-members."""
    n = int(true_counts.sum())
    others = np.bincount(request.data.non_members.labels.numpy(), minlength=len(true_counts))
    rng = np.random.default_rng((request.settings.seed, 53))
    guesses = rng.multinomial(n, others / others.sum(), _GUESSES)
    return float(np.minimum(guesses, true_counts).sum(1).mean() / n)


def in_no_order(labels: torch.Tensor, order_told: bool) -> torch.Tensor:
    """Class indices sorted, unless the attack is told which image comes when."""
    is_classes = labels.dim() == 1 and not labels.is_floating_point()
    return labels.sort().values if is_classes and not order_told else labels
