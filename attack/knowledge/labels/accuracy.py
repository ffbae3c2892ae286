"""How many labels a rule recovers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from attack.knowledge.labels.recovery import broken_assumption, recover_labels
from attack.knowledge.labels.registry import KNOWN, rule_names
from core.errors import InputError
from core.target import Target


def label_accuracy(recovered: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of labels recovered, as multisets: overlap / K, whatever their order."""
    overlap = Counter(recovered.tolist()) & Counter(labels.tolist())
    return overlap.total() / len(labels)


def accuracy_by_rule(target: Target, labels: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Every rule but "known" on one target.

    Args:
        target: What the client shared.
        labels: The true labels, to compare with.

    Returns:
        By rule: labels and accuracy, or None for both; and the reason why the rule does
        not apply, or cannot be trusted.
    """
    model = target.build_model()
    return {r: _one_rule(r, target, model, labels) for r in rule_names() if r != KNOWN}


def _one_rule(rule: str, target: Target, model: nn.Module, labels: torch.Tensor) -> dict[str, Any]:
    try:
        found = recover_labels(rule, target, model)
    except InputError as error:
        return {"labels": None, "accuracy": None, "reason": str(error)}
    accuracy = label_accuracy(found, labels)
    doubt = broken_assumption(rule, target, model)
    return {"labels": found.tolist(), "accuracy": accuracy, "reason": doubt}
