"""`target_from_update`: what a client sent, as the target of an attack."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from attack.matching.shared_parameters import check_update
from core.client import in_full_precision, outputs_of, with_classes
from core.errors import InputError
from core.losses import Function, Loss, as_loss
from core.models.architecture import Architecture, GivenModel
from core.models.state_files import State, named, renamed
from core.target import LocalTraining, Target
from gradients.shared_update import SharedUpdate
from gradients.update_target import gradient_of, load_received, running_after
from gradinvbench._clients import data_spec, is_bounded, local_training

# A gradient as a user has it: by parameter name, or in the order of the model's parameters.
GivenGradient = Mapping[str, torch.Tensor | np.ndarray] | Sequence[torch.Tensor | np.ndarray]


def target_from_update(
    update: SharedUpdate | GivenGradient,
    model: nn.Module | Architecture,
    shape: Sequence[int],
    *,
    batch_size: int,
    loss: str | Function | Loss | None = None,
    local: LocalTraining | str | None = None,
    shared: str | Sequence[str] | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    defenses: Sequence[str] = (),
    train_mode: bool | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    class_names: Sequence[str] = (),
) -> Target:
    """Make what a client sent the target of an attack.

    Args:
        update: What `read_update` found between two states of the model; the gradient is then
            (theta_0 - theta_K) / (lr K), with `local`'s learning rate lr and K steps of its
            optimiser. Or a gradient of your own: tensors or arrays by parameter name, or a
            list in the order of the model's parameters that require gradients.
        model: The client's model. Of two states, its parameters are those before; of a
            gradient, its own. It is copied and left as it is.
        shape: Of one input, C x H x W, C x D x H x W, C x L or F.
        batch_size: Inputs behind the update.
        loss: What the client minimised, see `share`.
        local: How it trained, see `share`. Two states need it for its learning rate; where that
            is not known, any will do for attacks that compare directions after one step.
        shared: Patterns of parameter names, as of `share`. Default: all that were sent and
            changed; one that did not change was frozen or is not used.
        bounds: (0, 1), or None for inputs without bounds.
        defenses: What the client says that it did to its update, as words such as "clip:1".
        train_mode: Whether the client ran the model in train mode; default: the mode it is in.
        mean: See `share`.
        std: See `share`.
        class_names: See `share`.

    Returns:
        What an attacker sees. BatchNorm's running statistics after the training are part of
        it, if they were sent.

    Raises:
        InputError: One sentence on what does not fit.
    """
    bounded, size = is_bounded(bounds), _checked_size(batch_size)
    architecture = GivenModel(model, shape=shape) if isinstance(model, nn.Module) else model
    received, chosen = in_full_precision(architecture.build()), as_loss(loss)
    training = local_training(local, size)
    if isinstance(update, SharedUpdate):
        _check_local(local)
        load_received(received, update)
        gradient = gradient_of(update, received, training)
    else:
        gradient = _given_gradient(update, received)
    check_update(gradient, dict(received.named_parameters()), architecture.name)
    if isinstance(model, nn.Module):
        # Another precision than the module's may have been needed.
        architecture = GivenModel(received)
    received.train(received.training if train_mode is None else train_mode)
    data = data_spec(shape, mean, std, class_names, bounded)
    outputs = outputs_of(received, data, torch.zeros(2, *shape))
    return Target(
        model=architecture,
        data=with_classes(data, chosen, outputs),
        state_dict={name: v.detach().clone() for name, v in received.state_dict().items()},
        gradient=_of_patterns(gradient, shared),
        train_mode=received.training,
        batch_size=size,
        local=training.as_told(size),
        defenses=tuple(defenses),
        running_after=running_after(update, received) if isinstance(update, SharedUpdate) else None,
        loss=chosen,
    )


def _checked_size(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    return batch_size


def _check_local(local: LocalTraining | str | None) -> None:
    if local is None:
        raise InputError(
            "local: an update between two states says nothing of the learning rate; say how the "
            "client trained, as local='sgd lr=0.1'"
        )


def _given_gradient(given: GivenGradient, model: nn.Module) -> State:
    """A gradient by name; parameters that are not used have none."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(given, Mapping):
        if len(given) != len(trained):
            raise InputError(
                f"the gradient is a list of {len(given)}, and {type(model).__name__} trains "
                f"{len(trained)} parameters"
            )
        given = dict(zip(trained, given, strict=True))
    found = named({name: value for name, value in given.items() if value is not None}, ())
    found = renamed(found, model.state_dict())
    in_order = [name for name, _ in model.named_parameters() if name in found]
    return {name: found[name] for name in (*in_order, *(found.keys() - set(in_order)))}


def _of_patterns(gradient: State, patterns: str | Sequence[str] | None) -> State:
    """The part of a gradient whose names fit."""
    if patterns is None:
        return gradient
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    kept = {n: v for n, v in gradient.items() if any(fnmatch.fnmatchcase(n, w) for w in wanted)}
    if not kept:
        raise InputError(f"shared: no parameter of the update fits {', '.join(wanted)}")
    return kept
