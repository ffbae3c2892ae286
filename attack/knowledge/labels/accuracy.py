"""How many labels a rule recovers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from attack.knowledge.labels.recovery import broken_assumption, recover_labels
from attack.knowledge.labels.registry import KNOWN, find_rule, rule_names
from core.errors import InputError
from core.target import Target

# Within which numbers that are no classes count as recovered.
_TOLERANCE = 0.05


def label_accuracy(recovered: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labels recovered, as multisets: overlap / K, whatever their order.

    Args:
        recovered: K class indices, or K x ... other targets; K x C probabilities, of which the
            likeliest classes count, where the true ones are indices.
        labels: The true ones. Of targets that are no class indices, each output's are compared
            in order of size, and those that differ by at most 0.05 are right.
    """
    if labels.dim() > 1 or labels.is_floating_point():
        found, true = (each.double().flatten(1).sort(0).values for each in (recovered, labels))
        return float(((found - true).abs() <= _TOLERANCE).double().mean())
    if recovered.dim() > 1:
        recovered = recovered.argmax(1)
    overlap = Counter(recovered.tolist()) & Counter(labels.tolist())
    return overlap.total() / len(labels)


def accuracy_by_rule(target: Target, labels: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Every rule but "known" that fits the client's kind of loss, on one target.

    Args:
        target: What the client shared.
        labels: The true labels, to compare with.

    Returns:
        By rule: labels and accuracy, or None for both; and the reason why the rule does
        not apply, or cannot be trusted.
    """
    model = target.build_model()
    kind = target.loss.targets
    fitting = (r for r in rule_names() if r != KNOWN and kind in find_rule(r).targets)
    return {rule: _one_rule(rule, target, model, labels) for rule in fitting}


def _one_rule(rule: str, target: Target, model: nn.Module, labels: torch.Tensor) -> dict[str, Any]:
    try:
        found = recover_labels(rule, target, model)
    except InputError as error:
        return {"labels": None, "accuracy": None, "reason": str(error)}
    accuracy = label_accuracy(found, labels)
    doubt = broken_assumption(rule, target, model)
    return {"labels": found.tolist(), "accuracy": accuracy, "reason": doubt}
