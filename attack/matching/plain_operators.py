"""A function of tensors as the plain list of operators that one call of it consists of.

What a call spends on modules, on modes and on automatic differentiation is spent once, while the
operators are written down: on a small network that is a third of an iteration.

Source: Reed et al., torch.fx: Practical Program Capture and Transformation for Deep Learning in
Python, MLSys 2022, https://arxiv.org/abs/2112.08429.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Of tensors alone, to tensors.
Pass = Callable[..., Any]


def plain_operators(function: Pass, arguments: tuple[torch.Tensor, ...]) -> torch.fx.GraphModule:
    """Call the function once and write its operators down, those of its derivatives too.

    Args:
        function: Takes tensors of the arguments' shapes and types, and decides nothing by their
            values.
        arguments: What it is called with.

    Returns:
        The same function for such arguments; to be called without automatic differentiation.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(function)(*arguments)
    # The third of the operators that only name a tensor once more: what is left of saved tensors
    # and of `detach`.
    for node in list(module.graph.nodes):
        if node.target in (torch.ops.aten.alias.default, torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module
