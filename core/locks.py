"""Folders that one run at a time may write to, and what runs that were killed left behind.

A lock is a file with the owner's process and machine. The kernel gives none back when a process
is killed, so whoever finds one looks whether its owner still lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError

LOCK_NAME = ".lock"
_LARGEST = 4096


@dataclass(frozen=True)
class Owner:
    """A process that can be found again.

    Attributes:
        pid: Its number.
        host: Its machine.
        born: When it started, in the kernel's clock; tells it from a later one of the same
            number. Empty where the system does not say.
        since: When it took what it owns, for people.
    """

    pid: int
    host: str
    born: str = ""
    since: str = ""

    @staticmethod
    def this() -> Owner:
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return Owner(os.getpid(), socket.gethostname(), _born(os.getpid()), now)

    def is_gone(self) -> bool:
        """Whether it has surely ended; of another machine nothing is known."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return _born(self.pid) != self.born

    def named(self) -> str:
        """For a sentence."""
        since = f" since {self.since}" if self.since else ""
        return f"process {self.pid} on {self.host}{since}"


def _born(pid: int) -> str:
    """When a process started; empty where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name before may hold spaces and brackets.
    state, *fields = text.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]


def owner_of(path: Path) -> Owner | None:
    """The process that a lock file names; None where it names none."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_LARGEST))
        found = Owner(**value)
    except (OSError, ValueError, TypeError):
        return None
    texts = isinstance(found.host, str) and isinstance(found.born, str)
    return found if texts and type(found.pid) is int and found.pid > 0 else None


def check_unlocked(path: Path, flag: str) -> None:
    """Refuse a place that another run writes to, before this one has started.

    Args:
        path: The lock file.
        flag: The flag that led here, with its value, for the sentence.

    Raises:
        InputError: Names the owner.
    """
    owner = owner_of(path)
    if owner is not None and owner != Owner.this() and not owner.is_gone():
        raise _in_use(path, flag, owner)


def _in_use(path: Path, flag: str, owner: Owner) -> InputError:
    hint = ""
    if owner.host != socket.gethostname():
        hint = f"; if that has ended, remove {path}"
    return InputError(f"{flag} is in use by {owner.named()}: wait for it, or choose another{hint}")


@contextlib.contextmanager
def locked(path: Path, flag: str, wait: float = 0.0) -> Iterator[None]:
    """Within the block, no other run writes here.

    A lock whose owner was killed on this machine is taken over.

    Args:
        path: The lock file; missing parent folders are made.
        flag: The flag that led here, with its value, for the sentence.
        wait: Seconds to wait for another run to end.

    Raises:
        InputError: Another run writes here; the sentence names it.
    """
    mine = Owner.this()
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    while (owner := _taken(path, mine)) is not None:
        if time.monotonic() >= until:
            raise _in_use(path, flag, owner)
        time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _alone_with(path):
            if owner_of(path) == mine:
                path.unlink()


def _taken(path: Path, mine: Owner) -> Owner | None:
    """Take a lock; returns the owner where it has a living one."""
    with _alone_with(path) as file:
        owner = owner_of(path)
        if owner is not None and not owner.is_gone():
            return owner
        try:
            _rewrite(file, mine)
        except OSError:
            # On a full disk nothing is left that would keep the next run out.
            path.unlink()
            raise
    return None


def _rewrite(file: int, owner: Owner) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(dataclasses.asdict(owner)).encode(), 0)
    os.fsync(file)


@contextlib.contextmanager
def _alone_with(path: Path) -> Iterator[int]:
    """Open a lock file for the moment in which it is read and changed."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Where the file system has none, two runs would have to start at one instant.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                yield file
                return
            # Its owner has removed it meanwhile.
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(file)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)


# -- Temporary files ----------------------------------------------------------------

# What says in a name who made it: machine, process, birth, and random letters after them.
_MADE_BY = re.compile(r"([0-9a-f]{8})-(\d+)-(\d+)-\w+")


def temporary_prefix(name: str) -> str:
    """What the name of a temporary file or folder of this process begins with.

    Args:
        name: What it is, without its owner.
    """
    pid = os.getpid()
    return f"{name}{_machine()}-{pid}-{_born(pid) or 0}-"


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove_left_behind(folder: Path) -> list[Path]:
    """Remove the temporary files of processes of this machine that have ended.

    Args:
        folder: Where they lie.

    Returns:
        What was removed.
    """
    found = []
    for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
        if _is_left_behind(path.name) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
                found.append(path)
    return found


def remove_folders_left_behind(folder: Path, name: str) -> list[Path]:
    """Remove the temporary folders of processes of this machine that have ended.

    Args:
        folder: Where they lie.
        name: What they begin with, as given to `temporary_prefix`.

    Returns:
        What was removed.
    """
    found = [path for path in sorted(folder.glob(f"{name}*")) if _is_left_behind(path.name)]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _is_left_behind(name: str) -> bool:
    made_by = _MADE_BY.fullmatch(name.rpartition(".")[2])
    if made_by is None or made_by[1] != _machine():
        return False
    born = "" if made_by[3] == "0" else made_by[3]
    return Owner(int(made_by[2]), socket.gethostname(), born).is_gone()
