"""`audit.json`: an audit's record as a file, the one writer and the one reader.

The record is an allow-list, and the file is held to it: what is not a field is refused, in either
direction, and so are numbers that are not finite. What looks like the name of a file is taken out
of sentences before they are written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from audit.decision import Verdict
from audit.record import SCHEMA_VERSION, AuditRecord, PowerSection
from core.errors import InputError
from core.reading import CHECKSUM, check_sealed, parse_json, read_bytes
from core.records import check_version
from core.storage import write_record

FILE = "audit.json"
KIND = "audit"
# Of the file, of a list and of a text: an audit of thousands of images stays far below.
MAX_BYTES, MAX_ENTRIES, MAX_CHARACTERS = 8 << 20, 100_000, 2_000
MAX_WHOLE = 2**64
LEFT_OUT = "(name left out)"

# Numbers that are probabilities or shares.
_SHARES = frozenset(
    ["p_value", "smallest", "alpha", "per_image", "accuracy", "chance", "confidence",
     "auroc", "auroc_low", "auroc_high", "balanced_accuracy", "best_balanced_accuracy"]
)  # fmt: skip
_MAY_BE_NEGATIVE = frozenset(["seed"])
_VERDICTS = tuple(verdict.value for verdict in Verdict)
# A path, or the name of a file of images, volumes, weights or tables.
_FILE_NAME = re.compile(
    r"file:\S+|(?<![\w/:<])(?:~|\.{1,2})?/[\w.~%-][^\s,;'\"]*|\b[a-z]:\\[^\s,;'\"]+|\\\\\S+"
    r"|[^\s,;'\"(=]+\.(?:png|jpe?g|bmp|gif|tiff?|webp|npy|npz|nii|dcm|mha|nrrd|h5|hdf5|zip|gz|tar"
    r"|pth?|ckpt|pkl|safetensors|csv|tsv|json|ya?ml|txt)\b(?:\.gz\b)?",
    re.IGNORECASE,
)
T = TypeVar("T")


def write_audit(record: AuditRecord, folder: Path, name: str = FILE) -> Path:
    """Write `audit.json` into a folder, atomically and with its checksum.

    Args:
        record: The audit.
        folder: Where to; made if missing.
        name: Of the file; a federation has one per round.

    Returns:
        The file.

    Raises:
        InputError: The record holds what has no place in it; names the field.
    """
    plain = {"kind": KIND, **dataclasses.asdict(without_names(record))}
    record_of(plain)
    path = folder / name
    write_record(path, plain)
    return path


def read_audit(path: str | Path, flag: str = "") -> AuditRecord:
    """Read `audit.json`, of this version or an earlier one.

    Args:
        path: The file, or the folder it is in.
        flag: The flag it was given with, for messages.

    Raises:
        InputError: It cannot be read, is damaged, or is no record of an audit; names the field.
    """
    place = Path(path)
    place = place / FILE if place.is_dir() else place
    where = f"{flag}: {place}" if flag else str(place)
    values = parse_json(read_bytes(place, flag, "record of an audit", MAX_BYTES), where)
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise InputError(f"{where} is not the record of an audit")
    if CHECKSUM in values:
        check_sealed(values, where)
    try:
        return record_of(values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def record_of(values: Mapping[str, Any]) -> AuditRecord:
    """The record that plain values hold, every one of them checked.

    Raises:
        InputError: Names the field that is missing, unknown, or not what it should be.
    """
    check_version(values, SCHEMA_VERSION, "the audit")
    plain = {name: value for name, value in values.items() if name not in ("kind", CHECKSUM)}
    record = _section(AuditRecord, plain, "")
    return dataclasses.replace(record, schema_version=SCHEMA_VERSION)


def without_names(record: AuditRecord) -> AuditRecord:
    """The record without anything in its sentences that looks like the name of a file."""
    return _mapped(record, lambda text: _FILE_NAME.sub(LEFT_OUT, text))


def _mapped(value: T, change: Callable[[str], str]) -> T:
    """A record, or a part of one, with every text changed."""
    changed: Any = value
    if isinstance(value, str):
        changed = change(value)
    elif isinstance(value, tuple):
        changed = tuple(_mapped(each, change) for each in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = type(value)(**{name: _mapped(each, change) for name, each in fields.items()})
    return typing.cast(T, changed)


# -- Plain values, checked against the declared types -----------------------------------


def _section(kind: type[T], values: object, where: str) -> T:
    """A dataclass from a JSON object that has its fields and no others."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where or 'it'} is not an object")
    hints = _hints(typing.cast(Hashable, kind))
    place = f"{where}." if where else ""
    unknown = sorted(set(values) - set(hints))
    missing = sorted(_required(kind) - set(values))
    if unknown or missing:
        what = "unknown" if unknown else "missing"
        raise InputError(f"its field {place}{(unknown or missing)[0]:.60} is {what}")
    made = kind(**{name: _value(hints[name], values[name], f"{place}{name}") for name in values})
    if isinstance(made, PowerSection) and made.found > made.of:
        raise InputError(f"its {place}found is larger than its {place}of")
    return made


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _required(kind: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}


def _value(hint: Any, value: object, where: str) -> Any:
    """A value of a declared type; refused where it is of another."""
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, where)
    if isinstance(hint, types.UnionType):
        inner = next(each for each in typing.get_args(hint) if each is not types.NoneType)
        return None if value is None else _value(inner, value, where)
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint)[0], value, where)
    return {str: _text, bool: _truth, int: _whole, float: _number}[hint](value, where)


def _tuple(hint: Any, value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_ENTRIES:
        raise InputError(f"its {where} is not a list of up to {MAX_ENTRIES} entries")
    return tuple(_value(hint, each, f"{where}[{number}]") for number, each in enumerate(value))


def _name(where: str) -> str:
    """The field's own name: of `attacks[0].test.per_image[3]`, `per_image`."""
    return where.rpartition(".")[2].partition("[")[0]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        raise InputError(f"its {where} is not a text of up to {MAX_CHARACTERS} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"its {where} holds half a character")
    if _name(where) == "verdict" and value not in _VERDICTS:
        raise InputError(f"its {where} is {value!r:.60}, not one of {', '.join(_VERDICTS)}")
    return value


def _truth(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"its {where} is {value!r:.60}, not true or false")
    return value


def _whole(value: object, where: str) -> int:
    if type(value) is not int or not -MAX_WHOLE < value < MAX_WHOLE:
        raise InputError(f"its {where} is {value!r:.60}, not a whole number")
    if value < 0 and _name(where) not in _MAY_BE_NEGATIVE:
        raise InputError(f"its {where} is {value}, and cannot be negative")
    return value


def _number(value: object, where: str) -> float:
    if type(value) is int and -MAX_WHOLE < value < MAX_WHOLE:
        value = float(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise InputError(f"its {where} is {value!r:.60}, not a finite number")
    if _name(where) in _SHARES and not 0 <= value <= 1:
        raise InputError(f"its {where} is {value:g}, not between 0 and 1")
    return value
