"""Small federations in NVFlare's simulator, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.experiment import run_results, simulator
from federated.experiment.cli import create_job_config

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240


@dataclass
class Finished:
    """A run that has ended.

    Attributes:
        workspace: Its folder.
        status: Of the command.
        output: What it printed.
    """

    workspace: Path
    status: int
    output: str

    def record(self, site: str, round_number: int) -> dict[str, Any]:
        """A site's leakage result."""
        path = run_results.app_folder(self.workspace, site) / f"leakage_round{round_number}.json"
        return json.loads(path.read_text())

    def global_model(self) -> dict[str, Any]:
        """The final global model's variables."""
        from core.storage import load_checkpoint

        path = run_results.app_folder(self.workspace, "server") / run_results.FINAL_MODEL
        return load_checkpoint(path)["model"]


def make_job(folder: Path, *flags: str) -> Path:
    """A job on 32 px phantoms; few images, few iterations."""
    arguments = ["--scale", "0.02", "--num_rounds", "2", "--iterations", "5", *flags]
    assert create_job_config.main([*arguments, "--output", str(folder)]) == 0
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run(job: Path, folder: Path, n_clients: int) -> Finished:
    """Run a job as `start_fl_sim.sh` does."""
    with started(job, folder, n_clients) as (process, log):
        process.wait(LIMIT)
    return Finished(folder / f"{n_clients}clients_exp", process.returncode, log.read_text())


@contextmanager
def started(
    job: Path, folder: Path, n_clients: int
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A running federation; whatever is left of it is ended with the block."""
    log = folder.with_suffix(".log")
    command = [str(ROOT / "start_fl_sim.sh"), str(n_clients), str(job), "exp"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--workspaces", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable},
            cwd=ROOT,
        )
        try:
            yield process, log
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all below it."""
    for pid in [*simulator.descendants(process.pid), process.pid]:
        if process.poll() is None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: It did not come about in time.
    """
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.2)
