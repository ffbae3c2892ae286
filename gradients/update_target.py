"""What two states of a model say as an attack takes it: a gradient, and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from core.errors import InputError, nearest
from core.models.state_files import State, fit, load_fitting, renamed
from core.target import RUNNING_STATISTICS, LocalTraining
from gradients.shared_update import SharedUpdate


def load_received(model: nn.Module, update: SharedUpdate) -> None:
    """Give the model the parameters that the client received, in their precision.

    Args:
        model: Gets the parameters that were received, in place.
        update: See `gradients.shared_update.read_update`.

    Raises:
        InputError: They are those of another model.
    """
    if any(value.dtype == torch.float64 for value in update.before.values()):
        model.double()
    found = fit(update.before, model)
    # Constants, which a module has of its own, may be missing.
    kept = {name for name, _ in model.named_buffers() if not name.endswith(RUNNING_STATISTICS)}
    if found.unexpected or found.other_shape or set(found.missing) - kept:
        raise InputError(
            f"the state before the update is not that of {type(model).__name__}: {found.sentence()}"
        )
    load_fitting(model, found, "the state before the update")


def gradient_of(update: SharedUpdate, model: nn.Module, training: LocalTraining) -> State:
    """(theta_0 - theta_K) / (lr K) of the parameters that changed.

    Args:
        update: See `gradients.shared_update.read_update`.
        model: Whose update it is.
        training: Has the learning rate lr and the number of steps K.

    Raises:
        InputError: No parameter of the model changed.
    """
    parameters = dict(model.named_parameters())
    change = renamed(update.change, model.state_dict())
    moved = {n: v for n, v in change.items() if n in parameters and bool(v.any())}
    if not moved:
        raise InputError(
            f"the update changes no parameter of {type(model).__name__}"
            f"{_nearest(update.unknown, parameters)}"
        )
    factor = -1 / (training.lr * training.updates)
    # In the order of the parameters, in which gradients are listed.
    return {n: (factor * moved[n]).to(p.dtype) for n, p in parameters.items() if n in moved}


def _nearest(unknown: Sequence[str], parameters: Mapping[str, object]) -> str:
    if not unknown:
        return ""
    return f"; it names {unknown[0]}, and the nearest is {nearest(unknown[0], parameters)}"


def running_after(update: SharedUpdate, model: nn.Module) -> State | None:
    """BatchNorm's running statistics after the training, by the model's names; None if not sent."""
    after = update.running_after()
    return None if after is None else renamed(after, model.state_dict())
