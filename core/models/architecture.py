"""How a client's model is rebuilt: by name, or as a copy of a module that was given.

A `Target` holds an `Architecture` beside the parameters that the client started from.
Nothing behind it asks which kind it is.
"""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from core.errors import InputError

# Plain values, as a record or a checkpoint holds them.
Description = dict[str, str | int | None]


@runtime_checkable
class Architecture(Protocol):
    """What rebuilds a model's structure; its parameters are kept beside it."""

    @property
    def name(self) -> str:
        """What messages, tables and file names call it."""

    def build(self) -> nn.Module:
        """A new module, which the caller may change."""

    def skeleton(self) -> nn.Module:
        """A new module for its names and shapes; its tensors may be without memory."""

    def describe(self) -> Description:
        """Plain values for a record; `arch` is among them."""


class GivenModel:
    """A module that the user gave; it is copied and never changed.

    Args:
        module: Any `nn.Module`, with the parameters that the client starts from.
        builder: Where a program that reads a checkpoint finds the function that builds
            the module, as `module:function`; empty if there is none.

    Raises:
        InputError: The module cannot be copied.
    """

    def __init__(self, module: nn.Module, builder: str = "") -> None:
        self._module = _copied(module, {})
        self.builder = builder

    @property
    def name(self) -> str:
        """The module's class."""
        return type(self._module).__name__

    def build(self) -> nn.Module:
        """A copy, with the parameters and the mode that the module was given with."""
        return _copied(self._module, {})

    def skeleton(self) -> nn.Module:
        """A copy whose parameters and buffers have shapes but no memory."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return _copied(self._module, {id(tensor): _without_memory(tensor) for tensor in tensors})

    def describe(self) -> Description:
        """See `Architecture`."""
        return {"arch": self.name, "builder": self.builder or None}


def _copied(module: nn.Module, known: dict[int, torch.Tensor]) -> nn.Module:
    """A deep copy in which some tensors are replaced.

    Args:
        module: Left as it is.
        known: The replacements, by the identity of what they stand for.
    """
    try:
        return copy.deepcopy(module, dict[int, object](known))
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"the model {type(module).__name__} cannot be copied ({str(error).splitlines()[0]})"
        ) from None


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    shape_only = tensor.detach().to("meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shape_only, requires_grad=tensor.requires_grad)
    return shape_only
