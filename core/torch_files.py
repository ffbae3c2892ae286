"""Files of `torch.save`, read without running code and without believing what they claim.

`torch.load(weights_only=True)` runs no code either, but it allocates what a file asks for: a
deflated storage, `bytearray(10**10)`, a storage of a size that the file does not hold. Here
every storage is as large as the bytes that stand for it, nothing else allocates by a number,
and the checksum of every part of the file is compared, which torch writes but does not check.

The format: a zip archive of stored members, `data.pkl` and one `data/KEY` per storage
(https://docs.pytorch.org/docs/stable/notes/serialization.html); before PyTorch 1.6 five pickles
and the storages behind them. Pickles are of protocol 2.
"""

from __future__ import annotations

import argparse
import io
import math
import pickletools
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from core.errors import InputError
from core.reading import open_regular, prefix_of

# A file may refer to one tensor or container several times; whoever copies what it refers to
# must not need more than this many times the file's size.
MAX_REPEATS = 8
MAX_DEPTH = 64
# Steps of one pickle; a state of ten thousand traced iterations has some 10^6.
MAX_STEPS = 16 * 2**20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_CHUNK = 1 << 20
_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
_NUMPY_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1")
# What a broken or hostile pickle leads the steps of its reader to.
_BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError, struct.error,
)  # fmt: skip


class _RefusedError(Exception):
    """The file refers to something that is not plain data; the message says what."""


class _DamagedError(Exception):
    """The file is not what was written; the message says where."""


def read_torch_file(path: str | Path, flag: str) -> Any:
    """Read a file of `torch.save`.

    Args:
        path: The file.
        flag: The flag it was given with, for messages.

    Returns:
        What was saved: plain values, containers, `argparse.Namespace`, NumPy arrays of numbers
        and tensors on the CPU.

    Raises:
        InputError: Missing, empty, no regular file, damaged, not of `torch.save`; or it holds
            anything but plain data, or claims more than it holds.
    """
    with open_regular(path, flag, "checkpoint file") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size == 0:
            raise InputError(f"{prefix_of(flag)}{path} is empty (0 bytes)")
        try:
            value = (_read_zip if file.read(4) == _ZIP_MAGIC else _read_legacy)(file, size)
            _check_extent(value, size)
        except _RefusedError as error:
            raise InputError(
                f"{prefix_of(flag)}{path} is not a checkpoint that can be loaded safely ({error})"
            ) from None
        except _DamagedError as error:
            raise InputError(f"{prefix_of(flag)}{path} is damaged: {error}") from None
        except (*_BROKEN, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{prefix_of(flag)}{path} is truncated or not a checkpoint") from error
    return value


# -- The archive ------------------------------------------------------------------------


class _Archive:
    """The members of a zip archive, read where they stand.

    Args:
        file: Open for reading.
        size: Its bytes.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        members = zipfile.ZipFile(file).infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _RefusedError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members) > size:
            raise _DamagedError("its members claim more bytes than it has")
        if any(member.file_size != member.compress_size for member in members):
            raise _DamagedError("a member claims two sizes")
        # torch.serialization.set_crc32_options(False) leaves all checksums out.
        self._summed = any(member.CRC for member in members)
        self._members = {member.filename.partition("/")[2]: member for member in members}
        self._unread = set(self._members)
        if len(self._members) != len(members):
            raise _DamagedError("two of its members have one name")
        if "constants.pkl" in self._members:
            raise _RefusedError("it is a TorchScript program")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a member, checked against its checksum."""
        member = self._members[name]
        self._file.seek(member.header_offset)
        magic, *lengths = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        if magic != _ZIP_MAGIC:
            raise _DamagedError(f"there is no member {name} where it should be")
        self._file.seek(sum(lengths), io.SEEK_CUR)
        content = torch.empty(member.file_size, dtype=torch.uint8)
        if _fill(self._file, content) != member.CRC and self._summed:
            raise _DamagedError(f"the checksum of {name} does not match")
        self._unread.discard(name)
        return content

    def check_rest(self) -> None:
        """Check what was not read: it is part of the file, too."""
        for name in list(self._unread):
            self.read(name)


def _fill(file: IO[bytes], content: torch.Tensor) -> int:
    """Read as many bytes as a tensor has into it; returns their CRC-32."""
    view, checksum = content.numpy().data, 0
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise EOFError
        checksum = zlib.crc32(part, checksum)
    return checksum


def _read_zip(file: IO[bytes], size: int) -> Any:
    archive = _Archive(file, size)
    order = bytes(archive.read("byteorder").numpy()) if "byteorder" in archive else b"little"
    if order.decode() != sys.byteorder:
        raise _RefusedError(f"its numbers are {order[:20]!r}-endian")
    storages: dict[str, torch.Tensor] = {}

    def storage(key: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        if key not in storages:
            storages[key] = archive.read(f"data/{key}")
        if count * dtype.itemsize > len(storages[key]):
            raise _DamagedError(f"it claims more numbers than its member data/{key} has")
        return storages[key]

    pickled = bytes(archive.read("data.pkl").numpy())
    value = _Pickle(io.BytesIO(pickled), len(pickled), storage).load()
    archive.check_rest()
    return value


def _read_legacy(file: IO[bytes], size: int) -> Any:
    file.seek(0)
    # In memory, where reading as many bytes as a file claims stops at its end.
    file = io.BytesIO(file.read())
    storages: dict[str, _Numbers] = {}
    left = size

    def storage(key: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal left
        n_bytes = count * dtype.itemsize
        if key not in storages:
            left -= n_bytes
            if left < 0:
                raise _DamagedError("it claims more numbers than it has")
            storages[key] = _Numbers(torch.empty(n_bytes, dtype=torch.uint8), dtype)
        if n_bytes > len(storages[key].content):
            raise _DamagedError("it claims two sizes for a storage")
        return storages[key].content

    def next_pickle() -> Any:
        return _Pickle(file, size, storage).load()

    try:
        known = next_pickle() == _LEGACY_MAGIC
    except (*_BROKEN, _RefusedError):
        known = False
    if not known:
        raise _RefusedError("it is not a file of torch.save")
    if next_pickle() != _LEGACY_PROTOCOL:
        raise _RefusedError("it is of an unknown version of torch.save")
    if not next_pickle()["little_endian"]:
        raise _RefusedError("its numbers are big-endian")
    value = next_pickle()
    for key in next_pickle():
        _fill_legacy(file, storages[str(key)])
    return value


def _fill_legacy(file: IO[bytes], numbers: _Numbers) -> None:
    (count,) = struct.unpack("<q", file.read(8))
    if count * numbers.dtype.itemsize != len(numbers.content):
        raise _DamagedError("a storage has another size than it claims")
    _fill(file, numbers.content)


# -- The pickle -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """Something that a pickle may refer to by name: what to do where it is called."""

    call: Callable[..., Any]


@dataclass(frozen=True)
class _Numbers:
    """A storage: bytes, and what numbers they are."""

    content: torch.Tensor
    dtype: torch.dtype


class _Pickle:
    """Carries out one pickle, with few operations and few names.

    Args:
        file: Positioned at the pickle.
        size: Bytes that it may have.
        storage: Gives the bytes of a storage by its key; checks that there are so many numbers.
    """

    def __init__(
        self, file: IO[bytes], size: int, storage: Callable[[str, int, torch.dtype], torch.Tensor]
    ) -> None:
        self._file, self._storage = file, storage
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # What may be copied from one container into another, and containers that may be made:
        # torch writes at least three bytes for one, and it takes up twenty times as much.
        self._copies, self._containers = 2 * size + 1024, size // 3 + 1024

    def load(self) -> Any:
        """The pickled value."""
        for step, (operation, argument, _) in enumerate(pickletools.genops(self._file)):
            if step > MAX_STEPS:
                raise _RefusedError(f"its description has more than {MAX_STEPS} steps")
            if operation.name == "STOP":
                return self._stack.pop()
            if operation.name in _CONTAINERS:
                self._containers -= 1
                if self._containers < 0:
                    raise _DamagedError("it consists of empty containers")
            if operation.name in _VALUES:
                self._stack.append(_VALUES[operation.name](argument))
            elif operation.name in _STEPS:
                _STEPS[operation.name](self, argument)
            else:
                raise _RefusedError(f"it holds the unusual operation {operation.name}")
        raise EOFError

    # The steps, by the names of the operations.

    def mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            items = self._since_mark()
        else:
            items = self._stack[-count:]
            if len(items) != count:
                raise IndexError
            del self._stack[-count:]
        self._stack.append(tuple(items))

    def append(self, _: None) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def extend(self, _: None) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._top(dict)[_key(key)] = value

    def set_items(self, _: None) -> None:
        items = self._since_mark()
        mapping = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            mapping[_key(key)] = value

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError
        return self._stack[-1]

    def remember(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def recall(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def refer(self, words: str) -> None:
        module, _, name = words.partition(" ")
        module = {"__builtin__": "builtins"}.get(module, module)
        self._stack.append(_named(f"{module}.{name}"))

    def call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not _Named or type(arguments) is not tuple:
            raise TypeError
        self._copies -= sum(len(each) for each in arguments if isinstance(each, _COPIED))
        self._check_copies()
        self._stack.append(function.call(*arguments))

    def _check_copies(self) -> None:
        if self._copies < 0:
            raise _DamagedError("it copies one value again and again")

    def build(self, _: None) -> None:
        state = self._stack.pop()
        if type(self._stack[-1]) is OrderedDict:
            # The versions of layers, which `state_dict` notes; nothing else belongs there.
            if _is_metadata(state.get("_metadata")):
                vars(self._stack[-1])["_metadata"] = state["_metadata"]
        elif isinstance(self._stack[-1], np.dtype):
            # Version and byte order; what follows is of structures, which there are none of.
            if state[1] not in ("<", "|", "="):
                raise _RefusedError(f"its numbers are {state[1]!r:.20}-endian")
        elif type(self._stack[-1]) is np.ndarray:
            self._copies -= len(state[-1])
            self._check_copies()
            _fill_array(self._stack[-1], *state)
        elif type(self._stack[-1]) is argparse.Namespace:
            vars(self._stack[-1]).update({str(name): value for name, value in state.items()})
        else:
            raise TypeError

    def storage(self, _: None) -> None:
        word, kind, key, _location, count, *view = self._stack.pop()
        if word != "storage" or type(kind) is not torch.dtype or type(count) is not int:
            raise TypeError
        if count < 0:
            raise _DamagedError("it claims a storage of negative size")
        content = self._storage(str(key), count, kind)
        if view and view[0] is not None:
            _, offset, length = view[0]
            content = content[offset * kind.itemsize :][: length * kind.itemsize]
        self._stack.append(_Numbers(content, kind))


_VALUES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "SHORT_BINSTRING"), lambda v: v
    ),
    "BINUNICODE": lambda text: text if text.isascii() else text.encode().decode(),
}
_COPIED = (str, list, tuple, dict, set)
_CONTAINERS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_STEPS: dict[str, Callable[[_Pickle, Any], None]] = {
    "PROTO": lambda pickle, _: None,
    "MARK": _Pickle.mark,
    "TUPLE": _Pickle.tuple_of,
    "TUPLE1": lambda pickle, _: pickle.tuple_of(1),
    "TUPLE2": lambda pickle, _: pickle.tuple_of(2),
    "TUPLE3": lambda pickle, _: pickle.tuple_of(3),
    "APPEND": _Pickle.append,
    "APPENDS": _Pickle.extend,
    "SETITEM": _Pickle.set_item,
    "SETITEMS": _Pickle.set_items,
    "BINPUT": _Pickle.remember,
    "LONG_BINPUT": _Pickle.remember,
    "BINGET": _Pickle.recall,
    "LONG_BINGET": _Pickle.recall,
    "GLOBAL": _Pickle.refer,
    "REDUCE": _Pickle.call,
    "NEWOBJ": _Pickle.call,
    "BUILD": _Pickle.build,
    "BINPERSID": _Pickle.storage,
}


def _key(key: Any) -> Any:
    """A key of a dictionary; others could be made to collide."""
    if isinstance(key, (str, bytes, bool, type(None))):
        return key
    if isinstance(key, int) and abs(key) < 2**63:
        return key
    raise TypeError("neither a word nor a number")


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(about, dict)
        and all(isinstance(version, (int, bool)) for version in about.values())
        for name, about in value.items()
    )


# -- What a pickle may refer to -----------------------------------------------------------


def _named(name: str) -> _Named | torch.dtype:
    if name in _NAMED:
        return _NAMED[name]
    module, _, word = name.rpartition(".")
    if module == "torch" and word.removesuffix("Storage") in _DTYPES:
        return _DTYPES[word.removesuffix("Storage")]
    dtype = getattr(torch, word, None) if module == "torch" else None
    if type(dtype) is not torch.dtype:
        raise _RefusedError(f"it refers to {name}")
    return dtype


def _tensor(
    numbers: _Numbers,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    requires_grad: bool = False,
    hooks: object = None,
    dtype: torch.dtype | Mapping[str, bool] | None = None,
    *_: object,
) -> torch.Tensor:
    """A view of a storage; the last argument is a dtype, or what must be left undone."""
    if type(numbers) is not _Numbers:
        raise TypeError
    if isinstance(dtype, Mapping) and any(dtype.values()):
        raise _RefusedError("it holds a tensor that stands for its conjugate or its negative")
    kind = dtype if isinstance(dtype, torch.dtype) else numbers.dtype
    whole = numbers.content.untyped_storage()
    start = numbers.content.storage_offset()
    if start % kind.itemsize:
        raise TypeError
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    n_values = len(numbers.content) // kind.itemsize
    if min([offset, *size, *stride]) < 0 or (0 not in size and last >= n_values):
        raise _DamagedError("a tensor claims more numbers than its storage has")
    tensor = torch.empty(0, dtype=kind)
    tensor.set_(whole, start // kind.itemsize + offset, tuple(size), tuple(stride))
    return tensor.requires_grad_(bool(requires_grad))


def _parameter(data: torch.Tensor, requires_grad: bool = True, *_: object) -> torch.nn.Parameter:
    if not isinstance(data, torch.Tensor):
        raise TypeError
    return torch.nn.Parameter(data.detach(), bool(requires_grad))


def _ordered(items: Sequence[tuple[Any, Any]] = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in items)


def _counter(counts: Mapping[Any, int] | None = None) -> Counter[Any]:
    return Counter({_key(key): int(count) for key, count in (counts or {}).items()})


def _bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise TypeError
    return text.encode("latin-1")


def _numpy_dtype(word: str, *_: object) -> np.dtype[Any]:
    if word not in _NUMPY_DTYPES:
        raise _RefusedError(f"it refers to NumPy's type {word!r:.20}")
    return np.dtype(word)


def _numpy_scalar(dtype: np.dtype[Any], content: bytes) -> Any:
    if not isinstance(dtype, np.dtype) or len(content) != dtype.itemsize:
        raise TypeError
    return np.frombuffer(content, dtype)[0]


def _empty_array(kind: _Named, *_: object) -> np.ndarray[Any, Any]:
    """What `_fill_array` fills; whoever refers to it refers to what it holds then."""
    if kind is not _NAMED["numpy.ndarray"]:
        raise TypeError
    return np.ndarray((0,), np.dtype("b1"))


def _fill_array(
    array: np.ndarray[Any, Any],
    version: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    fortran: bool,
    content: bytes,
) -> None:
    """Give an array the bytes that a pickle has for it, if they are as many as it claims."""
    plain = isinstance(dtype, np.dtype) and dtype.kind in "fiub" and type(content) is bytes
    if not plain or array.size or any(type(side) is not int or side < 0 for side in shape):
        raise TypeError
    if math.prod(shape) * dtype.itemsize != len(content):
        raise _DamagedError("an array claims another number of values than it has")
    array.__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]


def _not_called(*_: object) -> None:
    raise TypeError


def _size(items: Sequence[int]) -> torch.Size:
    return torch.Size(items)


_NAMED: dict[str, _Named | torch.dtype] = {
    "collections.OrderedDict": _Named(_ordered),
    "collections.Counter": _Named(_counter),
    "argparse.Namespace": _Named(argparse.Namespace),
    "builtins.set": _Named(lambda items=(): {_key(item) for item in items}),
    # Empty bytes are pickled as a call.
    "builtins.bytes": _Named(lambda: b""),
    "builtins.complex": _Named(lambda real, imaginary: complex(real, imaginary)),
    "_codecs.encode": _Named(_bytes),
    # Trainers write accuracies and counters as NumPy's scalars, which NumPy 2 moved.
    "numpy.dtype": _Named(_numpy_dtype),
    "numpy.core.multiarray.scalar": _Named(_numpy_scalar),
    "numpy._core.multiarray.scalar": _Named(_numpy_scalar),
    # Arrays, as updates kept as NumPy's are; the name `numpy.ndarray` is only said.
    "numpy.ndarray": _Named(_not_called),
    "numpy.core.multiarray._reconstruct": _Named(_empty_array),
    "numpy._core.multiarray._reconstruct": _Named(_empty_array),
    "torch.Size": _Named(_size),
    "torch.device": _Named(lambda *words: torch.device(*words)),
    "torch._utils._rebuild_tensor": _Named(_tensor),
    "torch._utils._rebuild_tensor_v2": _Named(_tensor),
    "torch._utils._rebuild_tensor_v3": _Named(_tensor),
    "torch._utils._rebuild_parameter": _Named(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Named(_parameter),
    "torch.nn.parameter.Parameter": _Named(_parameter),
    "torch.storage.UntypedStorage": torch.uint8,
}


# -- How much it is -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Extent:
    """What it takes to copy a value: containers and values, bytes of tensors, and how deep."""

    values: int = 1
    n_bytes: int = 0
    depth: int = 0


def _check_extent(value: Any, size: int) -> None:
    """Refuse what is far larger than its file, because it repeats one part or expands it."""
    extent = _extent(value, {})
    if extent.values > MAX_REPEATS * size or extent.n_bytes > MAX_REPEATS * size + _CHUNK:
        raise _DamagedError("what it describes is far larger than the file: it repeats itself")


def _extent(value: Any, known: dict[int, _Extent | None], depth: int = 0) -> _Extent:
    if isinstance(value, torch.Tensor):
        return _Extent(1, value.numel() * value.element_size(), 0)
    if isinstance(value, np.ndarray):
        return _Extent(1, value.nbytes, 0)
    parts = _parts(value)
    if not parts:
        return _Extent()
    if depth > MAX_DEPTH:
        raise _DamagedError("it is nested too deep")
    if id(value) not in known:
        known[id(value)] = None
        each = [_extent(part, known, depth + 1) for part in parts]
        known[id(value)] = _Extent(
            1 + sum(part.values for part in each),
            sum(part.n_bytes for part in each),
            1 + max(part.depth for part in each),
        )
    extent = known[id(value)]
    if extent is None:
        raise _DamagedError("a value contains itself")
    if depth + extent.depth > MAX_DEPTH:
        raise _DamagedError("it is nested too deep")
    return extent


def _parts(value: Any) -> list[Any]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set)) else []
