"""A command forked from the server is what it is in a new interpreter."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from benchmarks.run.cells import ROOT
from benchmarks.run.executor import WarmCommand
from core.locks import remove_folders_left_behind
from core.processes import warm
from tests.launched import wait_for

pytestmark = pytest.mark.skipif(not warm.can_be_warm(gpu=False), reason="forks")

SCRIPT = """
import json, multiprocessing, os, random, signal, sys, threading
import numpy, torch
with open(sys.argv[1], "w") as file:
    json.dump({
        "arguments": sys.argv[2:],
        "name": __name__,
        "path": sys.path[0],
        "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in ("_", "PYTHONPATH")},
        "leads its group": os.getpgrp() == os.getpid(),
        "threads": torch.get_num_threads(),
        "python threads": threading.active_count(),
        "drawn": [*torch.rand(2).tolist(), numpy.random.rand(), random.random()],
        "product": torch.ones(64, 64).matmul(torch.eye(64)).sum().item(),
        "start method": multiprocessing.get_start_method(),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cores": sorted(os.sched_getaffinity(0)),
    }, file)
print("said")
sys.exit(3)
"""


def warm_command(words: list[str], folder: Path, log: Path) -> int | None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OF_THE_CELL": "1"}
    core = min(os.sched_getaffinity(0))
    with log.open("wb") as output:
        process = warm.start_command(
            words, folder=folder, environment=environment, output=output.fileno(), cores=[core],
            imports=["torch", "numpy"],
        )  # fmt: skip
    process.join(60)
    return process.exitcode


def as_from_a_terminal(core: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.sched_setaffinity(0, [core])


def fresh_command(words: list[str], folder: Path, log: Path) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OF_THE_CELL": "1"}
    core = min(os.sched_getaffinity(0))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=lambda: as_from_a_terminal(core),
        )  # fmt: skip
    return process.wait(60)


def test_a_warm_command_is_as_a_new_interpreter(tmp_path: Path) -> None:
    # What this process does must not show in the other.
    torch.manual_seed(7)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = {}
    for name, run in (("fresh", fresh_command), ("warm", warm_command)):
        words = [str(script), str(tmp_path / name), "--flag", "a b"]
        assert run(words, tmp_path, tmp_path / "log") == 3
        assert (tmp_path / "log").read_text() == "said\n"
        found[name] = json.loads((tmp_path / name).read_text())
    # Not seeded: no two processes draw the same numbers.
    assert found["warm"].pop("drawn") != found["fresh"].pop("drawn")
    assert found["warm"] == found["fresh"]
    assert found["warm"]["threads"] == 2


def test_no_two_warm_processes_draw_the_same(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for name in "ab":
        warm_command([str(script), str(tmp_path / name)], tmp_path, tmp_path / "log")
    a, b = (json.loads((tmp_path / name).read_text())["drawn"] for name in "ab")
    assert not set(a) & set(b)


def test_a_module_runs_as_well(tmp_path: Path) -> None:
    assert warm_command(["-m", "json.tool", "--help"], ROOT, tmp_path / "log") == 0
    assert "usage:" in (tmp_path / "log").read_text()


def test_a_traceback_is_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise ValueError('seen')\n")
    assert warm_command([str(tmp_path / "bad.py")], tmp_path, tmp_path / "log") == 1
    assert (tmp_path / "log").read_text().endswith("ValueError: seen\n")


def test_a_lock_stays_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(60)\n")
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with (tmp_path / "log").open("wb") as output:
        process = warm.start_command(
            [str(tmp_path / "wait.py")], folder=tmp_path, environment=dict(os.environ),
            output=output.fileno(), kept=[lock],
        )  # fmt: skip
    other = os.open(tmp_path / "lock", os.O_RDWR)
    time.sleep(0.2)
    os.close(lock)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.join(30)
    assert process.exitcode == -9
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_command_does_not_outlive_its_killed_server_unseen(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(60)\n")
    with (tmp_path / "log").open("wb") as output:
        command = WarmCommand(
            warm.start_command(
                [str(tmp_path / "wait.py")], folder=tmp_path, environment=dict(os.environ),
                output=output.fileno(),
            )
        )  # fmt: skip
    time.sleep(0.5)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    command.wait(30)
    assert command.status() == 255
    until = time.monotonic() + 30
    while is_running(command.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(command.pid)
    (tmp_path / "next.py").write_text("print('said')\n")
    assert warm_command([str(tmp_path / "next.py")], tmp_path, tmp_path / "log") == 0


def is_running(pid: int) -> bool:
    """Nobody reaps a process whose parent was killed, in a container without an init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


STARTER = """
import os, signal, sys, time
from pathlib import Path
from core.processes import warm

def rank(folder):
    print("said by", len(os.sched_getaffinity(0)), os.environ["OF_THE_CELL"], flush=True)
    said = f"{os.getppid()} {os.getpgrp()} {'torch' in sys.modules}"
    Path(folder, "draft").write_text(said)
    Path(folder, "draft").rename(Path(folder, "rank"))

if __name__ == "__main__":
    if "kill" in sys.argv:
        os.kill(os.getppid(), signal.SIGKILL)
        while os.getppid() == int(sys.argv[3]):
            time.sleep(0.01)
    process = warm.start(rank, os.getcwd(), imports=["json"])
    process.join(60)
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("how", ["keep", "kill"])
def test_what_a_warm_command_starts_comes_from_the_same_server(how: str, tmp_path: Path) -> None:
    """What torch takes to import is not waited for twice; without that server it still starts."""
    (tmp_path / "starter.py").write_text(STARTER)
    assert warm_command(["-m", "json.tool", "--help"], ROOT, tmp_path / "log") == 0
    server = forkserver._forkserver._forkserver_pid
    words = [str(tmp_path / "starter.py"), how, "if", str(server)]
    status = warm_command(words, tmp_path, tmp_path / "log")
    # Who is asked for the command's end may have been killed; it goes on all the same.
    assert wait_for((tmp_path / "rank").exists, 60)
    log = (tmp_path / "log").read_text()
    mother, group, has_torch = (tmp_path / "rank").read_text().split()
    # Its core, its environment and its output are the command's, not the server's.
    assert log == "said by 1 1\n"
    if how == "keep":
        assert (status, int(mother), has_torch) == (0, server, "True")
        assert int(group) != os.getpgrp()
    else:
        assert (status, has_torch) == (255, "False")
        assert int(mother) != server


KILLED = """
import os, signal, sys
from pathlib import Path
from core.processes import warm
if __name__ == "__main__":
    process = warm.start(print, imports=["json"])
    print(*Path(sys.argv[1]).glob(f"gradinvbench-server.*-{os.getpid()}-*"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_run_goes_with_the_next(tmp_path: Path) -> None:
    place = Path(tempfile.gettempdir())
    if len(str(place)) > warm._LONGEST_PLACE:
        pytest.skip("the folder for temporary files has too long a name for a socket in it")
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), str(place)], stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.split()[0])
    assert list(left.rglob("listener-*"))
    assert left in remove_folders_left_behind(place, warm._FOLDER)
    assert not left.exists()
