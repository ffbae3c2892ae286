"""`save_target` and `load_target`: what a client shared as a file."""

from __future__ import annotations

from pathlib import Path

from core.losses import Function, Loss
from core.target import Target, Truth
from gradients import checkpoint


def save_target(
    path: str | Path, target: Target, truth: Truth | None = None, *, builder: str = ""
) -> None:
    """Write what a client shared to a file, which the command `attack` reads as well.

    Args:
        path: File to write.
        target: What the client shared.
        truth: What lies behind it; left out, the file holds nothing private.
        builder: For a module of your own, the function without arguments that builds it, as
            `module:function`. A file holds no code, only this text.

    Raises:
        InputError: The model is a module of your own and no builder is named, or the loss is
            a function of your own that cannot be imported (`GivenLoss` takes a name for it).
    """
    checkpoint.save_target(path, target, truth, builder=builder)


def load_target(
    path: str | Path,
    *,
    build: checkpoint.Builder | None = None,
    loss: Function | Loss | None = None,
) -> tuple[Target, Truth | None]:
    """Read a file of `save_target` or of the command `extract`; nothing in it is run.

    Args:
        path: File to read.
        build: Builds the module, if the file is of a module of your own; its parameters
            are then those of the file.
        loss: The client's loss, if it is a function of your own.

    Returns:
        What an attacker sees, and what lies behind it (None if the file does not say).

    Raises:
        InputError: Not such a file, or one that contradicts itself.
    """
    return checkpoint.load_target(path, "load_target", build, loss)
