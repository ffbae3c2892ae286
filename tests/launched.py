"""How tests start several processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from core.launch_arguments import LaunchSettings
from core.processes import warm

ROOT = Path(__file__).resolve().parents[1]
# What a server imports for the commands and ranks of all tests of a process.
IMPORTS = ("torchvision", "training.run", "gradients.extract", "attack.cli.running")


def on_cpu(processes: int) -> LaunchSettings:
    """So many processes on the CPU, connected by gloo at a free port."""
    return LaunchSettings(
        cpu=True,
        dist_url="tcp://127.0.0.1:0",
        dist_backend="gloo",
        multiprocessing_distributed=True,
        nproc_per_node=processes,
    )


class Command:
    """A command in a process of its own that needs not import torch again; as `subprocess.Popen`.

    Args:
        words: A script, or -m and a module, and their arguments.
        folder: Where it stands.
        changes: To the environment.
    """

    def __init__(self, *words: str, folder: Path = ROOT, **changes: str) -> None:
        self._words = words
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = warm.start_command(
            words,
            folder=folder,
            environment={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes},
            output=self._said.fileno(),
            imports=IMPORTS,
        )
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, minus a signal's number; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end; its exit status, minus a signal's number."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._words, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        """Wait for its end; what it has printed."""
        self.wait(timeout)
        self._said.seek(0)
        return self._said.read().decode(), None


def ranks_of(parent: int) -> list[int]:
    """A command's ranks in their order: forked from its own server, or from the one it is from."""
    servers = [pid for pid in _children_of(parent) if "forkserver import" in _said_of(pid)]
    own = [pid for server in servers for pid in _children_of(server)]
    return own or _others_of_its_group(parent)


def _children_of(parent: int) -> list[int]:
    """The processes that a process has started, in order."""
    return [int(word) for word in _read(f"/proc/{parent}/task/{parent}/children").split()]


def _said_of(pid: int) -> str:
    """The command line of a process."""
    return _read(f"/proc/{pid}/cmdline").replace("\0", " ")


def _others_of_its_group(leader: int) -> list[int]:
    """What is in a process' group and was not started by itself, in order of birth."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Behind the name: state, parent, group, ..., time of birth.
        words = _read(f"{entry}/stat").rpartition(")")[2].split()
        if words and int(words[2]) == leader != int(words[1]) and entry.name != str(leader):
            found.append((int(words[19]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object], seconds: float = 120) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False
