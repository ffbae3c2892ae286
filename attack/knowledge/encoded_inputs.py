"""A client's model with what the client did to its inputs in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from core.models.architecture import Architecture, Description

Encoding = Callable[[torch.Tensor], torch.Tensor]


class EncodedArchitecture:
    """An architecture whose model transforms a batch first.

    Args:
        inner: The client's architecture; parameters keep their names.
        encode: Takes and gives N x ..., as the model takes them.
        size: N. Parts of the batch, on which derivatives are checked, stay as they are.
    """

    def __init__(self, inner: Architecture, encode: Encoding, size: int) -> None:
        self.inner, self.encode, self.size = inner, encode, size

    @property
    def name(self) -> str:
        """See `Architecture`."""
        return self.inner.name

    def build(self) -> nn.Module:
        """See `Architecture`."""
        model = self.inner.build()
        model.register_forward_pre_hook(_Encode(self.encode, self.size))
        return model

    def skeleton(self) -> nn.Module:
        """See `Architecture`."""
        return self.inner.skeleton()

    def describe(self) -> Description:
        """See `Architecture`."""
        return self.inner.describe()


class _Encode:
    """The hook that transforms a whole batch."""

    def __init__(self, encode: Encoding, size: int) -> None:
        self.encode, self.size = encode, size

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images = inputs[0]
        if len(images) != self.size:
            return inputs
        return (self.encode(images), *inputs[1:])
