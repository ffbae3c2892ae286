"""Steps whose graph is built when they are differentiated, and not before.

Unrolling K local steps keeps what every one of them computed. Cut into about sqrt(K)
segments, only the tensors between segments are kept, and one segment's graph at a time.
`torch.utils.checkpoint` does not serve here: a local step is itself a backward pass.

Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost",
https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# From tensors to tensors; the flag says whether it is the second computation, whose results
# have to have a graph. Both compute the same.
Steps = Callable[[list[torch.Tensor], bool], list[torch.Tensor]]


def recomputed(steps: Steps, tensors: list[torch.Tensor], seeded: bool) -> list[torch.Tensor]:
    """The result of `steps`, differentiable once; its graph is not kept.

    What is active around the call (a function mode, a choice of kernels) has to be active
    around the backward pass as well.

    Args:
        steps: Computed now without a graph, and again when it is differentiated.
        tensors: What it depends on.
        seeded: Whether it seeds its random numbers itself; otherwise the second computation
            draws those of the first.
    """
    random = None if seeded else _RandomState(tensors[0].device)
    return list(_Recomputed.apply(steps, random, *tensors))


class _RandomState:
    """Torch's random numbers as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(each) for each in self._devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within the block they are drawn again."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Steps, random: _RandomState | None, *tensors: Any) -> Any:
        ctx.steps, ctx.random = steps, random
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # A step takes gradients itself.
        with torch.enable_grad():
            found = steps([t.detach() for t in tensors], False)
        return tuple(f.detach() for f in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[2:]
        leaves = [
            t.detach().requires_grad_(w) for t, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        around = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        with torch.enable_grad(), around:
            found = ctx.steps(leaves, True)
        both = zip(found, cotangents, strict=True)
        pairs = [(f, c) for f, c in both if c is not None and f.requires_grad]
        outputs, seeds = zip(*pairs, strict=True) if pairs else ((), ())
        sought = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(outputs, sought, seeds, allow_unused=True))
        return None, None, *(next(gradients) if w else None for w in wanted)
