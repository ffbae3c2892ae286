"""Stage 1 over several processes equals stage 1 on one, and nothing outlives a death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from core.launch_arguments import LaunchSettings
from core.processes.distributed import Process, seed_everything
from core.processes.launch import launch
from core.storage import load_checkpoint
from tests.image_folders import write_tree
from tests.launched import Command, alive, ranks_of, wait_for
from training.checkpoints import latest_checkpoint
from training.main_pytorch import parse_args, run, run_settings
from training.run import run_training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data", classes=3, per_class=9)


def flags(data: Path, root: Path, *more: str) -> list[str]:
    small = ["--arch", "cnn", "--width", "4", "--lr", "0.02", "--cpu", "-j", "0", "-b", "7"]
    where = ["--data", str(data), "--result-root", str(root), "--no-tensorboard"]
    return [*where, *small, "--epochs", "2", *more]


def processes(n: int) -> list[str]:
    url = ["--dist-backend", "gloo", "--dist-url", "tcp://127.0.0.1:0"]
    return ["--multiprocessing-distributed", "--nproc-per-node", str(n), *url]


def result(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = latest_checkpoint(root)
    assert path is not None
    return load_checkpoint(path)["state_dict"], json.loads((root / "record.json").read_text())


def assert_same_training(one: Path, several: Path, n: int) -> None:
    (state, record), (other_state, other_record) = result(one), result(several)
    assert other_record["processes"] == n
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value, rtol=1e-3, atol=1e-5)
    for before, after in zip(record["history"], other_record["history"], strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-4)
        assert after["val_acc1"] == before["val_acc1"]


# What processes must train just as one does. 18 training images; batches of 7 shrink
# to 6, and 3 processes with 2 parts each hold shards of 1; batches of 5 are uneven.
VARIANTS = {
    "synchronized": ["--syncbn", "-b", "5"],
    "accumulated": ["--norm", "group", "--accumulate", "2"],
    "dp-sgd": ["--enable-dp", "--sigma", "0.5", "-c", "0.5", "-b", "3"],
    "clients": [
        "--clients",
        "4",
        "--local-steps",
        "2",
        "-b",
        "8",
        "--error-feedback",
        "ef-sgd",
        "--defense",
        "topk:0.2,gaussian:0.01",
    ],
    "private clients": ["--clients", "3", "--enable-dp", "--sigma", "0.5", "-b", "6"],
    "dp-batch": ["--enable-dp", "--sigma", "0.05", "--dp-clipping", "batch", "--syncbn"],
}


def train_variants(process: Process, commands: Mapping[str, Sequence[str]]) -> None:
    """All variants in one group of processes: starting one takes longer than training."""
    for command in commands.values():
        seed_everything(0)
        run_training(process, run_settings(parse_args(command)))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every variant, trained by several processes and by one."""
    pytest.importorskip("opacus")
    n, folder = 3, tmp_path_factory.mktemp("variants")
    data = write_tree(folder / "data", classes=3, per_class=8)
    launched = parse_args([*processes(n), "--cpu"])
    commands = {name: flags(data, folder / f"{name}{n}", *more) for name, more in VARIANTS.items()}
    commands["asynchronous"] = flags(data, folder / f"asynchronous{n}", "-b", "6")
    launch(train_variants, LaunchSettings.from_arguments(launched), commands)
    groups = ["-b", "6", "--bn-groups", str(n)]
    for name, more in (VARIANTS | {"asynchronous": groups}).items():
        run(flags(data, folder / f"{name}1", *more))
    return n, folder


@pytest.mark.parametrize("name", [*VARIANTS, "asynchronous"])
def test_several_processes_train_as_one(several: tuple[int, Path], name: str) -> None:
    n, folder = several
    assert_same_training(folder / f"{name}1", folder / f"{name}{n}", n)


def start_warm(*arguments: str, path: Path | None = None) -> Command:
    places = os.pathsep.join(map(str, filter(None, [ROOT, path])))
    return Command("training/main_pytorch.py", *arguments, PYTHONPATH=places)


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "training/main_pytorch.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_torchrun(data: Path, tmp_path: Path) -> None:
    run(flags(data, tmp_path / "one", "--syncbn"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(*flags(data, tmp_path / "several", "--syncbn"), launcher=launcher)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same_training(tmp_path / "one", tmp_path / "several", 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_rank_ends_all_and_the_run_continues(data: Path, tmp_path: Path) -> None:
    """kill -9 of a rank: its peers end, the error is shown, resuming is bitwise exact."""
    common = ["--syncbn", "--epochs", "12", "--resume", "auto", *processes(2)]
    root = tmp_path / "cut"
    process = start_warm(*flags(data, root, *common))
    assert wait_for(lambda: latest_checkpoint(root) is not None, 60)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "SIGKILL" in output
    assert wait_for(lambda: not any(map(alive, ranks)), 10)
    assert result(root)[1]["epochs_done"] < 12

    run(flags(data, root, *common))
    run(flags(data, tmp_path / "whole", *common))
    cut, whole = result(root)[0], result(tmp_path / "whole")[0]
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_parent_leaves_no_orphans(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    # As in the background of a script, where SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start(*flags(data, root, "--syncbn", "--epochs", "10000", *processes(2)))
    signal.signal(signal.SIGINT, before)
    assert wait_for(lambda: latest_checkpoint(root) is not None, 60)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait(10)
    assert len(ranks) == 2
    assert wait_for(lambda: not any(map(alive, ranks)), 60)


@pytest.mark.parametrize(
    ("rank", "error", "status", "message"),
    [
        (1, "RuntimeError('rank one is ill')", 1, "RuntimeError: rank one is ill"),
        (0, "InputError('--data: only rank zero looks')", 2, "error: --data: only rank zero looks"),
    ],
)
def test_a_failing_rank_shows_its_own_error(
    rank: int, error: str, status: int, message: str, data: Path, tmp_path: Path
) -> None:
    """The peers' lost connections must not hide it."""
    (tmp_path / "ill.py").write_text(
        "from training import trainer\n"
        "from core.errors import InputError\n"
        "def fail(self, epoch):\n"
        f"    if self.process.rank == {rank}:\n"
        f"        raise {error}\n"
        "    return train_epoch(self, epoch)\n"
        "train_epoch = trainer.Trainer.train_epoch\n"
        "trainer.Trainer.train_epoch = fail\n"
    )
    command = flags(data, tmp_path / "out", "--syncbn", "--plugin", "ill", *processes(2))
    process = start_warm(*command, path=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert output.count(message) >= 1
    assert ("Traceback" in output) == (status == 1)
