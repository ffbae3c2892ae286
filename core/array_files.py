"""Archives of numpy arrays (`.npz`), read without believing what their headers claim."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.reading import open_regular, prefix_of

MAX_HEADER_BYTES = 4096
_KINDS = "biuf"


def read_arrays(
    path: str | Path, names: Sequence[str], flag: str = ""
) -> dict[str, np.ndarray] | None:
    """Read arrays of an archive of `numpy.savez`.

    `numpy.load` allocates what a header claims before it reads, and inflates what is deflated.

    Args:
        path: The archive.
        names: Of the arrays.
        flag: The flag it was given with, for messages.

    Returns:
        The arrays by name; None if the archive lacks one of them.

    Raises:
        InputError: It cannot be read, is compressed or damaged, or an array is not as large as
            it claims, or not of plain numbers.
    """
    with open_regular(path, flag, "numpy archive") as file:
        try:
            archive = zipfile.ZipFile(file)
            members = {member.filename: member for member in archive.infolist()}
            wanted = [f"{name}.npy" for name in names]
            if any(name not in members for name in wanted):
                return None
            return {name: _array(archive, members[f"{name}.npy"]) for name in names}
        except InputError as error:
            raise InputError(f"{prefix_of(flag)}{path}: {error}") from None
        except (
            ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError,
            RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zipfile.BadZipFile,
            zlib.error,
        ) as error:  # fmt: skip
            raise InputError(
                f"{prefix_of(flag)}{path} is no whole archive of numpy arrays ({error!s:.200})"
            ) from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{member.filename} is compressed")
    # The checksum of a member is compared where its end is reached.
    content = archive.read(member)
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(stream, max_header_size=MAX_HEADER_BYTES)
        start = stream.tell()
    if dtype.kind not in _KINDS:
        raise InputError(f"{member.filename} holds {dtype}, not plain numbers")
    if math.prod(shape) * dtype.itemsize != len(content) - start:
        raise InputError(f"{member.filename} has another size than it claims")
    flat = np.frombuffer(content, dtype, offset=start)
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()
