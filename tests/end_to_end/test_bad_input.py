"""Mistakes of the user end each command with one clear sentence and exit status 2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.errors import exit_status


def train(words: list[str]) -> int:
    from training.main_pytorch import main

    return main(words)


def extract(words: list[str]) -> int:
    from gradients.command import main

    return main(words)


def attack(words: list[str]) -> int:
    from attack.cli.command import main

    return exit_status(functools.partial(main, words))


def benchmark(words: list[str]) -> int:
    from benchmarks.command import main

    return main(words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files that are not what the commands want."""
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.tar")
    whole = (tmp_path / "other.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    return tmp_path


NCCL = ["--dist-backend", "nccl", "--cpu"]
CASES: list[tuple[Callable[[list[str]], int], list[str], str]] = [
    (train, ["--data", "{}/none"], "none"),
    (train, ["--scheme", "best"], "--scheme best: unknown; known are None, pure, RA"),
    (train, ["--arch", "resnet19"], "--arch resnet19: unknown architecture"),
    (train, ["--resume", "{}/none.tar"], "--resume: there is no file"),
    (train, NCCL, "--dist-backend nccl needs a CUDA GPU"),
    (extract, ["--data", "{}/none"], "none"),
    (extract, ["--data", "photo-patches", "--arch", "resnet19"], "resnet19"),
    (extract, ["--data", "photo-patches", "--pretrained", "{}/none.tar"], "there is no file"),
    (extract, ["--data", "photo-patches", "--pretrained", "{}/cut.tar"], "cut.tar is truncated"),
    (extract, ["--data", "photo-patches", *NCCL], "--dist-backend nccl needs a CUDA GPU"),
    (attack, [], "--checkpoint: give the gradient checkpoint"),
    (attack, ["--checkpoint", "{}/none.tar"], "--checkpoint: there is no file"),
    (attack, ["--checkpoint", "{}"], "is a folder, not a checkpoint file"),
    (attack, ["--checkpoint", "{}/empty.tar"], "is empty (0 bytes)"),
    (attack, ["--checkpoint", "{}/cut.tar"], "cut.tar is truncated or not a checkpoint"),
    (attack, ["--checkpoint", "{}/text.tar"], "text.tar is"),
    (attack, ["--checkpoint", "{}/other.tar"], "other.tar is not a gradient checkpoint"),
    (attack, ["--checkpoint", "{}/other.tar", "--attack", "best"], "best"),
    (attack, ["--checkpoint", "{}/other.tar", *NCCL], "--dist-backend nccl needs a CUDA GPU"),
    (benchmark, [], "which table? Known are"),
    (benchmark, ["nothing-like-it"], "unknown table nothing-like-it"),
    (benchmark, ["schemes", "--jobs", "0"], "--jobs must be at least 1"),
    (benchmark, ["schemes", "--address", "auto"], "need --executor ray"),
]


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    CASES,
    ids=[f"{c.__name__} {' '.join(w)}" for c, w, _ in CASES],
)
def test_one_sentence_and_status_2(
    command: Callable[[list[str]], int],
    words: list[str],
    sentence: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    status = command([word.replace("{}", str(folder)) for word in words])
    said = capsys.readouterr().err.strip()
    assert status == 2
    assert sentence in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
