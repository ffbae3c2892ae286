"""Finished stages of an audit, kept as numbers so that an interrupted one goes on from there."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from core.errors import InputError
from core.reading import read_json_object
from core.records import BROKEN, check_types
from core.storage import write_record

T = TypeVar("T")


class Stages:
    """The stages of one audit.

    Args:
        folder: Where their file is kept; None: they are not kept.
        digest: Of everything that decides the numbers. Another audit has another file.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._path = None if folder is None else folder / f"stages-{digest[:16]}.json"
        self._done: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self._done = dict(read_json_object(self._path, "--report", "file of stages"))

    def once(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """What a stage found, computed unless an interrupted audit had done so.

        Args:
            name: Of the stage.
            kind: A dataclass of plain values, tuples of them and such dataclasses.
            compute: The stage.

        Raises:
            InputError: The file of stages is damaged.
        """
        if name in self._done:
            return self._read(name, kind)
        found = compute()
        self._done[name] = dataclasses.asdict(found)  # type: ignore[call-overload]
        if self._path is not None:
            write_record(self._path, {k: v for k, v in self._done.items() if k != "checksum"})
        return found

    def all_of(self, name: str, kind: type[T]) -> list[T]:
        """What the finished stages "NAME 0", "NAME 1", ... found."""
        found: list[T] = []
        while f"{name} {len(found)}" in self._done:
            found.append(self._read(f"{name} {len(found)}", kind))
        return found

    def _read(self, name: str, kind: type[T]) -> T:
        try:
            found = from_plain(kind, self._done[name])
            check_types(found)
        except (InputError, *BROKEN):
            raise InputError(f"--report: {self._path} is damaged; remove it") from None
        return typing.cast(T, found)


def from_plain(hint: Any, value: Any) -> Any:
    """A declared type from plain values, dataclasses from mappings and tuples from lists."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = _hints(hint)
        return hint(**{name: from_plain(hints[name], each) for name, each in value.items()})
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = inner if inner[1:] != (...,) else inner[:1] * len(value)
        return tuple(from_plain(k, v) for k, v in zip(kinds, value, strict=True))
    if value is not None and type(None) in inner:
        return from_plain(next(k for k in inner if k is not type(None)), value)
    return value


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)
