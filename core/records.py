"""Records: what every result says about how it was made, and how strictly one is read."""

from __future__ import annotations

import dataclasses
import platform
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch

from core.errors import InputError
from core.reading import read_json_object
from core.version import __version__

R = TypeVar("R")
# What the fields of a broken record lead its reader to.
BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """Versions, device, threads and seed of this run, as plain values for a JSON record.

    Args:
        device: Device that runs the computation.
        seed: The seed it was started with.
    """
    import torchvision

    cuda = device.type == "cuda"
    return {
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "gradinvbench": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if cuda else None,
        },
    }


def read_record(path: Path, what: str, parse: Callable[[Mapping[str, Any]], R]) -> R:
    """Read a JSON record.

    Args:
        path: The file.
        what: What it should be a record of, for messages: "a training run".
        parse: Makes the typed record from plain values.

    Raises:
        InputError: There is none, it is damaged, or it is none of that kind.
    """
    values = read_json_object(path, what=f"record of {what}")
    try:
        return parse(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except BROKEN as error:
        raise InputError(f"{path} is not a whole record of {what} ({error!r:.200})") from None


def check_version(values: Mapping[str, Any], newest: int, what: str, oldest: int = 1) -> int:
    """The version of a record's layout; one without a number is of the oldest.

    Args:
        values: Plain values.
        newest: The version that this program writes.
        what: Whose record it is, for the message: "the training".
        oldest: The version of a record without a number.

    Raises:
        InputError: It is none that this program reads.
    """
    version = values.get("schema_version", oldest)
    if type(version) is not int or not oldest <= version <= newest:
        raise InputError(
            f"{what}'s record has schema version {version!r:.40} and this program reads up "
            f"to {newest}; update the program"
        )
    return version


def check_types(record: object) -> None:
    """Refuse a dataclass whose fields are not of the types that they are declared with.

    A list stands for a tuple, as JSON has it, and a whole number for a number; nothing else
    stands for anything.

    Args:
        record: An instance of a dataclass; dataclasses in it are looked into.

    Raises:
        InputError: Names the field.
    """
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if not fits(value, hints[field.name]):
            raise InputError(f"its {field.name} is {value!r:.60}")


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a declared type, strictly: True is no number, 1.0 is not whole."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    if origin is tuple and inner[1:] != (...,):
        return _is_list(value) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return _is_list(value) and all(fits(each, inner[0]) for each in value)
    if dataclasses.is_dataclass(value):
        check_types(value)
    if hint is float:
        return type(value) in (int, float)
    if hint is int:
        return type(value) is int
    return isinstance(value, hint)


def _is_list(value: object) -> typing.TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))
