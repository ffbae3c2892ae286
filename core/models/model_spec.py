"""What an architecture is made from, and the registry of those that are not torchvision's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.errors import InputError

DEFAULT_POOL_KERNEL = 3  # Of torchvision's ResNets.


@dataclass(frozen=True)
class ModelSpec:
    """What an architecture is made from.

    Attributes:
        arch: A torchvision classifier, or a name registered with `register_model`.
        n_classes: Number of outputs.
        image_size: Side of the square input in pixels.
        stem: "imagenet" (7x7 stride 2 and pooling) or "cifar" (3x3 stride 1, no
            pooling); concerns ResNets only.
        width: Channels of the first stage; None for the architecture's own.
        pool_kernel: Kernel of the first max-pooling layer, as at 224 px.
        norm: "batch", or "group" where every BatchNorm is replaced by GroupNorm.
        malicious: What a malicious server does to it, see `core.models.malicious`; empty for
            an honest one.
    """

    arch: str = "resnet18"
    n_classes: int = 1000
    image_size: int = 224
    stem: str = "imagenet"
    width: int | None = None
    pool_kernel: int = DEFAULT_POOL_KERNEL
    norm: str = "batch"
    malicious: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a record."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`; unknown keys are an `InputError`."""
        try:
            return ModelSpec(**values)
        except TypeError as error:
            raise InputError(
                f"the checkpoint describes its model with unknown fields: {error}"
            ) from None


# Builders by the name that `--arch` takes.
BUILDERS: dict[str, Callable[[ModelSpec], nn.Module]] = {}


def register_model(
    name: str,
) -> Callable[[Callable[[ModelSpec], nn.Module]], Callable[[ModelSpec], nn.Module]]:
    """Make `--arch name` build a model with the decorated function.

    Args:
        name: Must not be taken.

    Raises:
        ValueError: The name is registered already.
    """

    def register(builder: Callable[[ModelSpec], nn.Module]) -> Callable[[ModelSpec], nn.Module]:
        if name in BUILDERS:
            raise ValueError(f"model {name} is registered already")
        BUILDERS[name] = builder
        return builder

    return register
