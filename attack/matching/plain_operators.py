"""A function of tensors as the plain list of operators that one call of it consists of.

What a call spends on modules, on modes and on automatic differentiation is spent once, while the
operators are written down: on a small network that is a third of an iteration. What does not
depend on the arguments' values is computed then as well.

Source: Reed et al., torch.fx: Practical Program Capture and Transformation for Deep Learning in
Python, MLSys 2022, https://arxiv.org/abs/2112.08429.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

# Of tensors alone, to tensors.
Pass = Callable[..., Any]

aten = torch.ops.aten
# What is left of saved tensors and of `detach`: a third of the operators of a pass.
SAME = (aten.alias.default, aten.detach.default)
# Of a tensor's shape alone.
OF_SHAPE = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)


def plain_operators(function: Pass, arguments: tuple[torch.Tensor, ...]) -> GraphModule:
    """Call the function once and write its operators down, those of its derivatives too.

    Args:
        function: Takes tensors of the arguments' shapes and types, and decides nothing by their
            values.
        arguments: What it is called with.

    Returns:
        The same function for such arguments; to be called without automatic differentiation. What
        every node gave is its `meta["val"]`.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    module: GraphModule = make_fx(function)(*arguments)
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            node.meta["val"] = getattr(module, node.target)
        if node.target in SAME:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    _compute_constants(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _compute_constants(module: GraphModule) -> None:
    """Replace what is the same in every call by its value."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    if any(node.target._schema.is_mutable for node in calls if _is_operator(node)):
        # An operator that writes may write into what would be kept.
        return
    values: dict[Node, torch.Tensor] = {}
    for node in calls:
        value = _constant(node, values)
        if value is not None:
            values[node] = value
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        # The caller may write into what it is given.
        _forget(node, values)
    for number, (node, value) in enumerate(values.items()):
        if all(user in values for user in node.users):
            continue
        name = f"_constant{number}"
        module.register_buffer(name, value)
        with module.graph.inserting_before(node):
            held = module.graph.get_attr(name)
        held.meta["val"] = value
        node.replace_all_uses_with(held)


def _is_operator(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _constant(node: Node, values: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of a call that is the same every time; None of others."""
    if not _is_operator(node) or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return None
    read = node.all_input_nodes
    if node.target in OF_SHAPE:
        meta = read[0].meta["val"]
        known = {read[0]: torch.empty(meta.shape, dtype=meta.dtype, device=meta.device)}
    elif read and all(each in values for each in read):
        known = values
    else:
        return None
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
    found = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
    return found if isinstance(found, torch.Tensor) else None


def _forget(node: Node, values: dict[Node, torch.Tensor]) -> None:
    """Compute a value anew in every call, and what it may be a view of."""
    if values.pop(node, None) is not None:
        for each in node.all_input_nodes:
            _forget(each, values)
