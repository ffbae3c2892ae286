"""The labels that a run's attack is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attack.knowledge.label_search import arrange_labels
from attack.knowledge.labels import broken_assumption, recover_labels
from attack.knowledge.threat_models import Capability
from attack.loop.inversion import label_trial
from attack.settings import InversionConfig
from core.losses import Targets

if TYPE_CHECKING:
    from attack.attacks.base import Attack
    from attack.cli.report import Output
    from attack.cli.request import AttackRun
    from attack.reconstruction import Reconstruction
    from core.target import Target, Truth


def labels_for(
    run: AttackRun, attack: Attack, target: Target, truth: Truth | None
) -> torch.Tensor | None:
    """The labels that the attack is given; None where it recovers them itself."""
    knowledge = run.knowledge
    if optimises_targets(run, attack, target):
        # They stand where labels would; every restart optimises its own.
        return torch.zeros(target.batch_size, dtype=torch.long)
    if knowledge.leaves_labels_to(attack):
        known = Capability.LABELS in knowledge.granted and truth is not None
        return truth.labels if known and truth is not None else None
    granted = truth.labels if knowledge.label_rule == "known" and truth is not None else None
    return recover_labels(knowledge.label_rule, target, truth_labels=granted)


def optimises_targets(run: AttackRun, attack: Attack, target: Target) -> bool:
    """Whether targets that are no classes are optimised with the inputs."""
    config = getattr(attack, "config", None)
    if run.knowledge.label_rule == "known" or target.loss.targets is Targets.CLASSES:
        return False
    return isinstance(config, InversionConfig) and config.matching.joint_labels


def arranged_labels(output: Output) -> torch.Tensor | None:
    """The attack's labels; recovered ones where they belong, if trying can tell."""
    run, target = output.run, output.target
    labels = labels_for(run, output.attack, target, output.truth)
    config = getattr(output.attack, "config", None)
    recovered = run.knowledge.adaptive and run.knowledge.label_rule != "known"
    if labels is None or not recovered or not isinstance(config, InversionConfig):
        return labels
    trial = label_trial(target, config, device=output.process.device, seed=run.seed)
    return arrange_labels(target, labels, trial, seed=run.seed)


def note_doubt(output: Output, found: Reconstruction) -> None:
    """Say in the result where its labels come from a rule whose assumption does not hold."""
    run, attack = output.run, output.attack
    optimised = optimises_targets(run, attack, output.target)
    if not optimised and not run.knowledge.leaves_labels_to(attack):
        doubt = broken_assumption(run.knowledge.label_rule, output.target)
        found.details.update({} if doubt is None else {"label_warning": doubt})
