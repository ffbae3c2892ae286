"""What runs on a Ray worker: one cell, in a folder of its own.

Only the standard library: this file travels to the worker by value, where the
checkout does not exist until it has unpacked it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Stands for the cell's folder in command lines, whatever it is called on the worker.
HERE = "@CELL@"
SPEAK_SECONDS = 1.0
GRACE_SECONDS = 10.0
SAVE_SECONDS = 20.0


class Mailbox:
    """What running cells say and leave behind, until the harness collects it.

    A Ray actor, so that a harness killed in the middle has what its cells had saved.
    """

    def __init__(self) -> None:
        self._said: dict[str, bytes] = {}
        self._files: dict[str, bytes] = {}

    def post(self, key: str, said: bytes, files: bytes | None) -> None:
        """Add to what cell `key` said; `files` (packed) replace earlier ones."""
        self._said[key] = self._said.get(key, b"") + said
        if files is not None:
            self._files[key] = files

    def collect(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """What was said and left since the last call, by cell."""
        said, files = self._said, self._files
        self._said, self._files = {}, {}
        return said, files


def pack(root: Path, names: Sequence[str] = (".",)) -> bytes:
    """Files and folders below `root` as an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in names:
            archive.add(root / name, arcname=name, filter=_without_caches)
    return buffer.getvalue()


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    # Hidden files are locks, and half-written files of a command that is still writing.
    hidden = Path(member.name).name.startswith(".")
    return None if hidden or "__pycache__" in member.name else member


def unpack(archive: bytes, folder: Path) -> None:
    """The inverse of `pack`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        # Filters came with Python 3.10.12 and 3.11.4.
        if hasattr(tarfile, "data_filter"):
            opened.extractall(folder, filter="data")
            return
        for member in opened.getmembers():
            inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise tarfile.TarError(f"{member.name}: neither a file nor a folder in here")
        opened.extractall(folder)


def unpacked_once(archive: bytes, what: str) -> Path:
    """Unpack an archive where every cell on this machine finds it again."""
    name = f"gradinvbench-{what}-{os.getuid()}-{hashlib.sha256(archive).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir()) / name
    if not folder.exists():
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}.{os.getpid()}-"))
        unpack(archive, fresh)
        with contextlib.suppress(OSError):
            fresh.rename(folder)
        # Another cell was faster.
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def run_cell(
    key: str,
    mailbox: Any,
    code: bytes,
    command: Sequence[str],
    imports: Sequence[str] | None,
    limit: float | None,
    inputs: Mapping[str, bytes],
    earlier: bytes,
    environment: Mapping[str, str],
    data_names: Sequence[str] = (),
    *data: bytes,
) -> tuple[int | None, bytes, bytes]:
    """Run a cell's command.

    Args:
        key: Key of the cell.
        mailbox: Receives the log and the saved files while the cell runs.
        code: The checkout, packed.
        command: Its words without the interpreter; `HERE` stands for the cell's folder.
        imports: What this worker imports once, to fork the command from there; None: the
            command is a new interpreter.
        limit: Seconds that it may take; None: no limit.
        inputs: Files of other cells, by name below the cell's folder.
        earlier: What an interrupted attempt had left, packed.
        environment: Variables to add.
        data_names: Where the data sets are expected below the cell's folder.
        *data: The data sets, packed (Ray fetches only what stands alone as an argument).

    Returns:
        Exit status (None: it was ended at its limit), what was said, and the files left
        behind, packed.
    """
    remove_left_behind(Path(tempfile.gettempdir()))
    root = unpacked_once(code, "code")
    with _temporary_folder() as folder:
        unpack(earlier, folder / "files")
        for name, content in inputs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, archive in zip(data_names, data, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(unpacked_once(archive, "data"), target_is_directory=True)
        words = [word.replace(HERE, str(folder)) for word in command]
        log = folder / "log"
        variables = {**os.environ, "PYTHONPATH": str(root), **environment}
        with log.open("wb") as output:
            begin = _begin_fresh if imports is None else functools.partial(_begin_warm, imports)
            running = begin(words, root, variables, output.fileno())
        try:
            in_time = _report_until_done(running, limit, key, mailbox, log, folder / "files")
        finally:
            running.end()
        status = running.status() if in_time else None
        return status, log.read_bytes(), pack(folder / "files")


@dataclasses.dataclass(frozen=True)
class _Running:
    """A command that runs, however it was begun."""

    pid: int
    wait: Callable[[float | None], None]
    status: Callable[[], int | None]

    def end(self) -> None:
        """Interrupt it and what it started, and kill what does not listen."""
        if self.status() is None:
            self._tell(signal.SIGINT)
            self.wait(GRACE_SECONDS)
        self._tell(signal.SIGKILL)
        self.wait(None)

    def _tell(self, number: int) -> None:
        # One that has just begun leads no group yet.
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.pid, number)
                return


def _begin_fresh(
    words: Sequence[str], root: Path, environment: Mapping[str, str], output: int
) -> _Running:
    """A new interpreter."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def wait(seconds: float | None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    return _Running(process.pid, wait, process.poll)


def _begin_warm(
    imports: Sequence[str],
    words: Sequence[str],
    root: Path,
    environment: Mapping[str, str],
    output: int,
) -> _Running:
    """Forked from this worker's server, which has imported what cells need."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from core.processes import warm

    if not warm.can_be_warm(gpu=False):
        return _begin_fresh(words, root, environment, output)
    with _no_main_file():
        process = warm.start_command(
            words, folder=root, environment=environment, output=output, imports=imports
        )
    assert process.pid is not None
    return _Running(process.pid, process.join, lambda: process.exitcode)


@contextlib.contextmanager
def _no_main_file() -> Iterator[None]:
    """Within the block, a process that is started does not run this worker's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _report_until_done(
    running: _Running, limit: float | None, key: str, mailbox: Any, log: Path, files: Path
) -> bool:
    """Send what the command says as it says it, and now and then what it has saved.

    Returns:
        Whether it came to its end within its limit.
    """
    sent, saved, last_save = 0, _newest(files), time.monotonic()
    until = math.inf if limit is None else time.monotonic() + limit
    while True:
        running.wait(min(SPEAK_SECONDS, max(0.0, until - time.monotonic())))
        if running.status() is not None:
            return True
        if time.monotonic() >= until:
            return False
        with log.open("rb") as output:
            output.seek(sent)
            said = output.read()
        sent += len(said)
        packed, newest = None, _newest(files)
        if newest > saved and time.monotonic() - last_save > SAVE_SECONDS:
            # A file may be renamed while it is packed; the next time will do.
            with contextlib.suppress(OSError):
                packed, saved, last_save = pack(files), newest, time.monotonic()
        if said or packed:
            mailbox.post.remote(key, said, packed)


def _newest(folder: Path) -> float:
    """When anything below `folder` was changed last."""
    times = [0.0]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"gradinvbench-cell-{os.getpid()}-") as name:
        yield Path(name)


# A cell's folder, and an archive that is being unpacked, with the process that made it.
_MADE_BY = re.compile(r"gradinvbench-(?:cell-|(?:code|data)-\d+-[0-9a-f]+\.)(\d+)-\w+")


def remove_left_behind(folder: Path) -> list[Path]:
    """Remove the temporary folders of workers that were killed on this machine.

    Args:
        folder: Where temporary folders lie.

    Returns:
        What was removed.
    """
    found = []
    for path in sorted(folder.glob("gradinvbench-*")):
        made_by = _MADE_BY.fullmatch(path.name)
        if made_by is not None and path.is_dir() and not _lives(int(made_by[1])):
            shutil.rmtree(path, ignore_errors=True)
            found.append(path)
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
