"""Forward passes that leave a model as it was: an observer's pass is no training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from core.errors import InputError, first_line


class Buffer(NamedTuple):
    """Where a buffer lies: it may be overwritten, or be replaced by another tensor."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """What lies there now; None: nothing."""
        return self.owner._buffers[self.name]


def buffers_of(model: nn.Module) -> list[Buffer]:
    """Every buffer of a model, those that its state does not hold included."""
    return [
        Buffer(module, name)
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


@contextlib.contextmanager
def held(buffers: Iterable[Buffer]) -> Iterator[None]:
    """Within the block these buffers may change; afterwards they are what they were."""
    before = [
        (each, each.tensor, each.tensor.clone()) for each in buffers if each.tensor is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for (owner, name), tensor, value in before:
                owner._buffers[name] = tensor
                tensor.copy_(value)


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model, set to train or to eval mode: a module's own `train` may not return it."""
    model.train(training)
    return model


@contextlib.contextmanager
def modes_held(model: nn.Module) -> Iterator[None]:
    """Within the block `train` and `eval` may be called; afterwards every layer is as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def random_numbers_held(device: torch.device) -> Iterator[None]:
    """Within the block random numbers may be drawn; later ones are those without it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within the block the model runs in any mode; afterwards nothing shows it.

    Buffers, every layer's mode and the random numbers are put back.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with held(buffers_of(model)), modes_held(model), random_numbers_held(device):
        yield


def refused_inputs(model: nn.Module, inputs: torch.Tensor, error: Exception) -> InputError:
    """What a model's own complaint about its inputs becomes."""
    shape = " x ".join(map(str, inputs.shape[1:]))
    return InputError(
        f"the model {type(model).__name__} does not take inputs of shape {shape}: "
        f"{first_line(error)}"
    )
