"""Refuses a run of stage 3 that cannot work, before any work is done."""

from __future__ import annotations

from pathlib import Path

import torch

from attack.attacks.base import Attack
from attack.attacks.optimisation import OptimizationAttack, make_attack
from attack.cli.request import AttackRun, Search, open_checkpoint, prior_images
from attack.knowledge.labels import rule_names
from attack.knowledge.requirements import check_knowledge
from attack.matching.replica import check_shares
from attack.settings import InversionConfig, setting_error
from core.errors import InputError
from core.locks import LOCK_NAME, check_unlocked
from core.reading import check_name
from core.target import Target, Truth


def check_run(run: AttackRun, *, cpu: bool, processes: int = 1) -> tuple[Target, Truth | None]:
    """Refuse what cannot work.

    Args:
        run: What is asked for.
        cpu: Whether a GPU is left alone even if there is one.
        processes: How many processes shall run it together.

    Returns:
        What the checkpoint holds.

    Raises:
        InputError: Names the flag or the file.
    """
    attack = check_settings(run, cpu=cpu)
    if run.spread == "restarts":
        check_spreadable(attack)
    target, truth = open_checkpoint(run)
    check_knowledge(run.knowledge, attack, target)
    if processes > 1 and run.spread == "batch" and not run.labels_only:
        _check_shareable(attack, target, processes)
    if truth is None:
        _check_needs_no_truth(run)
    if run.prior is not None:
        prior_images(run.prior, target)
    return target, truth


def _check_shareable(attack: Attack, target: Target, processes: int) -> None:
    """Refuse to share a batch out that one process has to invert as a whole."""
    if not attack.shares_a_batch:
        raise InputError(
            f"--multiprocessing-distributed: --attack {attack.name} runs on one process, which "
            "inverts the batch as a whole"
        )
    config = getattr(attack, "config", None)
    if not isinstance(config, InversionConfig):
        return
    if config.optimiser.name == "LBFGS":
        raise setting_error("{optimizer} LBFGS runs on one process; use Adam and {polish} here")
    check_shares(target, processes)


def check_settings(run: AttackRun, *, cpu: bool) -> Attack:
    """Refuse settings that no checkpoint could be inverted with.

    Args:
        run: What is asked for.
        cpu: Whether a GPU is left alone even if there is one.

    Returns:
        The attack.

    Raises:
        InputError: Names the flag.
    """
    rule = run.knowledge.label_rule
    if rule not in rule_names():
        raise InputError(f"--pseudo-label-init {rule}: choose one of {', '.join(rule_names())}")
    attack = make_attack(run.attack, run.settings, run.knowledge)
    config = getattr(attack, "config", None)
    if isinstance(config, InversionConfig):
        config.speed.check_device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    return attack


def _check_needs_no_truth(run: AttackRun) -> None:
    needing = {
        "--metric": run.measuring.images,
        "--labels-only": run.labels_only,
        "--GInfoR": run.measuring.information,
        "--pseudo-label-init known": run.knowledge.label_rule == "known",
    }
    for flag, asked in needing.items():
        if asked:
            raise InputError(f"{flag}: {run.checkpoint} holds no true images and labels")


def check_places(run: AttackRun, root: Path, name: str) -> None:
    """Refuse names and folders that would fail once the attack has run, or that are in use.

    Args:
        run: What is asked for.
        root: The folder of all results.
        name: Of the run's own folder in it.

    Raises:
        InputError: Names the flag.
    """
    check_name(name, "--id", "the name of a folder in --root")
    if root.exists() and not root.is_dir():
        raise InputError(f"--root: {root} is a file, not a folder")
    check_unlocked(run.folder / LOCK_NAME, f"--root and --id: {run.folder}")
    weights = run.measuring.lpips_weights
    if weights is not None and not Path(weights).is_dir():
        raise InputError(f"--lpips-weights: there is no folder {weights}")
    if run.showing.state_every < 1 or run.showing.picture_every < 0:
        raise InputError("--state-every must be at least 1, and --save-every not negative")


def check_search(search: Search, run: AttackRun) -> None:
    """Refuse a search whose simulated checkpoint cannot be read."""
    open_checkpoint(run, search.checkpoint, "--simulation-checkpoint")


def check_spreadable(attack: Attack) -> None:
    """Refuse attacks whose restarts have to see each other.

    Raises:
        InputError: Names the flag.
    """
    if not isinstance(attack, OptimizationAttack):
        raise InputError(f"--spread restarts: {attack.name} has no restarts")
    if attack.config.consensus.combine or attack.config.consensus.group > 0:
        raise InputError(
            "--spread restarts: --MinCombine and --Group compare restarts while they run; "
            "use --spread batch"
        )
