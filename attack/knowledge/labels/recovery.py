"""Recovering labels by a named rule, and saying where a rule's assumptions do not hold."""

from __future__ import annotations

import logging

import torch
from torch import nn

from attack.knowledge.clients import require_classes
from attack.knowledge.labels.last_layer import LastLayer, last_layer_of, lowest_feature
from attack.knowledge.labels.registry import KNOWN, RegisteredRule, check_rule, find_rule
from core.errors import InputError
from core.losses import CrossEntropy, Targets
from core.target import Target

logger = logging.getLogger(__name__)

# The rule that is exact wherever one is.
DEFAULT_RULE = "exact"


def recover_labels(
    rule: str,
    target: Target,
    model: nn.Module | None = None,
    *,
    truth_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Recover the labels, or other targets, of a batch from its shared gradient.

    A warning says where the rule's assumptions do not hold.

    Args:
        rule: A name in `rule_names()`.
        target: What the client shared.
        model: `target.build_model()`, if it is at hand already; left as it was.
        truth_labels: The labels, where the threat model grants them (rule "known").

    Returns:
        On the CPU. Of classes: K indices (int64), sorted unless they are the granted ones; of
        other targets: K x outputs, in the model's precision.

    Raises:
        InputError: Unknown rule, one that does not fit the client's loss, labels not granted,
            or a gradient without what the rule reads.
    """
    check_rule(rule)
    if rule == KNOWN:
        return _known(target, truth_labels)
    found = find_rule(rule)
    if target.loss.targets is Targets.CLASSES or target.loss.targets not in found.targets:
        require_classes(f"label recovery {rule}", target.loss)
    _check_class_weights(rule, found, target)
    model = target.build_model() if model is None else model
    last = last_layer_of(target, model, found.bias_alone)
    labels = found.recover(target, model, last)
    broken = _broken_assumption(rule, found, target, model, last)
    if broken is not None:
        logger.warning(broken)
    if target.loss.targets is not Targets.CLASSES:
        return labels.to(last.layer.weight.dtype)
    return labels.long().cpu().sort().values


def recover_most_exactly(target: Target) -> torch.Tensor:
    """Recover labels by the rule that is exact wherever one is.

    Returns:
        N class indices, sorted.

    Raises:
        InputError: No rule applies.
    """
    return recover_labels(DEFAULT_RULE, target)


def broken_assumption(rule: str, target: Target, model: nn.Module | None = None) -> str | None:
    """One sentence that says why a rule cannot be trusted on a target; None: nothing speaks so.

    Args:
        rule: A name in `rule_names()`.
        target: What the client shared.
        model: `target.build_model()`, if it is at hand already; left as it was.
    """
    if rule == KNOWN:
        return None
    model = target.build_model() if model is None else model
    last = last_layer_of(target, model, find_rule(rule).bias_alone)
    return _broken_assumption(rule, find_rule(rule), target, model, last)


def _broken_assumption(
    name: str, rule: RegisteredRule, target: Target, model: nn.Module, last: LastLayer
) -> str | None:
    if not rule.misled_by_signs(last):
        return None
    lowest = lowest_feature(target, model)
    if lowest is None:
        return None
    return (
        f"label recovery {name} assumes that no feature at the last layer's input is negative, and "
        f"those of {target.model.name} are (down to {lowest:.2g}): its labels mean little, use "
        f"{DEFAULT_RULE}"
    )


def _check_class_weights(name: str, rule: RegisteredRule, target: Target) -> None:
    """Refuse a batch whose samples weigh by their classes, if the rule does not count those."""
    loss = target.loss
    if not isinstance(loss, CrossEntropy) or loss.weights is None or target.batch_size == 1:
        return
    if not rule.class_weights:
        raise InputError(
            f"label recovery {name} counts samples that weigh the same, and this client's "
            f"cross-entropy weighs them by their classes: use {DEFAULT_RULE}, or give the labels"
        )
    if min(loss.weights) == 0:
        raise InputError(
            f"label recovery {name}: class {loss.weights.index(0)} has weight 0, and its samples "
            "leave no trace: give the labels, or optimise them with the inputs "
            "(targets='optimise', --joint-labels)"
        )


def _known(target: Target, labels: torch.Tensor | None) -> torch.Tensor:
    if labels is None:
        raise InputError(
            "--pseudo-label-init known: the labels are not granted (the checkpoint is stripped of "
            "its truth, or the threat model withholds them)"
        )
    if len(labels) != target.batch_size:
        raise InputError(f"{len(labels)} known labels for a batch of {target.batch_size}")
    # Soft labels and values of other losses are no indices.
    labels = labels if labels.is_floating_point() else labels.long()
    return labels.detach().cpu().clone()
