"""Files that somebody gave, read within bounds.

Whatever a file holds, one exception leaves a reader: `InputError`, with the flag and the file.
A reader takes regular files only (a pipe would wait for its writer, a device has no end), and
allocates no more than a small multiple of the file's size.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from core.errors import InputError

# Of a JSON document; a list of a million images takes a third of it.
MAX_JSON_BYTES = 256 * 2**20
# Bytes of a file that are looked at together.
_CHUNK = 1 << 20
# The key of a JSON record's own checksum.
CHECKSUM = "checksum"


def prefix_of(flag: str) -> str:
    """How a message begins: with the flag that led to the file, if there is one."""
    return f"{flag}: " if flag else ""


def check_regular(path: str | Path, flag: str = "", what: str = "file") -> Path:
    """Refuse what cannot be read to an end: nothing, a folder, a pipe, a device.

    Args:
        path: What was given.
        flag: The flag it was given with, for the message.
        what: What was expected there, for the message.

    Raises:
        InputError: There is no regular file of that name.
    """
    prefix = prefix_of(flag)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{prefix}there is no file {path}") from None
    except (OSError, ValueError) as error:
        # A ValueError: the name holds a null byte.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{prefix}{str(path)!r} cannot be opened ({reason})") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{prefix}{path} is a folder, not a {what}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{prefix}{path} is a pipe, a socket or a device, not a {what}")
    return Path(path)


def open_regular(path: str | Path, flag: str = "", what: str = "file") -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        path: What was given.
        flag: The flag it was given with, for the message.
        what: What was expected there, for the message.

    Raises:
        InputError: There is no regular file of that name, or it cannot be opened.
    """
    path = check_regular(path, flag, what)
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{prefix_of(flag)}cannot open {path} ({error.strerror})") from None


def read_bytes(
    path: str | Path, flag: str = "", what: str = "file", limit: int = MAX_JSON_BYTES
) -> bytes:
    """The whole of a regular file.

    Args:
        path: What was given.
        flag: The flag it was given with, for the message.
        what: What was expected there, for the message.
        limit: Bytes that are read at most.

    Raises:
        InputError: There is no regular file of that name, it cannot be read, or it is larger.
    """
    with open_regular(path, flag, what) as file:
        try:
            # A read of so many bytes would reserve as many, however small the file is.
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, limit) + 1)
        except OSError as error:
            raise InputError(f"{prefix_of(flag)}cannot read {path} ({error.strerror})") from None
    if len(content) > limit:
        raise InputError(
            f"{prefix_of(flag)}{path} is larger than the {limit / 2**20:.3g} MiB that a {what} "
            "may have"
        )
    return content


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: str | Path, flag: str = "", what: str = "JSON file") -> Any:
    """The plain values of a JSON file; a checksum that stands in it is checked.

    Args:
        path: What was given.
        flag: The flag it was given with, for the message.
        what: What was expected there, for the message.

    Raises:
        InputError: It cannot be read, is no JSON, is nested too deep, or was changed since
            its checksum was taken.
    """
    value = parse_json(read_bytes(path, flag, what), f"{prefix_of(flag)}{path}")
    if isinstance(value, dict) and CHECKSUM in value:
        check_sealed(value, f"{prefix_of(flag)}{path}")
    return value


def parse_json(content: bytes, where: str) -> Any:
    """The plain values of a JSON text.

    Args:
        content: In UTF-8.
        where: What to call it in a message.

    Raises:
        InputError: It is no JSON text, or is nested too deep.
    """
    try:
        value = json.loads(content.decode("utf-8"))
        if b"\\u" in content:
            # Half of a surrogate pair could not be printed or written again.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InputError(f"{where} is nested too deep for a JSON file") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    return value


def read_json_object(path: str | Path, flag: str = "", what: str = "JSON file") -> dict[str, Any]:
    """As `read_json`, for a file that holds an object.

    Raises:
        InputError: As there, or it holds something else.
    """
    value = read_json(path, flag, what)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{prefix_of(flag)}{path} is a JSON {kind}, not an object")
    return value


def checksum_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values in one canonical writing, without a checksum among them."""
    # Through JSON and back, so that tuples and numbers as keys count as what is written.
    written = json.loads(json.dumps({k: v for k, v in values.items() if k != CHECKSUM}))
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their checksum beside them."""
    return {**values, CHECKSUM: checksum_of(values)}


def check_sealed(values: Mapping[str, Any], where: str) -> None:
    """Compare values with the checksum among them.

    Raises:
        InputError: They differ.
    """
    if values[CHECKSUM] != checksum_of(values):
        raise InputError(
            f"{where} is damaged: it differs from the checksum in it (if you changed it on "
            f'purpose, remove its line "{CHECKSUM}")'
        )


def check_name(name: str, flag: str, becomes: str = "the name of a file or folder") -> None:
    """Refuse a name that would lead out of its folder, or that no file system takes.

    Args:
        name: As the user gave it.
        flag: The flag it was given with.
        becomes: What it becomes, for the message.

    Raises:
        InputError: It is empty, "." or "..", has a separator or a control character in it, or
            is too long.
    """
    strange = not name.isprintable() or "/" in name or "\\" in name
    if name.strip() in ("", ".", "..") or strange or len(os.fsencode(name)) > 200:
        shown = name[:80] if name and name.isprintable() else repr(name[:80])
        raise InputError(
            f"{flag} {shown}: becomes {becomes}; give up to 200 printable characters "
            "without / and \\, and not . or .."
        )
