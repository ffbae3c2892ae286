"""Rules of label recovery by name, and what each of them assumes."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from attack.knowledge.labels.last_layer import LastLayer
from attack.knowledge.threat_models import Capability
from core.errors import InputError
from core.losses import Targets
from core.registry import Registry
from core.target import Target

# A rule maps target, model and last layer to the targets of K samples.
Rule = Callable[[Target, nn.Module, LastLayer], torch.Tensor]
# The labels are granted, nothing is recovered.
KNOWN = "known"


class SignedFeatures(enum.Enum):
    """What features of both signs at the classification layer's input do to a rule."""

    HARMLESS = "harmless"
    MISLEAD = "mislead"
    MISLEAD_WITHOUT_BIAS = "mislead where no bias gradient is shared"


@dataclass(frozen=True)
class RegisteredRule:
    """A rule and what it assumes.

    Attributes:
        recover: The rule itself.
        requires: What the threat model must grant.
        requires_over_steps: What it must grant besides, where the client took several steps.
        targets: What the client's loss compares outputs with.
        signed_features: What features of both signs do to it.
        bias_alone: Whether the bias gradient alone tells the targets of one sample.
        class_weights: Whether it counts samples that weigh by their classes.
    """

    recover: Rule
    requires: frozenset[Capability]
    requires_over_steps: frozenset[Capability] = frozenset()
    targets: frozenset[Targets] = frozenset({Targets.CLASSES})
    signed_features: SignedFeatures = SignedFeatures.HARMLESS
    bias_alone: bool = False
    class_weights: bool = False

    def misled_by_signs(self, last: LastLayer) -> bool:
        """Whether features of both signs mislead it, by what was shared."""
        if self.signed_features is SignedFeatures.MISLEAD_WITHOUT_BIAS:
            return last.bias_gradient is None
        return self.signed_features is SignedFeatures.MISLEAD


_RULES = Registry[RegisteredRule]("label rule", reserved=KNOWN)


def register_rule(
    name: str,
    *requires: Capability,
    over_steps: frozenset[Capability] = frozenset(),
    targets: frozenset[Targets] = frozenset({Targets.CLASSES}),
    signed_features: SignedFeatures = SignedFeatures.HARMLESS,
    bias_alone: bool = False,
    class_weights: bool = False,
) -> Callable[[Rule], Rule]:
    """Make `--pseudo-label-init name` recover labels by the decorated function.

    Args:
        name: Must not be taken.
        requires: Beside the batch size, what the threat model must grant.
        over_steps: What it must grant besides, where the client took several local steps.
        targets: What the client's loss compares outputs with, for the rule to fit.
        signed_features: What features of both signs do to the rule.
        bias_alone: Whether the bias gradient alone tells the targets of one sample.
        class_weights: Whether the rule counts samples that weigh by their classes.

    Raises:
        ValueError: The name is registered already.
    """

    def register(rule: Rule) -> Rule:
        needed = frozenset({Capability.BATCH_SIZE, *requires})
        known = RegisteredRule(
            rule, needed, over_steps, targets, signed_features, bias_alone, class_weights
        )
        _RULES.add(name, known)
        return rule

    return register


def rule_names() -> list[str]:
    """Every rule of `recover_labels`."""
    return [KNOWN, *_RULES]


def find_rule(name: str) -> RegisteredRule:
    """A registered rule; "known" is none.

    Raises:
        InputError: Unknown rule.
    """
    check_rule(name)
    return _RULES[name]


def check_rule(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        InputError: Names the flag and the rules.
    """
    if name not in rule_names():
        raise InputError(
            f"--pseudo-label-init {name}: unknown rule; known are {', '.join(rule_names())}"
        )


def rule_requires(name: str, steps: int = 1) -> frozenset[Capability]:
    """What the threat model must grant for a rule.

    Args:
        name: Of the rule.
        steps: Local steps that the client took.

    Raises:
        InputError: Unknown rule.
    """
    if name == KNOWN:
        return frozenset({Capability.LABELS})
    rule = find_rule(name)
    return rule.requires | (rule.requires_over_steps if steps > 1 else frozenset())
