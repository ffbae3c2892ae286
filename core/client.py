"""What a client is: a model with its loss, and whether the two and their data fit together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from core.data.data_sets import DataSets, take_samples
from core.data.given import given_data_sets
from core.data.specs import DataSpec
from core.data.text import is_text, text_data
from core.errors import InputError, first_line
from core.losses import (
    GivenLoss,
    Loss,
    Outputs,
    Targets,
    as_function,
    as_loss,
    main_output,
)
from core.models.unchanged import in_mode, unchanged
from core.named_objects import called, is_object_name, named_object

log = logging.getLogger(__name__)

# What a model may take, N samples of it.
SHAPES = "N x C x H x W, N x C x D x H x W, N x C x L or N x F"
# What a model raises that does not like its inputs.
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, KeyError)


def in_full_precision(model: nn.Module) -> nn.Module:
    """The model, in float32 where it came in fewer bits: a gradient needs the digits."""
    few = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize < 4}
    if not few:
        return model
    log.warning(
        "the model %s is in %s and is computed in float32",
        type(model).__name__,
        " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in few)),
    )
    return model.float()


def outputs_of(model: nn.Module, data: DataSpec, inputs: torch.Tensor) -> Outputs:
    """The model's outputs for a sample or two, to see that they fit; it stays as it is.

    Args:
        model: In the mode that the client runs it in.
        data: Normalisation of the inputs.
        inputs: N x C x ..., in [0, 1] where they have bounds; the first two are used.

    Raises:
        InputError: The model has no parameters, or does not take them; with its own message.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InputError(f"the model {type(model).__name__} has no parameters to share")
    first = data.normalize(data.placed(inputs[:2], parameter))
    with torch.no_grad(), unchanged(model):
        if model.training:
            # Heads may give more in training; where BatchNorm has too few values, eval mode tells.
            with contextlib.suppress(*_REFUSALS):
                return model(first)
        try:
            return in_mode(model, False)(first)
        except _REFUSALS as error:
            raise InputError(
                f"the model {type(model).__name__} does not take images of shape "
                f"{' x '.join(map(str, data.shape))}: {first_line(error)} (inputs may be {SHAPES})"
            ) from None


def fitted_targets(loss: Loss, outputs: Outputs, targets: torch.Tensor, n: int) -> torch.Tensor:
    """The targets as the loss takes them, once it has shown that it does.

    Args:
        loss: What the client minimises.
        outputs: Of the model for the first samples, see `outputs_of`.
        targets: What belongs to all samples.
        n: How many samples there are.

    Raises:
        InputError: They are not one per sample, or the loss does not take them, gives no
            scalar or does not depend on the outputs.
    """
    targets = targets.detach().cpu()
    if targets.dim() == 0 or len(targets) != n:
        what = "one class index" if loss.targets is Targets.CLASSES else "one entry"
        raise InputError(
            f"labels must be {what} for each of the {n} images, not {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    fitted = loss.fitted(outputs, targets)
    _check_loss(loss, outputs, fitted)
    return fitted


def _check_loss(loss: Loss, outputs: Outputs, targets: torch.Tensor) -> None:
    """Refuse a loss that gives no scalar that depends on the outputs."""
    given = [t.requires_grad_() for t in _tensors(outputs) if t.is_floating_point()]
    if not given:
        raise InputError(f"the model gives a {type(outputs).__name__} without numbers in it")
    target = targets[: len(given[0])].to(
        given[0].device, given[0].dtype if targets.is_floating_point() else None
    )
    try:
        value = loss(outputs, target)
    except InputError:
        raise
    except _REFUSALS as error:
        raise InputError(
            f"the loss {loss.name} does not take the model's outputs and a target of shape "
            f"{tuple(target.shape)}: {first_line(error)}"
        ) from None
    if not value.requires_grad:
        raise InputError(f"the loss {loss.name} has no derivative in the model's outputs")


def _tensors(outputs: Outputs) -> list[torch.Tensor]:
    """The tensors that a model gives, whatever they lie in."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values: Iterable[object] = vars(outputs).values() if hasattr(outputs, "__dict__") else ()
    if isinstance(outputs, Mapping):
        values = outputs.values()
    elif isinstance(outputs, Sequence):
        values = outputs
    return [value for value in values if isinstance(value, torch.Tensor)]


def with_classes(data: DataSpec, loss: Loss, outputs: Outputs) -> DataSpec:
    """The description with the number of outputs where they stand for classes or labels.

    Args:
        data: Of the inputs.
        loss: Says what the targets are.
        outputs: Of the model, see `outputs_of`.

    Raises:
        InputError: There are names for another number of classes.
    """
    n_classes = 0
    if loss.targets in (Targets.CLASSES, Targets.LABELS):
        n_classes = main_output(outputs).shape[-1]
    if data.class_names and len(data.class_names) != n_classes:
        raise InputError(f"{len(data.class_names)} class_names for {n_classes} classes")
    return dataclasses.replace(data, n_classes=n_classes)


def check_fits(model: nn.Module, data: DataSets, loss: Loss) -> Outputs:
    """Refuse data that a model of the user's own or its loss does not take.

    Args:
        model: In the mode that the client runs it in.
        data: What it is to be trained on.
        loss: What the client minimises.

    Returns:
        The model's outputs for the first samples.

    Raises:
        InputError: They do not fit; one sentence says what.
    """
    inputs, targets = take_samples(data.train_plain, range(min(2, len(data.train))), data.spec)
    outputs = outputs_of(model, data.spec, inputs)
    fitted_targets(loss, outputs, targets, len(inputs))
    return outputs


def own_data(found: object, model: nn.Module, loss: Loss, seed: int, place: str) -> DataSets:
    """The user's own data for the user's own model, once the two have shown that they fit.

    Args:
        found: See `core.data.given.given_data`.
        model: In the mode that the client runs it in.
        loss: What the client minimises.
        seed: Seed of random numbers that the user's code draws.
        place: Where the data are from, for messages.

    Raises:
        InputError: They do not fit; one sentence says what.
    """
    data = given_data_sets(found, seed, place)
    outputs = check_fits(model, data, loss)
    return dataclasses.replace(data, spec=with_classes(data.spec, loss, outputs))


def named_data(
    data: str,
    length: int,
    model: nn.Module,
    loss: Loss,
    seed: int,
    shortest: int | None = None,
) -> DataSets | None:
    """What `--data` names for the user's own model: own samples, or text.

    Args:
        data: The flag's value.
        length: Tokens of a sentence of text.
        model: In the mode that the client runs it in.
        loss: What the client minimises.
        seed: Seed of random numbers that the user's code draws.
        shortest: Tokens of the shortest sentence; None: all have `length`.

    Returns:
        None where these are images of ours.

    Raises:
        InputError: They cannot be read, or do not fit.
    """
    if not is_object_name(data) and not is_text(data):
        return None
    found = (
        called(data, "--data")
        if is_object_name(data)
        else text_data(data, length, loss.targets, shortest)
    )
    return own_data(found, model, loss, seed, f"--data {data}")


def refuse_own_data(data: str) -> None:
    """Refuse `--data` that our own architectures do not take.

    Raises:
        InputError: It names samples of the user's own, or text.
    """
    if is_object_name(data):
        raise InputError(f"--data {data}: your own samples need your own --model")
    if is_text(data):
        raise InputError(
            f"--data {data}: text needs a language model, as --model core.models.language:gpt2 "
            "with --loss next-token"
        )


def loss_named(text: str | None, flag: str = "--loss") -> Loss:
    """The loss that a command is told: the name of a ready one, or `module:name`.

    Raises:
        InputError: There is no such loss.
    """
    if text is None or not is_object_name(text):
        return as_loss(text)
    function = as_function(named_object(text, flag), flag)
    loss = as_loss(function)
    return GivenLoss(function, text) if isinstance(loss, GivenLoss) else loss
