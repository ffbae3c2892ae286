"""What a site sent, as an audit attacks it: a client that can be simulated, and a target."""

from __future__ import annotations

import dataclasses

from torch import nn

from attack.matching.shared_parameters import check_update
from attack.priors.shared_statistics import recovered_statistics
from core.client import in_full_precision
from core.data.specs import DataSpec
from core.errors import InputError
from core.local_training import LocalTraining
from core.losses import Loss
from core.models.architecture import Architecture, GivenModel, copied
from core.models.kinds import Dropout
from core.models.state_files import State, renamed
from core.target import Target
from gradients.shared_update import SharedUpdate
from gradients.update_target import gradient_of, load_received, running_after


def received_model(model: Architecture, update: SharedUpdate) -> nn.Module:
    """The model with the parameters that the site received; those that did not change are frozen.

    Raises:
        InputError: The update is not one of this model.
    """
    module = in_full_precision(model.build())
    load_received(module, update)
    shared = gradient_of(update, module, LocalTraining())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in shared)
    return module


def without_masks(module: nn.Module) -> nn.Module:
    """A copy whose dropout drops nothing: nobody who reads an update knows the masks."""
    found = copied(module, {})
    for layer in found.modules():
        if isinstance(layer, Dropout):
            layer.p = 0.0
    return found


def state_after(update: SharedUpdate, model: nn.Module) -> State:
    """The state that the site produced, by the names of a model that has the one it received.

    What the site did not send is as it was.
    """
    own = model.state_dict()
    moved = {name: v + update.change.get(name, 0) for name, v in update.before.items()}
    fitting = renamed(moved, own)
    return {name: fitting.get(name, value).to(value.dtype) for name, value in own.items()}


def target_of(
    update: SharedUpdate,
    model: GivenModel,
    data: DataSpec,
    loss: Loss,
    local: LocalTraining,
    n: int,
) -> Target:
    """The update as the target of an attack.

    Args:
        update: What the site sent.
        model: See `received_model` and `without_masks`.
        data: Shape and normalisation of the inputs, and the number of classes.
        loss: What the client minimises.
        local: Its local training.
        n: Images behind the update.

    Raises:
        InputError: What was shared does not belong to the model, or is not finite.
    """
    module = model.build()
    gradient = gradient_of(update, module, local)
    check_update(gradient, dict(module.named_parameters()), model.name)
    target = Target(
        model=model,
        data=data,
        state_dict={name: v.detach().clone() for name, v in module.state_dict().items()},
        gradient=gradient,
        train_mode=module.training,
        batch_size=n,
        local=local.as_told(n),
        running_after=running_after(update, module),
        loss=loss,
    )
    return _with_batch_statistics(target)


def _with_batch_statistics(target: Target) -> Target:
    """The target with what its running statistics say of one step's batch, where they do."""
    try:
        if target.running_after is None or not target.train_mode:
            return dataclasses.replace(target, running_after=None)
        recovered = recovered_statistics(target)
    except InputError:  # A layer that averages over all batches it has ever seen.
        return dataclasses.replace(target, running_after=None)
    if target.local.steps > 1:
        return target
    batch = {name: (mean.float(), variance.float()) for name, (mean, variance) in recovered.items()}
    return dataclasses.replace(target, bn_statistics=(batch,))
