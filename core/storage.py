"""Files that are written whole or not at all, and loaded without running code.

Torch is imported where checkpoints are: commands that write text only start without it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from core.errors import InputError
from core.locks import remove_left_behind, temporary_prefix
from core.reading import sealed


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
    _clear(path.parent.resolve())
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
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            # A write on an open file, of a full disk above all, does not say which.
            error.filename = str(path)
        raise


@functools.cache
def _clear(folder: Path) -> None:
    """Remove what killed runs left half written, once for every folder that is written to."""
    remove_left_behind(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries: a new name is safe only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse it; there is nothing more to do then.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_entries(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a dictionary of large collections as JSON, one line per entry of each, atomically.

    Half of a large file would be indentation, and one more record change thousands of lines.
    """
    lines = [f" {json.dumps(name)}: {_by_lines(value[name])}" for name in sorted(value)]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _by_lines(value: Any) -> str:
    """A dictionary or list with one line per entry; anything else on one line."""
    if isinstance(value, dict) and value:
        lines = [f"  {json.dumps(name)}: {_on_one_line(value[name])}" for name in sorted(value)]
        return "{\n" + ",\n".join(lines) + "\n }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {_on_one_line(entry)}" for entry in value) + "\n ]"
    return _on_one_line(value)


def _on_one_line(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON with its checksum, atomically."""
    write_json(path, sealed(record))


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


def load_checkpoint(path: str | Path, flag: str = "--checkpoint") -> dict[str, Any]:
    """Load a checkpoint without running any code it may contain.

    Args:
        path: File written by `torch.save`.
        flag: The flag the user gave the path with, for the message.

    Returns:
        The dictionary in the file, tensors on the CPU.

    Raises:
        InputError: The file is missing, empty, truncated, damaged, not a checkpoint, holds
            anything but plain data, or claims more than it holds.
    """
    from core.torch_files import read_torch_file

    value = read_torch_file(path, flag)
    if not isinstance(value, dict):
        raise InputError(f"{flag}: {path} holds a {type(value).__name__}, not a checkpoint")
    return value
