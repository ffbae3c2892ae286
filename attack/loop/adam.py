"""Adam as torch computes it, without what torch asks itself before every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class PlainAdam(torch.optim.Adam):
    """`torch.optim.Adam` to the bit, for few small variables on a CPU.

    On a small image torch's own step spends two thirds of its time on finding out how to take it.
    Elsewhere, and with weight decay and other options, it is torch's. Its state is the same.

    Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1, https://arxiv.org/abs/1412.6980.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; see `torch.optim.Adam.step`."""
        found = [self._plain_leaves(group) for group in self.param_groups]
        if closure is not None or any(leaves is None for leaves in found):
            return super().step(closure)
        for group, leaves in zip(self.param_groups, found, strict=True):
            for leaf in leaves or []:
                self._move(leaf, group)
        return None

    def _plain_leaves(self, group: dict[str, Any]) -> list[torch.Tensor] | None:
        """The variables that have a gradient; None where torch must take the step."""
        leaves = [leaf for leaf in group["params"] if leaf.grad is not None]
        special = any(group[name] for name in ("weight_decay", "amsgrad", "maximize"))
        began = all(self.state[leaf] for leaf in leaves)
        on_cpu = all(leaf.device.type == "cpu" for leaf in leaves)
        return leaves if began and on_cpu and not special else None

    def _move(self, leaf: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[leaf], leaf.grad
        assert gradient is not None
        (beta1, beta2), rate = group["betas"], group["lr"]
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        length = math.sqrt(1 - beta2**step)
        divisor = (state["exp_avg_sq"].sqrt() / length).add_(group["eps"])
        leaf.addcdiv_(state["exp_avg"], divisor, value=-(rate / (1 - beta1**step)))
