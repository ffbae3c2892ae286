"""The stage 2 command over several processes, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.target import Target
from gradients.checkpoint import load_target
from gradients.command import main
from tests.launched import Command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "training/get_gradients.py"
MODEL = ["--arch", "cnn", "--width", "3", "-b", "5", "--cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for label in range(3):
        folder = root / f"class{label}"
        folder.mkdir()
        for index in range(6):
            pixels = torch.randint(0, 256, (12, 12, 3), generator=generator)
            Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
    return root


def _arguments(data: Path, results: Path, *flags: str) -> list[str]:
    return ["--data", str(data), "--results", str(results), *MODEL, *flags]


def _run_here(data: Path, results: Path, *flags: str) -> None:
    """One process: this one."""
    assert main(_arguments(data, results, *flags)) == 0


def _run(command: list[str], data: Path, results: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, SCRIPT, *_arguments(data, results, *flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _target(results: Path) -> Target:
    (path,) = results.glob("*-checkpoint.pth.tar")
    return load_target(path)[0]


SPAWN = ["--multiprocessing-distributed", "--nproc-per-node", "2", "--dist-backend", "gloo"]
SPAWN += ["--dist-url", "tcp://127.0.0.1:0"]


def test_spawned_processes_share_the_whole_batch(data: Path, tmp_path: Path) -> None:
    process = Command(SCRIPT, *_arguments(data, tmp_path / "two", "--syncbn", *SPAWN))
    said, _ = process.communicate()
    assert process.returncode == 0, said
    # Only the first process reports.
    assert said.count("gradient checkpoint: ") == 1
    _run_here(data, tmp_path / "one")
    two, one = _target(tmp_path / "two"), _target(tmp_path / "one")
    assert two.shards == (3, 2)
    assert two.synchronized
    for name, gradient in one.gradient.items():
        torch.testing.assert_close(two.gradient[name], gradient, rtol=1e-5, atol=1e-6)


def test_torchrun_shares_asynchronous_groups(data: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = _run(torchrun, data, tmp_path / "two", "--shards", "4,1")
    assert done.returncode == 0, done.stderr
    _run_here(data, tmp_path / "one", "--shards", "4,1")
    two, one = _target(tmp_path / "two"), _target(tmp_path / "one")
    assert not two.synchronized
    assert two.bn_statistics is not None
    assert len(two.bn_statistics) == 2
    for name, gradient in one.gradient.items():
        torch.testing.assert_close(two.gradient[name], gradient, rtol=1e-5, atol=1e-6)


def test_bad_input_ends_all_processes_with_one_sentence(data: Path, tmp_path: Path) -> None:
    process = Command(SCRIPT, *_arguments(data, tmp_path / "two", "--shards", "1,1,3", *SPAWN))
    said, _ = process.communicate()
    assert process.returncode == 2
    assert "error: --shards 1,1,3: there are 2 processes" in said
    assert not (tmp_path / "two").exists()
