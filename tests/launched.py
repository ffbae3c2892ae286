"""How tests start several processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from core.launch_arguments import LaunchSettings


def on_cpu(processes: int) -> LaunchSettings:
    """So many processes on the CPU, connected by gloo at a free port."""
    return LaunchSettings(
        cpu=True,
        dist_url="tcp://127.0.0.1:0",
        dist_backend="gloo",
        multiprocessing_distributed=True,
        nproc_per_node=processes,
    )


def ranks_of(parent: int) -> list[int]:
    """A command's spawned processes in the order of ranks, without Python's resource tracker."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    found = [int(word) for word in text.split()]
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


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
