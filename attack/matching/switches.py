"""Replay a forward pass with the switches of its piecewise-linear layers frozen.

A ReLU network is piecewise smooth in its parameters. A finite difference between
two passes is accurate only if both run on the same piece, so the first pass is
recorded (which units are active, which position won each max-pooling window) and the
second one replays it. Random masks are the same in both because both draw the same
random numbers (see `attack.matching.held_state`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Tensors = tuple[torch.Tensor, ...]
# What a recorded layer does to a new input, given the tensors that it remembered.
Replay = Callable[..., torch.Tensor]
# Of larger activations only the switches are kept from one pass to the next, in a byte each.
LARGE = 1 << 18


class RecordActivations(TorchFunctionMode):
    """While active, remembers the switches of every forward pass of a model.

    Attributes:
        replays: One function per recorded layer, in the order of execution.
        switches: The tensors each of them needs. They are kept apart from the
            functions, so that a functional transform (`torch.func.vmap`) can carry them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replays: list[Replay] = []
        self.switches: list[Tensors] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        record = _RECORDERS.get(func)
        if record is None:
            return _call(func, args, kwargs or {})
        output, switches, replay = record(func, *args, **(kwargs or {}))
        self.replays.append(replay)
        self.switches.append(switches)
        return output


class ReplayActivations(TorchFunctionMode):
    """While active, recorded layers act as the linear maps they were when recorded.

    Args:
        replays: From `RecordActivations`, of a pass through the same model with
            inputs of the same shape.
        switches: The recorded switches of each call, in the order of the calls.
    """

    def __init__(self, replays: list[Replay], switches: list[Tensors]) -> None:
        super().__init__()
        self._layers = iter(zip(replays, switches, strict=True))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _RECORDERS:
            return _call(func, args, kwargs or {})
        replay, switches = next(self._layers)
        return replay(args[0], *switches)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `func`; BatchNorm leaves its running statistics alone.

    An attacker's trial passes are no training, and transformed functions must not
    write to what they do not own.
    """
    if func is F.batch_norm and kwargs.get("training"):
        args = (args[0], None, None, *args[3:])
    return func(*args, **kwargs)


Recorded = tuple[torch.Tensor, Tensors, Replay]


def _relu(func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Recorded:
    output = func(x, *args, **kwargs)
    if output.numel() > LARGE:
        return output, (output.detach().bool().view(torch.uint8),), torch.mul
    # Kept by autograd until its pass has ended; this kernel passes its first argument where
    # the second one is positive and is the fastest mask there is. Autograd itself forbids
    # changing `output` in place.
    return output, (output.detach(),), _pass_where_positive


def _pass_where_positive(z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.threshold_backward(z, output, 0)


def _leaky_relu(
    func: Any, x: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Recorded:
    output = F.leaky_relu(x, negative_slope)
    slope = torch.where(output.detach() > 0, 1.0, negative_slope).to(output.dtype)
    return output, (slope,), torch.mul


def _hardtanh(
    func: Any, x: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Recorded:
    if func is F.relu6:
        min_val, max_val = 0.0, 6.0
    output = F.hardtanh(x, min_val, max_val)
    fixed = output.detach()
    inside = ((fixed > min_val) & (fixed < max_val)).to(fixed.dtype)
    return output, (inside, fixed * (1 - inside)), _scale_and_shift


def _scale_and_shift(z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return z * scale + shift


def _max_pool2d(
    func: Any, x: torch.Tensor, *args: Any, return_indices: bool = False, **kwargs: Any
) -> Recorded:
    output, indices = F.max_pool2d(x, *args, return_indices=True, **kwargs)
    return output, (indices,), _gather_positions


def _gather_positions(z: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    if not z.is_contiguous(memory_format=torch.channels_last):
        return z.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
    # The same without leaving the layout.
    pixels, positions = z.permute(0, 2, 3, 1), indices.permute(0, 2, 3, 1)
    found = pixels.flatten(1, 2).gather(1, positions.flatten(1, 2))
    return found.view(positions.shape).permute(0, 3, 1, 2)


_RECORDERS: dict[Any, Callable[..., Recorded]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    torch.Tensor.relu: _relu,
    torch.Tensor.relu_: _relu,
    F.leaky_relu: _leaky_relu,
    F.hardtanh: _hardtanh,
    F.relu6: _hardtanh,
    F.max_pool2d: _max_pool2d,
}
