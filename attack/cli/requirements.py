"""What a run asks of its threat model, and what it is granted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from attack.knowledge.labels import rule_requires
from attack.knowledge.threat_models import (
    CUSTOM,
    Capabilities,
    Capability,
    check_capabilities,
    find_threat,
)
from attack.settings import InversionConfig
from core.target import Target

# What the flags can neither ask for nor refuse: granted where no threat model is named.
_UNSAID = frozenset(
    {Capability.BATCH_SIZE, Capability.RUNNING_STATISTICS, Capability.LOCAL_TRAINING}
)


def check_run(args: argparse.Namespace, attack: Any, target: Target) -> None:
    """Refuse a run that uses what its threat model withholds.

    Raises:
        InputError: Names the flag and what is withheld.
    """
    threat = find_threat(args.threat)
    if threat is None:
        return
    for what, capabilities in requirements(args, attack, target):
        check_capabilities(what, capabilities, threat.grants, threat.name)


def requirements(
    args: argparse.Namespace, attack: Any, target: Target
) -> Iterator[tuple[str, Capabilities]]:
    """Who asks for what, in the words of the command line."""
    yield f"--attack {attack.name}", attack.requires
    if not labels_are_left_to(attack, args):
        yield f"--pseudo-label-init {args.pseudo_label_init}", rule_requires(args.pseudo_label_init)
    if args.adaptive:
        yield "--adaptive", frozenset({Capability.DEFENSE})
    config = getattr(attack, "config", None)
    if isinstance(config, InversionConfig):
        yield from _of_settings(config, target)


def _of_settings(config: InversionConfig, target: Target) -> Iterator[tuple[str, Capabilities]]:
    if config.priors.exact_bn:
        yield "--exact-bn", frozenset({Capability.BATCH_STATISTICS})
    elif config.priors.bn_from_update:
        # What a client's moved running statistics say is what the batch's are.
        yield "--bn-from-update", frozenset({Capability.BATCH_STATISTICS})
    elif config.priors.bn > 0:
        yield "--BN", frozenset({Capability.RUNNING_STATISTICS})
    if target.local.steps > 1:
        steps = f"inverting {target.local.steps} local steps"
        yield steps, frozenset({Capability.LOCAL_TRAINING})


def labels_are_left_to(attack: Any, args: argparse.Namespace) -> bool:
    """Whether the attack recovers labels itself: it can, and no rule was asked for."""
    recovers = bool(getattr(attack, "recovers_labels", False))
    return recovers and "pseudo_label_init" not in args.explicit


def granted_capabilities(args: argparse.Namespace) -> Capabilities:
    """What the run is granted: by its threat model, else by its flags."""
    threat = find_threat(args.threat)
    if threat is not None:
        return threat.grants
    flags = {
        Capability.LABELS: args.pseudo_label_init == "known",
        Capability.BATCH_STATISTICS: args.exact_bn or args.bn_from_update,
        Capability.DEFENSE: adapts(args),
    }
    return _UNSAID | {capability for capability, given in flags.items() if given}


def adapts(args: argparse.Namespace) -> bool:
    """Whether the attack takes the defense into account, as far as the flags say."""
    if args.adaptive is None:
        return bool(args.attack == "auto")
    return bool(args.adaptive)


def threat_record(args: argparse.Namespace) -> dict[str, Any]:
    """The threat model of a run, for its record."""
    return {
        "name": args.threat or CUSTOM,
        "granted": sorted(c.value for c in granted_capabilities(args)),
        "adaptive": adapts(args) and Capability.DEFENSE in granted_capabilities(args),
    }
