"""How a client's model is rebuilt: by name, or as a copy of a module that was given.

A `Target` holds an `Architecture` beside the parameters that the client started from.
Nothing behind it asks which kind it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from core.errors import InputError
from core.models.batch_norm import without_synchronization
from core.models.unchanged import in_mode, modes_held, refused_inputs

# Where wrappers that change nothing of what a model computes keep it.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
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
        shape: Of one input; lazy layers get their parameters from it.
        malicious: What a malicious server did to it, in the words of `--malicious`.

    Raises:
        InputError: The module cannot be copied, is TorchScript, or has lazy layers and takes
            no inputs of this shape.
    """

    def __init__(
        self,
        module: nn.Module,
        builder: str = "",
        shape: Sequence[int] | None = None,
        malicious: str = "",
    ) -> None:
        self._module = without_synchronization(copied(_bare(module), {}))
        if shape is not None and any(map(is_lazy, self._module.parameters())):
            _materialise(self._module, shape)
        self.builder, self.malicious = builder, malicious

    @property
    def name(self) -> str:
        """The module's class."""
        return type(self._module).__name__

    def build(self) -> nn.Module:
        """A copy, with the parameters and the mode that the module was given with."""
        return copied(self._module, {})

    def skeleton(self) -> nn.Module:
        """A copy whose parameters and buffers have shapes but no memory."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return copied(self._module, {id(tensor): _without_memory(tensor) for tensor in tensors})

    def describe(self) -> Description:
        """See `Architecture`."""
        told: Description = {"malicious": self.malicious} if self.malicious else {}
        return {"arch": self.name, "builder": self.builder or None, **told}


def copied(module: nn.Module, known: dict[int, torch.Tensor]) -> nn.Module:
    """A deep copy in which some tensors are replaced.

    Args:
        module: Left as it is. What its layers compute in each pass and keep as a plain
            attribute (`torch.nn.utils.weight_norm` does) is copied without its history.
        known: The replacements, by the identity of what they stand for.

    Raises:
        InputError: A part of it cannot be copied.
    """
    computed = {id(t): t.detach().clone() for t in _computed_tensors(module)}
    try:
        return copy.deepcopy(module, dict[int, object](computed | known))
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"the model {type(module).__name__} cannot be copied ({str(error).splitlines()[0]})"
        ) from None


def _computed_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [
        value
        for layer in module.modules()
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]


def _bare(module: nn.Module) -> nn.Module:
    """The module without what only spreads it over devices or compiles it."""
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"the model {module.original_name} is TorchScript, whose parameters cannot be "
            "replaced in a pass; give the nn.Module that it was made from"
        )
    inner = getattr(module, _WRAPPERS.get(type(module).__name__, ""), None)
    return _bare(inner) if isinstance(inner, nn.Module) else module


@torch.no_grad()
def _materialise(module: nn.Module, shape: Sequence[int]) -> None:
    """Give lazy layers their parameters, from torch's random numbers, by one pass."""
    inputs = torch.zeros(1, *shape)
    with modes_held(module):
        try:
            in_mode(module, False)(inputs)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise refused_inputs(module, inputs, error) from None


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    shape_only = tensor.detach().to("meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shape_only, requires_grad=tensor.requires_grad)
    return shape_only
