"""Which clients an attack, a label rule or a prior can be used on."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from attack.settings import InversionConfig
from core.errors import InputError
from core.losses import Loss, Targets, is_one_class_per_sample

if TYPE_CHECKING:
    from attack.attacks.base import Attack
    from core.target import Target


def require_classes(what: str, loss: Loss) -> None:
    """Refuse a client whose gradient does not tell classes.

    Args:
        what: Who asks, for the message.
        loss: What the client minimises.

    Raises:
        InputError: The loss is no cross-entropy of one class per sample.
    """
    if not is_one_class_per_sample(loss):
        raise InputError(
            f"{what} is for clients with cross-entropy and one class per sample, and this "
            f"client's loss is {loss.name}: give its targets, or optimise them with the inputs "
            "(targets='optimise', --joint-labels)"
        )


def require_targets(what: str, fits: Collection[Targets], loss: Loss) -> None:
    """Refuse a client whose targets are of a kind that `fits` does not name.

    Args:
        what: Who asks, for the message.
        fits: Kinds of targets that it is made for.
        loss: What the client minimises.

    Raises:
        InputError: The loss has other targets.
    """
    if loss.targets not in fits:
        kinds = " or ".join(sorted(kind.value for kind in fits))
        raise InputError(
            f"{what} is made for clients whose targets are {kinds}, and this client's loss "
            f"{loss.name} compares with {loss.targets.value}"
        )


def reads_inputs(attack: Attack | type[Attack], target: Target) -> bool:
    """Whether an attack is made for inputs of the client's kind: sentences, or numbers."""
    return attack.reads_anything or attack.reads_tokens == bool(target.data.n_tokens)


def check_client(attack: Attack, target: Target) -> None:
    """Refuse an attack, or a setting of it, on a client that it is not made for.

    Raises:
        InputError: Names the attack or the flag, and the client's loss.
    """
    if not reads_inputs(attack, target):
        kinds = ("images and numbers", "text")
        made, given = kinds[attack.reads_tokens], kinds[bool(target.data.n_tokens)]
        raise InputError(f"--attack {attack.name} is made for {made}, and this client has {given}")
    require_targets(f"--attack {attack.name}", attack.fits, target.loss)
    config = getattr(attack, "config", None)
    if isinstance(config, InversionConfig) and config.priors.features > 0:
        require_classes("the prior on features (--features)", target.loss)
