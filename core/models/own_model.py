"""A model of the user's own code, which a command is pointed at."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from core.errors import InputError
from core.named_objects import called


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
