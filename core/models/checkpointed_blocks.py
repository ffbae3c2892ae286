"""Blocks that torch recomputes in a way in which gradients cannot be asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.graph import Node

from core.errors import InputError
from core.models.unchanged import refused_inputs, unchanged

# The node of `torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`.
REENTRANT = "CheckpointFunctionBackward"


def refuse_reentrant_blocks(model: nn.Module, inputs: torch.Tensor) -> None:
    """Refuse a model that checkpoints a block with `use_reentrant=True`.

    `torch.autograd.grad`, which gives a client's gradient and an attacker's, does not reach the
    parameters in such a block: they would silently have no gradient.

    Args:
        model: Run once in the mode it is in; nothing of it changes.
        inputs: N x ..., what the model takes.

    Raises:
        InputError: Names the module that calls the block, or the model refuses the inputs.

    Source: https://docs.pytorch.org/docs/stable/checkpoint.html
    """
    found: list[str] = []
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(_watch(name, found)) for name in modules]
    try:
        with torch.enable_grad(), unchanged(model):
            model(inputs.detach().requires_grad_(inputs.is_floating_point()))
    except ValueError:
        # BatchNorm over a single value: the client's own pass says which flags to change.
        return
    except (RuntimeError, TypeError, AssertionError, IndexError) as error:
        raise refused_inputs(model, inputs, error) from None
    finally:
        for handle in handles:
            handle.remove()
    if found:
        raise InputError(
            f"the module {found[0]} checkpoints a block with use_reentrant=True, whose parameters "
            "torch.autograd.grad does not reach; use use_reentrant=False there"
        )


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, object, object], None]:
    """A forward hook that notes the first module whose output depends on a block of its own."""

    def look(module: nn.Module, given: object, output: object) -> None:
        if not found and _blocks_below(output) - _blocks_below(given):
            kind = type(module).__name__
            found.append(f"{name} ({kind})" if name else kind)

    return look


def _blocks_below(value: object) -> set[Node]:
    """The reentrant blocks on which tensors depend, in whatever they are packed."""
    seen: set[Node] = set()
    waiting = [tensor.grad_fn for tensor in _tensors(value)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node for node in seen if node.name() == REENTRANT}


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    held = vars(value) if hasattr(value, "__dict__") else {}
    return [each for each in held.values() if isinstance(each, torch.Tensor)]
