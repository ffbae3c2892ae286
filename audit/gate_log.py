"""The site's own log of what left it: append-only, each line sealed by the one before.

One JSON object per line, with the SHA-256 of the line before it and of itself. A line that
was changed, removed or put in later breaks the chain from there on; lines cut off at the end
do not, so a site that wants to see those too keeps the last seal somewhere else.

python -m audit.gate_log PATH    checks a log
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.reading import check_regular, open_regular, parse_json

LOG_NAME = "gate_log.jsonl"
MAX_LINE_BYTES = 1 << 20
# What the first line names as the line before it.
START = "0" * 64


def append(folder: str | Path, entry: Mapping[str, Any]) -> str:
    """Add a line to a site's log, and wait until the disk has it.

    Args:
        folder: Where the log is.
        entry: What the line says, as plain values.

    Returns:
        The line's seal.

    Raises:
        InputError: The log is damaged.
        OSError: The line cannot be written.
    """
    path = Path(folder) / LOG_NAME
    if path.exists():
        check_regular(path, what="log")
    with open(path, "a+b") as file:
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **entry,
            "previous": _last_seal(file, path),
        }
        sealed = {**content, "seal": _seal(content)}
        file.write(json.dumps(sealed, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return str(sealed["seal"])


def verify(path: str | Path) -> list[dict[str, Any]]:
    """Read a log and check its chain.

    Args:
        path: The log, or the folder that holds it.

    Returns:
        Its entries, the oldest first.

    Raises:
        InputError: There is no such log, or a line does not follow from the one before; the
            message names the line.
    """
    path = Path(path)
    path = path / LOG_NAME if path.is_dir() else path
    entries: list[dict[str, Any]] = []
    previous = START
    with open_regular(path, what="log") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            entry = _parsed(line, f"{path}: line {number}")
            sealed = {key: value for key, value in entry.items() if key != "seal"}
            if entry.get("previous") != previous or entry.get("seal") != _seal(sealed):
                raise InputError(f"{path}: line {number} does not follow from the one before")
            previous = str(entry["seal"])
            entries.append(entry)
    return entries


def _last_seal(file: Any, path: Path) -> str:
    """The seal of the last line, read from the end of the file."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - MAX_LINE_BYTES))
    lines = file.read().splitlines()
    if not lines:
        return START
    return str(_parsed(lines[-1], f"{path}: the last line").get("seal"))


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"{where} is damaged: it is longer than any line of a log")
    try:
        entry = parse_json(line, where)
    except InputError:
        raise InputError(f"{where} is damaged: it is no JSON") from None
    if not isinstance(entry, dict):
        raise InputError(f"{where} is damaged: it is no JSON object")
    return entry


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m audit.gate_log", description="Check the chain of a site's gate log."
    )
    parser.add_argument("path", help="the log, or the folder that holds it")
    return parser


def _check(path: str) -> None:
    entries = verify(path)
    seal = entries[-1]["seal"] if entries else START
    print(f"{len(entries)} entries, the chain holds; last seal {seal}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    path = build_parser().parse_args(argv).path
    return exit_status(lambda: _check(path))


if __name__ == "__main__":
    sys.exit(main())
