"""Mistakes of the user, told in one sentence."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Collection

from core.escaping import printable

WRITE_FAILURES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the flag or the file."""


class RankError(RuntimeError):
    """One of the processes of a run failed, was ended, or does not answer.

    Args:
        sentence: Which one, and what happened.
        told: The process's own traceback, where the fault is in the code.
    """

    def __init__(self, sentence: str, told: str = "") -> None:
        super().__init__(sentence)
        self.told = told


def nearest(name: str, known: Collection[str]) -> str:
    """The name that is most like another one, for a message; "none" where there is none."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.0)), "none")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def exit_status(command: Callable[[], None]) -> int:
    """Run a command and turn its outcome into a process exit status.

    Args:
        command: The command, without arguments.

    Returns:
        0 on success, 1 when one of several processes was lost, 2 on bad input or a
        full disk (one sentence on standard error), 130 when interrupted from the
        keyboard, 141 when whoever read the output has left (`| head`).
    """
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except RankError as error:
        print(printable(f"{error.told}error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Or Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if not is_write_failure(error):
            raise
        print(f"error: {printable(write_failure(error))}", file=sys.stderr)
        return 2
    return 0


def is_write_failure(error: OSError) -> bool:
    """Whether the disk is full, does not let this user write, or has something in the way."""
    return error.errno in WRITE_FAILURES


def write_failure(error: OSError) -> str:
    """Such a failure in one sentence."""
    return f"cannot write {error.filename or 'output'}: {error.strerror}"
