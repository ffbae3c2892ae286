"""A model of the user's own code, which a command is pointed at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from core.errors import InputError
from core.models.architecture import GivenModel
from core.named_objects import called


def own_architecture(text: str | None, seed: int, flag: str = "--model") -> GivenModel | None:
    """The user's own module as an architecture; None where none is named.

    Args:
        text: `module:function`; the function takes no arguments.
        seed: Seed of torch's random numbers while it is built.
        flag: The flag that the user gave it with, for messages.

    Raises:
        InputError: It cannot be built.
    """
    if text is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GivenModel(model_builder(text, flag)(), text)


def model_builder(text: str, flag: str = "--model") -> Callable[[], nn.Module]:
    """The function that builds a module of the user's own.

    Args:
        text: `module:function`; the function takes no arguments.
        flag: The flag that the user gave it with, for messages.

    Returns:
        A function that builds it, and raises an `InputError` if what comes is no module.
    """

    def build() -> nn.Module:
        model = called(text, flag)
        if not isinstance(model, nn.Module):
            raise InputError(f"{flag} {text}: gives a {type(model).__name__}, not an nn.Module")
        return model

    return build
