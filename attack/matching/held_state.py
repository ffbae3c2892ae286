"""Evaluations of an objective that change nothing: passes start where the client's did.

Some layers move buffers in every forward pass: the power iteration of spectral norm, a counter,
a running mean. An attacker's trial passes are no training; each of them starts from the buffers
that the client received.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from core.models.unchanged import Buffer, buffers_of

# Normalisation's own statistics; in train mode it writes them and does not read them.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def hold_buffers(model: nn.Module) -> None:
    """Make every pass of a model start from the buffers that it has now.

    Costs nothing where no buffer moves. Copies of the model hold buffers of their own.

    Args:
        model: Its buffers are replaced before a pass that finds them changed.
    """
    held = [each for each in buffers_of(model) if not _is_statistic(each)]
    if held:
        values = [each.tensor.clone() for each in held if each.tensor is not None]
        model.register_forward_pre_hook(_StartingBuffers(held, values))


def restart_buffers(model: nn.Module) -> None:
    """Put held buffers back now, and not before the next pass."""
    for hook in _hooks(model):
        hook.restore()


@contextlib.contextmanager
def buffers_standing(model: nn.Module) -> Iterator[None]:
    """A block of batched passes, in which held buffers cannot be put back.

    Raises:
        RuntimeError: A pass moves them.
    """
    restart_buffers(model)
    for hook in _hooks(model):
        hook.standing = True
    try:
        yield
    finally:
        for hook in _hooks(model):
            hook.standing = False
            hook.restore()


def _hooks(model: nn.Module) -> list[_StartingBuffers]:
    return [h for h in model._forward_pre_hooks.values() if isinstance(h, _StartingBuffers)]


def _is_statistic(buffer: Buffer) -> bool:
    return isinstance(buffer.owner, _NormBase) and buffer.name in STATISTICS


class _StartingBuffers:
    """A hook that runs before each pass.

    Attributes:
        standing: Refuse to put back what has moved.
    """

    def __init__(self, buffers: list[Buffer], values: list[torch.Tensor]) -> None:
        self._buffers, self._values = buffers, values
        self.standing = False
        # Each buffer as the last pass found it; None: it is not known to be untouched since.
        self._found: list[tuple[torch.Tensor, int] | None] = [None] * len(buffers)

    def __call__(self, model: nn.Module, given: object) -> None:
        if self.standing and any(map(self._has_moved, range(len(self._buffers)))):
            raise RuntimeError("a buffer moves in a batched pass")
        self.restore()

    def restore(self) -> None:
        """Put back every buffer that has moved."""
        for index, (owner, name) in enumerate(self._buffers):
            if self._has_moved(index):
                # Not written in place: a graph may still hold what was there.
                fresh = self._values[index].clone()
                owner._buffers[name] = fresh
                self._found[index] = (fresh, fresh._version)

    def _has_moved(self, index: int) -> bool:
        tensor, found = self._buffers[index].tensor, self._found[index]
        return (
            tensor is None
            or found is None
            or tensor is not found[0]
            or (tensor._version != found[1])
        )

    def __deepcopy__(self, memo: dict[int, object]) -> _StartingBuffers:
        """For a copied model; its tensors' versions say nothing of what happened before."""
        values = [value.clone() for value in self._values]
        return _StartingBuffers(copy.deepcopy(self._buffers, memo), values)


class RandomNumbers:
    """Where torch's random numbers stand, so that another pass can draw the same.

    Args:
        device: That the passes run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._state = self._now()

    def _now(self) -> list[torch.Tensor]:
        cuda = [] if self._device is None else [torch.cuda.get_rng_state(self._device)]
        return [torch.get_rng_state(), *cuda]

    @property
    def drawn(self) -> bool:
        """Whether any were drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(self._state, self._now(), strict=True))

    def rewind(self) -> None:
        """Draw again from here on what was drawn before."""
        torch.set_rng_state(self._state[0])
        if self._device is not None:
            torch.cuda.set_rng_state(self._state[1], self._device)
