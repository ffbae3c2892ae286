"""What reaches single modules of a model in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class _Reached(Exception):  # noqa: N818
    """The pass need not go on."""


def inputs_of(
    model: nn.Module, modules: Sequence[nn.Module], inputs: torch.Tensor
) -> list[torch.Tensor]:
    """The first input of each of these modules; what runs behind the last of them is spared.

    Torch's own transformer encoder skips its modules where no gradient is asked for: call it
    within `torch.enable_grad()` if the model may have one.

    Args:
        model: Run once, in the mode it is in.
        modules: Of the model; each runs in the pass.
        inputs: N x ..., what the model takes.

    Returns:
        Detached, in the order of `modules`.
    """
    found: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        found[module] = given[0].detach()
        if len(found) == len(modules):
            raise _Reached

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        model(inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[module] for module in modules]
