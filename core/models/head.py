"""The classification layer of a model, found from its computation.

The order in which layers are registered says nothing: a model may register its classifier first,
have auxiliary classifiers, or layers that it does not use. So one forward pass is traced. Every
fully connected layer and every convolution is cut: it hands on a copy that depends on nothing
before it. The head is then the only layer on which the main output still depends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import Node

from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import main_output
from core.models.kinds import Convolution
from core.models.unchanged import in_mode, refused_inputs, unchanged

# Any value but zero: some layers divide by what they read.
PROBE_VALUE = 0.5


class Head(NamedTuple):
    """The layer that gives a model's outputs.

    Attributes:
        name: As in `model.named_modules()`; empty where the model is the layer.
        layer: A fully connected layer, or a convolution of kernel 1, which acts as one at every
            position. The model gives its outputs as they are or averages them, as SqueezeNet
            does behind a ReLU.
    """

    name: str
    layer: nn.Linear | Convolution


def find_head(model: nn.Module, example: torch.Tensor) -> Head:
    """The layer that gives the model's main output.

    Between that layer and the output there may be anything without a fully connected layer or
    a convolution: views, averages over positions, a ReLU, a temperature, a logarithm of softmax.

    Args:
        model: Run once in eval mode; nothing of it changes.
        example: N x ..., what the model takes; N = 1 suffices.

    Raises:
        InputError: The output is not that of one such layer, or the model refuses the example.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Convolution)}
    cuts = {name: _Cut() for name in layers}
    handles = [layers[name].register_forward_hook(cuts[name]) for name in layers]
    try:
        with torch.enable_grad(), unchanged(model):
            output = main_output(_run(in_mode(model, False), example))
    finally:
        for handle in handles:
            handle.remove()
    reached = _leaves_below(output)
    found = [name for name in layers if any(leaf in reached for leaf in cuts[name].leaf_ids)]
    if len(found) != 1 or not _gives(layers[found[0]], output):
        raise InputError(_refusal(model, found))
    return Head(found[0], layers[found[0]])


def find_linear_head(model: nn.Module, example: torch.Tensor) -> tuple[str, nn.Linear]:
    """`find_head` for those who need a fully connected layer.

    Raises:
        InputError: As `find_head`; or the head is a convolution.
    """
    name, layer = find_head(model, example)
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"the outputs of {type(model).__name__} come from the convolution {name}, where a "
            "fully connected layer is needed"
        )
    return name, layer


def head_for(model: nn.Module, data: DataSpec) -> tuple[str, nn.Linear]:
    """`find_linear_head` for inputs that are described.

    Raises:
        InputError: See `find_linear_head`.
    """
    return find_linear_head(model, example_for(model, data))


def example_for(model: nn.Module, data: DataSpec) -> torch.Tensor:
    """One sample of the right shape, on the model's device and in its precision."""
    example = torch.full((1, *data.shape), PROBE_VALUE)
    parameter = next(model.parameters(), None)
    return example if parameter is None else example.to(parameter.device, parameter.dtype)


def _run(model: nn.Module, example: torch.Tensor) -> object:
    try:
        return model(example)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise refused_inputs(model, example, error) from None


class _Cut:
    """A forward hook after which a layer's output depends on a leaf of its own alone."""

    def __init__(self) -> None:
        self._leaves: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
        # In a checkpointed block gradients are off.
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            self._leaves.append(leaf)
            # A copy: what follows may work in place.
            return leaf.clone()

    @property
    def leaf_ids(self) -> list[int]:
        """One for each call of the layer."""
        return [id(leaf) for leaf in self._leaves]


def _leaves_below(output: torch.Tensor) -> set[int]:
    """Identities of the leaves that a tensor depends on."""
    found: set[int] = set()
    seen: set[Node] = set()
    open_nodes = [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        open_nodes += [before for before, _ in node.next_functions]
    return found


def _gives(layer: nn.Module, output: torch.Tensor) -> bool:
    """Whether a layer's outputs can be the model's, one for one."""
    n_outputs = output.shape[1] if output.dim() > 1 else 1
    if isinstance(layer, nn.Linear):
        return layer.out_features in (n_outputs, output.shape[-1])
    assert isinstance(layer, Convolution)
    return layer.out_channels == n_outputs and all(side == 1 for side in layer.kernel_size)


def _refusal(model: nn.Module, found: list[str]) -> str:
    name = type(model).__name__
    if not found:
        return f"the outputs of {name} come from no fully connected layer"
    if len(found) == 1:
        return (
            f"the last layer of {name}, {found[0]}, is neither a fully connected layer nor a "
            "convolution of kernel 1 that gives one output per class"
        )
    few = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    return f"the outputs of {name} come from {len(found)} layers together ({few})"
