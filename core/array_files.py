"""Files of arrays (`.npz`, `.npy`, IDX), read without believing what their headers claim."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.reading import open_regular, prefix_of, read_bytes

MAX_HEADER_BYTES = 4096
# How much larger than the archive its arrays may be, where they are compressed.
MAX_RATIO = 32
# Of one array: a volume of 512 x 512 x 512 numbers of 8 bytes.
MAX_ARRAY_BYTES = 2**30
_IDX_AXES = 4
# Numbers and text; objects would be pickled.
_KINDS = "biufcUS"
# What a broken or hostile header leads numpy's reader to; it looks at old ones token by token.
_BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def read_arrays(path: str | Path, flag: str = "") -> dict[str, np.ndarray]:
    """Read the arrays of an archive of `numpy.savez`.

    `numpy.load` allocates what a header claims before it reads, and inflates without end.

    Args:
        path: The archive.
        flag: The flag it was given with, for messages.

    Returns:
        The arrays by name.

    Raises:
        InputError: It cannot be read, is damaged, inflates to more than 32 times its size, or
            an array is not as large as it claims, or neither of numbers nor text.
    """
    with open_regular(path, flag, "numpy archive") as file:
        try:
            size = file.seek(0, io.SEEK_END)
            archive = zipfile.ZipFile(file)
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_RATIO * size:
                raise InputError(f"it claims to inflate to more than {MAX_RATIO} times its size")
            return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}
        except InputError as error:
            raise InputError(f"{prefix_of(flag)}{path}: {error}") from None
        except _BROKEN as error:
            raise InputError(
                f"{prefix_of(flag)}{path} is no whole archive of numpy arrays ({error!s:.200})"
            ) from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{member.filename} is compressed as numpy does not compress")
    # The checksum of a member is compared where its end is reached.
    return _array_in(archive.read(member), member.filename)


def read_array(path: str | Path, flag: str = "") -> np.ndarray:
    """Read a file of `numpy.save`, within the same bounds.

    Args:
        path: The file.
        flag: The flag it was given with, for messages.

    Raises:
        InputError: It cannot be read, or is not as large as it claims, or neither of numbers
            nor text.
    """
    content = read_bytes(path, flag, "numpy array", MAX_ARRAY_BYTES)
    try:
        return _array_in(content, "it")
    except InputError as error:
        raise InputError(f"{prefix_of(flag)}{path}: {error}") from None
    except _BROKEN as error:
        raise InputError(
            f"{prefix_of(flag)}{path} is no whole numpy array ({error!s:.200})"
        ) from None


def read_idx(path: str | Path, flag: str = "") -> np.ndarray:
    """Read a file of bytes in the IDX format, as MNIST and its relatives have it.

    Args:
        path: The file.
        flag: The flag it was given with, for messages.

    Raises:
        InputError: It cannot be read, holds other numbers than bytes, or another number of them
            than it claims.

    Source: http://yann.lecun.com/exdb/mnist/.
    """
    content = read_bytes(path, flag, "file of images or labels", MAX_ARRAY_BYTES)
    kind, dims = content[2:3], content[3:4]
    n_axes = dims[0] if dims else 0
    start = 4 + 4 * n_axes
    magic = content[:2] == b"\0\0" and kind == b"\x08" and 1 <= n_axes <= _IDX_AXES
    if not magic or len(content) < start:
        raise InputError(f"{prefix_of(flag)}{path} is no file of bytes in the IDX format")
    shape = struct.unpack_from(f">{n_axes}I", content, 4)
    if math.prod(shape) != len(content) - start:
        raise InputError(f"{prefix_of(flag)}{path} has another size than it claims")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _array_in(content: bytes, name: str) -> np.ndarray:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read_header(stream, max_header_size=MAX_HEADER_BYTES)
    if dtype.kind not in _KINDS:
        raise InputError(f"{name} holds {dtype}, neither numbers nor text")
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise InputError(f"{name} has another size than it claims")
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()
