"""Files that are written whole or not at all, and loaded without running code.

Torch is imported where checkpoints are: commands that write text only start without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core.errors import InputError
from core.locks import temporary_prefix

# The published checkpoints carry their command line as a Namespace; it is a
# plain bag of attributes and its constructor runs no code of the file's.
ALLOWED_CLASSES: list[Any] = [argparse.Namespace]


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that takes its name when the block ends well.

    Args:
        path: Final name; missing parent folders are made.
        mode: "wb" for bytes, "w" for text.

    Yields:
        The open temporary file. On an error it is removed and `path` keeps
        whatever it held before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    prefix = temporary_prefix(f".{path.name}.")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            # A write on an open file, of a full disk above all, does not say which.
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_checkpoint(value: dict[str, Any], path: str | Path) -> None:
    """Write a dictionary of tensors and plain values to `path`, atomically.

    Raises:
        OSError: The disk is full or the folder cannot be written; a file that
            stood at `path` before is untouched.
    """
    import torch

    try:
        with atomic_file(path) as file:
            torch.save(value, file)
    except RuntimeError as error:
        # torch's zip writer hides the cause of a failed write (a full disk,
        # mostly) behind its own exception; the chain still has it.
        if isinstance(error.__context__, OSError):
            error.__context__.filename = str(path)
            raise error.__context__ from None
        raise


def _reason(error: pickle.UnpicklingError) -> str:
    """What a refused file contains; torch's own text advises to switch the check off."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it refers to {found[1]}" if found else "it is not a file of torch.save"


def _numpy_scalars() -> list[Any]:
    """What a file with NumPy's scalars names: trainers write accuracies and counters so.

    Their constructor takes bytes and runs nothing; NumPy 2 moved it to another module.
    """
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    places = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    names = ("float64", "float32", "float16", "int64", "int32", "bool")
    return [*((scalar, place) for place in places), np.dtype, *(type(np.dtype(n)) for n in names)]


def load_checkpoint(path: str | Path, flag: str = "--checkpoint") -> dict[str, Any]:
    """Load a checkpoint without running any code it may contain.

    Args:
        path: File written by `torch.save`.
        flag: The flag the user gave the path with, for the message.

    Returns:
        The dictionary in the file, tensors on the CPU.

    Raises:
        InputError: The file is missing, empty, truncated, not a checkpoint, or
            holds objects outside the allow-list.
    """
    import torch

    path = Path(path)
    if not path.exists():
        raise InputError(f"{flag}: there is no file {path}")
    if path.is_dir():
        raise InputError(f"{flag}: {path} is a folder, not a checkpoint file")
    if path.stat().st_size == 0:
        raise InputError(f"{flag}: {path} is empty (0 bytes)")
    try:
        with torch.serialization.safe_globals([*ALLOWED_CLASSES, *_numpy_scalars()]):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{flag}: {path} is not a checkpoint that can be loaded safely ({_reason(error)})"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError) as error:
        raise InputError(f"{flag}: {path} is truncated or not a checkpoint") from error
    if not isinstance(value, dict):
        raise InputError(f"{flag}: {path} holds a {type(value).__name__}, not a checkpoint")
    return value
