"""When freed memory is kept in the process, and when it is returned."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 16 << 20


def keep_freed_memory() -> bool:
    """Tell the C library to reuse freed blocks, however large.

    By default glibc gives large blocks back to the kernel, and an iteration that
    allocates the same gradients and activations again waits while the kernel clears every
    page of them. For a command to call, once and early: it concerns the whole process.

    Returns:
        Whether the C library understood; False on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.debug("no mallopt in this C library")
        return False
    # Blocks from the heap only, which shrinks no more, and grows in steps of some size.
    settings = [(_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD)]
    return all(mallopt(name, value) == 1 for name, value in settings)


def return_freed_memory() -> None:
    """Give the kernel what is free now.

    A heap cut up for other sizes than those to come would grow by as much as it has holes.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
