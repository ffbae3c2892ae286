"""The app that the documents change in ten lines, in Flower's simulation and in a deployment."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs pip install 'gradinvbench[flower]'")

import torch

from audit import gate_log
from audit.show.store import read_audit
from tests.documents import ROOT

# Six processes each, of which most import torch: they take turns, and waiting counts.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

APP = Path(__file__).parent / "flower_app"
PAGE = (ROOT / "docs" / "flower.md").read_text()
LIMIT = 280.0
# Audits of a few seconds, whose numbers do not depend on how fast the machine is.
QUICK = (
    "from audit.request import AuditSettings\n"
    "QUICK = AuditSettings(iterations=20, plants=1, membership=False, remedies=False)\n"
)


def changed_lines() -> list[str]:
    """The lines of the page's change, with their signs."""
    block = PAGE.split("```diff\n", 1)[1].split("```", 1)[0]
    return block.splitlines()


def changed(text: str) -> str:
    """An app's client with the page's change."""
    before = "\n".join(line[1:] for line in changed_lines() if line[:1] != "+")
    after = "\n".join(line[1:] for line in changed_lines() if line[:1] != "-")
    assert text.count(before) == 1
    return text.replace(before, after)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The stranger's app after the change, with quick audits."""
    folder = tmp_path / "app"
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__"))
    client = folder / "pytorchexample" / "client_app.py"
    text = changed(client.read_text()).replace("AuditMod(", "AuditMod(settings=QUICK, ")
    client.write_text(text.replace("from core.data", QUICK + "from core.data"))
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{folder / 'app'}{os.pathsep}{ROOT}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def started(folder: Path, name: str, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all that it starts; ended with the block."""
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], folder: Path) -> None:
    limit = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > limit:
            raise AssertionError("\n".join(p.read_text() for p in folder.glob("*.log")))
        time.sleep(0.2)


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def only_run(folder: Path, partition: int) -> Path:
    (found,) = (folder / f"partition-{partition}").glob("run-*")
    return found


def check_both_sites(folder: Path, *others: str) -> None:
    """The first site's update leaks and stays, the second's leaves; then come other answers."""
    runs = [only_run(folder, partition) for partition in (0, 1)]
    verdicts = [[entry["verdict"] for entry in gate_log.verify(run)] for run in runs]
    assert verdicts == [["withheld", *others], ["passed", *others]]
    # Both looked at the global model, and neither audit did again.
    assert [(run / "received_round1.json").exists() for run in runs] == [True, True]
    assert all(gate_log.verify(run)[0]["received"] for run in runs)
    records = [read_audit(run / "audit_round1.json") for run in runs]
    assert [record.verdict for record in records] == ["leaks", "no leak found"]


def test_a_stranger_changes_at_most_ten_lines() -> None:
    assert sum(line[:1] == "+" for line in changed_lines()) <= 10
    compile(changed((APP / "pytorchexample" / "client_app.py").read_text()), "client", "exec")


SIMULATION = """
from flwr.simulation import run_simulation
from pytorchexample import client_app, server_app
if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app.app, client_app.app, num_supernodes=2, backend_config=resources)
"""


def test_in_a_simulation(app: Path) -> None:
    folder = app.parent
    with started(folder, "simulation", [sys.executable, "-c", SIMULATION]) as process:
        wait_for(lambda: process.poll() is not None, folder)
    assert "Received 1 results and 1 failures" in (folder / "simulation.log").read_text()
    check_both_sites(folder / "audit", "no update")


def page_commands(program: str) -> list[list[str]]:
    return [shlex.split(line) for line in PAGE.splitlines() if line.startswith(f"    {program} ")]


def test_with_a_superlink_and_two_supernodes(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says, at other ports; the average is that of the site whose update left."""
    folder = app.parent
    server, *nodes = free_ports(3)
    at = f"127.0.0.1:{server}"
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "deployment"\n'
        f'[superlink.deployment]\naddress = "{at}"\ninsecure = true\n'
    )
    with contextlib.ExitStack() as running:
        (link,) = page_commands("flower-superlink")
        running.enter_context(started(folder, "superlink", [*link, "--port", str(server)]))
        wait_for(lambda: answers(server), folder)
        for command, port in zip(page_commands("flower-supernode"), nodes, strict=True):
            own = [word.replace("127.0.0.1:8000", at) for word in command]
            own[own.index("--port") + 1] = str(port)
            own[own.index("--node-config") + 1] += f' audit-folder="{folder / "sites"}"'
            running.enter_context(started(folder, f"supernode-{port}", own))
        final = folder / "final.pt"
        *run, _ = page_commands("flwr run")[-1]
        words = [*run, "--run-config", f'final-model="{final}" fraction-evaluate=0.0']
        words[words.index(".")] = str(app)
        with started(folder, "run", words) as process:
            wait_for(lambda: process.poll() is not None, folder)
        wait_for(final.exists, folder)
    check_both_sites(folder / "sites")
    monkeypatch.syspath_prepend(str(APP))
    for name, value in second_site_alone().items():
        torch.testing.assert_close(torch.load(final)[name], value)


def second_site_alone() -> dict[str, torch.Tensor]:
    """The model after a round of the site whose update leaves."""
    from pytorchexample import task

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = task.Net()
    task.train(net, task.load_data(1, 2, 32)[0], 1, 0.1)
    return net.state_dict()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
    return False
