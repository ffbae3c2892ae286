"""What a run asks of its threat model, and what it is granted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attack.knowledge.clients import check_client
from attack.knowledge.labels import DEFAULT_RULE, rule_requires
from attack.knowledge.threat_models import (
    CUSTOM,
    Capabilities,
    Capability,
    check_capabilities,
    find_threat,
)
from attack.settings import UNROLL, InversionConfig

if TYPE_CHECKING:
    from attack.attacks.base import Attack
    from core.target import Target

# What the flags can neither ask for nor refuse: granted where no threat model is named.
_UNSAID = frozenset(
    {Capability.BATCH_SIZE, Capability.RUNNING_STATISTICS, Capability.LOCAL_TRAINING}
)


@dataclass(frozen=True)
class Knowledge:
    """What a run says about the knowledge of its attacker.

    Attributes:
        threat: Name of the threat model; None: the rest decides.
        label_rule: How the labels are recovered, or "known".
        rule_given: Whether the user asked for that rule; it may be a default.
        adaptive: Whether the attack takes the defense into account; None: its own default.
        adapts_by_default: That default.
        exact_statistics: Whether the settings use the exact statistics of the batch.
        known_masks: Whether the settings use the seed of the client's dropout masks.
    """

    threat: str | None = None
    label_rule: str = DEFAULT_RULE
    rule_given: bool = False
    adaptive: bool | None = None
    adapts_by_default: bool = False
    exact_statistics: bool = False
    known_masks: bool = False

    @property
    def adapts(self) -> bool:
        """Whether the attack takes the defense into account."""
        return self.adapts_by_default if self.adaptive is None else self.adaptive

    @property
    def granted(self) -> Capabilities:
        """What the run is granted: by its threat model, else by what it asks for."""
        threat = find_threat(self.threat)
        if threat is not None:
            return threat.grants
        asked = {
            Capability.LABELS: self.label_rule == "known",
            Capability.BATCH_STATISTICS: self.exact_statistics,
            Capability.DEFENSE: self.adapts,
            Capability.DROPOUT_MASKS: self.known_masks,
        }
        return _UNSAID | {capability for capability, given in asked.items() if given}

    def leaves_labels_to(self, attack: Attack) -> bool:
        """Whether the attack recovers labels itself: it can, and no rule was asked for."""
        return attack.recovers_labels and not self.rule_given

    def to_record(self) -> dict[str, Any]:
        """The threat model as plain values."""
        threat = find_threat(self.threat)
        return {
            "name": CUSTOM if threat is None else threat.name,
            "granted": sorted(capability.value for capability in self.granted),
            "adaptive": self.adapts and Capability.DEFENSE in self.granted,
        }


def check_knowledge(knowledge: Knowledge, attack: Attack, target: Target) -> None:
    """Refuse a run that uses what its threat model withholds, or that does not fit the client.

    Raises:
        InputError: Names the flag, and what is withheld or does not fit.
    """
    check_client(attack, target)
    threat = find_threat(knowledge.threat)
    if threat is None:
        return
    for what, capabilities in requirements(knowledge, attack, target):
        check_capabilities(what, capabilities, threat.grants, threat.name)


def requirements(
    knowledge: Knowledge, attack: Attack, target: Target
) -> Iterator[tuple[str, Capabilities]]:
    """Who asks for what, in the words of the command line."""
    yield f"--attack {attack.name}", attack.requires
    if not knowledge.leaves_labels_to(attack):
        rule = knowledge.label_rule
        yield f"--pseudo-label-init {rule}", rule_requires(rule)
    if knowledge.adaptive:
        yield "--adaptive", frozenset({Capability.DEFENSE})
    config = getattr(attack, "config", None)
    if isinstance(config, InversionConfig):
        yield from _of_settings(config, target)
    if not knowledge.leaves_labels_to(attack):
        rule = knowledge.label_rule
        yield f"--pseudo-label-init {rule}", rule_requires(rule, target.local.steps)


def _of_settings(config: InversionConfig, target: Target) -> Iterator[tuple[str, Capabilities]]:
    if config.priors.exact_bn:
        yield "--exact-bn", frozenset({Capability.BATCH_STATISTICS})
    elif config.priors.bn_from_update:
        # What a client's moved running statistics say is what the batch's are.
        yield "--bn-from-update", frozenset({Capability.BATCH_STATISTICS})
    elif config.priors.bn > 0:
        yield "--BN", frozenset({Capability.RUNNING_STATISTICS})
    if config.matching.known_masks:
        yield "--known-masks", frozenset({Capability.DROPOUT_MASKS})
    if not target.local.shares_gradient and config.matching.local_steps == UNROLL:
        steps = f"inverting {target.local.steps} local step"
        yield (
            f"{steps}s" if target.local.steps > 1 else steps,
            frozenset({Capability.LOCAL_TRAINING}),
        )
