"""Signals to a command and to its ranks: nothing trains on, and one sentence says what happened.

A table of commands and signals, with small models and two processes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import attack.cli.command
import gradients.command
import tests.toy_ranks
import training.main_pytorch
from attack.record import AttackRecord, read_record
from core.errors import InputError
from core.locks import LOCK_NAME, Owner
from core.models.building import ModelSpec
from core.processes.ranks import Ranks
from core.storage import write_json
from gradients.checkpoint import save_target
from tests.launched import Command, alive, ranks_of, wait_for
from tests.targets import make_target

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

TWO = ["--multiprocessing-distributed", "--nproc-per-node", "2", "--cpu", "--dist-backend", "gloo"]
FREE_PORT = ["--dist-url", "tcp://127.0.0.1:0"]
MODEL = ["--arch", "cnn", "--width", "2", "--image-size", "8"]


def toy(folder: Path) -> tuple[list[str], Callable[[], bool]]:
    words = ["-m", "tests.toy_ranks", "--folder", str(folder)]
    return words, lambda: len(list(folder.glob("rank*"))) == 2


def train(folder: Path) -> tuple[list[str], Callable[[], bool]]:
    words = ["training/main_pytorch.py", "--data", "photo-patches", *MODEL, "-j", "0", "-b", "64"]
    words += ["--epochs", "100000", "--result-root", str(folder), "--no-tensorboard", "--syncbn"]
    return words, lambda: any(folder.glob("checkpoint_epoch_*"))


def extract(folder: Path) -> tuple[list[str], Callable[[], bool]]:
    words = ["training/get_gradients.py", "--data", "photo-patches", *MODEL, "-b", "4", "--syncbn"]
    words += ["--local-epochs", "100000", "--lr", "1e-9", "--results", str(folder)]
    # It says nothing before its end; the ranks connect when they sum.
    return words, lambda: False


def invert(folder: Path) -> tuple[list[str], Callable[[], bool]]:
    target, truth = make_target(ModelSpec("cnn", 10, 8, width=2), 4, train_mode=True)
    save_target(folder / "checkpoint.tar", target, truth)
    words = ["main_run.py", "--checkpoint", str(folder / "checkpoint.tar"), "--root", str(folder)]
    words += ["--epochs", "100000000", "--state-every", "5", "--quiet"]
    return words, lambda: any((folder / "test").glob("state-*"))


COMMANDS = {"toy": toy, "train": train, "extract": extract, "attack": invert}


def computes(pid: int) -> bool:
    """Whether a process has come out of its imports: it holds shared memory of the ranks."""
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any("memfd:gradients" in link for link in links)


# Command, signal, to whom, exit status, what is said. "parent" gets it alone; "all": a terminal.
SIGNALS = [
    ("toy", signal.SIGINT, "parent", 130, "interrupted: run the same command again"),
    ("toy", signal.SIGTERM, "parent", 143, ""),
    ("toy", signal.SIGKILL, "parent", -9, ""),
    ("toy", signal.SIGKILL, "rank", 1, "error: rank 1 was killed by SIGKILL"),
    ("toy", signal.SIGTERM, "rank", 1, "error: rank 1 was killed by SIGTERM"),
    ("train", signal.SIGINT, "parent", 130, "interrupted: run the same command again"),
    ("train", signal.SIGKILL, "rank", 1, "error: rank 1 was killed by SIGKILL"),
    ("extract", signal.SIGINT, "all", 130, "interrupted: run the same command again"),
    ("attack", signal.SIGINT, "all", 130, "interrupted: run the same command again"),
    ("attack", signal.SIGKILL, "rank", 1, "error: rank 1 was killed by SIGKILL"),
]


@pytest.mark.parametrize(
    ("command", "number", "whom", "status", "said"),
    SIGNALS,
    ids=[f"{c}-{s.name}-{w}" for c, s, w, *_ in SIGNALS],
)
def test_a_signal_ends_all(
    command: str, number: signal.Signals, whom: str, status: int, said: str, tmp_path: Path
) -> None:
    words, is_running = COMMANDS[command](tmp_path)
    process = Command(*words, *TWO, *FREE_PORT)

    def running() -> bool:
        found = ranks_of(process.pid)
        return is_running() or (len(found) == 2 and all(map(computes, found)))

    assert wait_for(running), process.communicate()
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    for pid in {"parent": [process.pid], "rank": ranks[1:], "all": [*ranks, process.pid]}[whom]:
        os.kill(pid, number)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert said in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) < 20, output
    assert wait_for(lambda: not any(map(alive, ranks)), 30)
    assert time.monotonic() - begun < 30
    if number != signal.SIGKILL:
        assert not list(tmp_path.rglob(".lock"))


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    words, is_running = toy(tmp_path)
    process = Command(*words, *TWO, *FREE_PORT, "--timeout", "30")
    assert wait_for(is_running)
    os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1, output
    assert "waiting for rank 1: no sign of life for 15 s" in output
    assert "error: rank 1 gave no sign of life for 30 s (--timeout)" in output
    assert "Traceback" not in output


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def nodes(folder: Path, *changes: Sequence[str]) -> list[tuple[int, str]]:
    """Status and output of nodes of one process, each with flags of its own."""
    port = free_port()
    url = ["--dist-url", f"tcp://127.0.0.1:{port}", "--world-size", str(len(changes))]
    one = ["--multiprocessing-distributed", "--nproc-per-node", "1", "--cpu"]
    words = ["-m", "tests.toy_ranks", "--folder", str(folder), "--what", "once", *one, *url]
    started = [Command(*words, "--rank", str(rank), *more) for rank, more in enumerate(changes)]
    said = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_nodes_with_different_settings_are_told_so(tmp_path: Path) -> None:
    for status, output in nodes(tmp_path, ["--lr", "0.1"], ["--lr", "0.2"]):
        assert status == 2, output
        assert "error: --lr: rank 0 was started with 0.1, rank 1 with 0.2" in output
        assert "Traceback" not in output


def test_nodes_with_equal_files_at_different_places_compute_together(tmp_path: Path) -> None:
    for name in "ab":
        write_json(tmp_path / name, {})
    found = nodes(tmp_path, *(["--checkpoint", str(tmp_path / name)] for name in "ab"))
    assert [status for status, _ in found] == [0, 0], found


MAINS: dict[str, Callable[[list[str]], None]] = {
    "toy": tests.toy_ranks.main,
    "train": training.main_pytorch.run,
    "extract": gradients.command.run,
    "attack": attack.cli.command.main,
}
REFUSED = {
    "a batch smaller than the processes": ("train", ["-b", "1"], "cannot be divided into 2 parts"),
    "one image": ("extract", ["-b", "1"], "a local batch of 1 images cannot be spread over 2"),
    "shards": ("extract", ["--shards", "1,1,2"], "--shards 1,1,2: there are 2 processes"),
    "L-BFGS": ("attack", ["--optim", "LBFGS"], "LBFGS runs on one process"),
    "a closed form": ("attack", ["--attack", "r-gap"], "--attack r-gap runs on one process"),
    "too many": ("attack", ["--nproc-per-node", "5"], "5 processes for a batch of 4"),
    "a timeout of 0": ("toy", ["--timeout", "0"], "--timeout 0: must be a positive"),
    "a running training": ("train", [], "--result-root: {folder} is in use by process"),
    "a running attack": ("attack", [], "--root and --id: {folder}/test is in use by process"),
    "a port in use": ("toy", ["--dist-url", "tcp://127.0.0.1:{taken}"], "the port is in use"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_said_before_processes_start(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("processes were started")

    monkeypatch.setattr(Ranks, "_start", started)
    command, more, sentence = REFUSED[case]
    words, _ = COMMANDS[command](tmp_path)
    words = words[2:] if command == "toy" else words[1:]
    # The parent of this process lives as long as it does.
    other = Owner(os.getppid(), socket.gethostname(), born(os.getppid()))
    for folder in (tmp_path, tmp_path / "test"):
        if "running" in case:
            write_json(folder / LOCK_NAME, dataclasses.asdict(other))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        more = [word.replace("{taken}", port) for word in more]
        expected = re.escape(sentence.replace("{folder}", str(tmp_path)))
        with pytest.raises(InputError, match=expected):
            MAINS[command]([*words, *TWO, *FREE_PORT, *more])


def born(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_several_processes_need_their_switch() -> None:
    with pytest.raises(InputError, match="--nproc-per-node 2 needs --multiprocessing-distributed"):
        MAINS["toy"](["--nproc-per-node", "2", "--cpu"])


@pytest.mark.parametrize("spread", ["batch", "restarts"])
def test_an_interrupted_attack_of_two_processes_keeps_its_best(spread: str, tmp_path: Path) -> None:
    words, is_running = invert(tmp_path)
    several = ["--spread", spread, "--n-seed", "3", "--metric"]
    process = Command(*words, *several, *TWO, *FREE_PORT)
    assert wait_for(is_running), process.communicate()
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "measuring the best so far" in output
    record = read_record(tmp_path / "test" / "record.json")
    assert isinstance(record, AttackRecord)
    assert record.status == "interrupted"
    assert record.iterations >= 5
    # The state stays, and the same command would go on from it.
    assert any((tmp_path / "test").glob("state-*"))
