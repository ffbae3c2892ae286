"""What runs on a Ray worker: one cell, in a folder of its own.

Only the standard library: this file travels to the worker by value, where the
checkout does not exist until it has unpacked it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Stands for the cell's folder in command lines, whatever it is called on the worker.
HERE = "@CELL@"
SPEAK_SECONDS = 1.0
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
        opened.extractall(folder, filter="data")


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
    inputs: Mapping[str, bytes],
    earlier: bytes,
    environment: Mapping[str, str],
    data_names: Sequence[str] = (),
    *data: bytes,
) -> tuple[int, bytes, bytes]:
    """Run a cell's command.

    Args:
        key: Key of the cell.
        mailbox: Receives the log and the saved files while the cell runs.
        code: The checkout, packed.
        command: Its words without the interpreter; `HERE` stands for the cell's folder.
        inputs: Files of other cells, by name below the cell's folder.
        earlier: What an interrupted attempt had left, packed.
        environment: Variables to add.
        data_names: Where the data sets are expected below the cell's folder.
        *data: The data sets, packed (Ray fetches only what stands alone as an argument).

    Returns:
        Exit status, what was said, and the files left behind, packed.
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
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _report_until_done(process, key, mailbox, log, folder / "files")
        finally:
            process.kill()
        return process.returncode, log.read_bytes(), pack(folder / "files")


def _report_until_done(
    process: subprocess.Popen[bytes], key: str, mailbox: Any, log: Path, files: Path
) -> None:
    """Send what the command says as it says it, and now and then what it has saved."""
    sent, saved, last_save = 0, _newest(files), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SPEAK_SECONDS)
            return
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
