"""`--beside`: several checkpoints in one process of stage 3."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attack.attacks.inverting_gradients import InvertingGradients
from attack.attacks.many_targets import Begun, reconstruct_many
from attack.cli.command import main
from attack.reconstruction import Reconstruction
from core.errors import exit_status
from core.models.building import ModelSpec
from core.target import Target, Truth
from gradients.checkpoint import save_target
from tests.targets import make_target, share_model, smooth_images

FLAGS = ["--attack", "inverting-gradients", "--epochs", "20", "--quiet", "--cpu", "--double"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    spec = ModelSpec("lenet", 10, 16, width=4)
    for number, (target, labels) in enumerate(share_model(spec, 3, 1)):
        truth = Truth(smooth_images(1, 16, number + 1), labels)
        save_target(folder / f"{number}.tar", target, truth)
    other, truth = make_target(spec, 1, seed=9)
    save_target(folder / "other.tar", other, truth)
    return folder


def command(*words: str) -> int:
    return exit_status(functools.partial(main, list(words)))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def images(folder: Path) -> torch.Tensor:
    found: torch.Tensor = torch.load(folder / "reconstruction.pt", weights_only=True)["images"]
    return found


def test_each_checkpoint_gets_what_it_would_get_alone(files: Path, tmp_path: Path) -> None:
    for number in range(3):
        words = ["--checkpoint", f"{files}/{number}.tar", "--id", str(number)]
        assert command(*FLAGS, *words, "--metric", "--root", str(tmp_path / "alone")) == 0
    words = ["--checkpoint", f"{files}/0.tar", "--metric", "--root", str(tmp_path / "many")]
    beside = [f"{files}/1.tar", f"{files}/2.tar={tmp_path}/elsewhere"]
    assert (
        command(*FLAGS, *words, "--id", "run", "--targets-at-once", "3", "--beside", *beside) == 0
    )
    folders = [tmp_path / "many" / "run", tmp_path / "many" / "run-2", tmp_path / "elsewhere/run"]
    for number, folder in enumerate(folders):
        mine, own = record(folder), record(tmp_path / "alone" / str(number))
        assert mine["key"] == own["key"]
        assert mine["details"]["targets_at_once"] == 3
        assert mine["details"]["cpu_seconds"] >= 0
        assert mine["objective"] == pytest.approx(own["objective"], rel=1e-6)
        assert mine["arguments"]["checkpoint"] == own["arguments"]["checkpoint"]
        assert mine["evaluation"]["per_image"][0]["psnr"] == pytest.approx(
            own["evaluation"]["per_image"][0]["psnr"], abs=1e-3
        )
        assert not list(folder.glob("state-*"))


def test_what_is_finished_is_left_alone_and_the_rest_computed(files: Path, tmp_path: Path) -> None:
    words = [*FLAGS, "--checkpoint", f"{files}/0.tar", "--root", str(tmp_path), "--id", "a"]
    assert command(*words) == 0
    before = (tmp_path / "a" / "record.json").read_bytes()
    assert command(*words, "--beside", f"{files}/1.tar") == 0
    assert (tmp_path / "a" / "record.json").read_bytes() == before
    assert record(tmp_path / "a-2")["status"] == "finished"


def test_what_cannot_be_batched_runs_in_turn_and_says_so(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*FLAGS, "--checkpoint", f"{files}/0.tar", "--root", str(tmp_path), "--id", "a"]
    words += ["--epochs", "3", "--targets-at-once", "2", "--optim", "SGD", "--no-signed"]
    assert command(*words, "--beside", f"{files}/1.tar") == 0
    assert "SGD takes its steps" in caplog.text
    assert "targets_at_once" not in record(tmp_path / "a-2")["details"]


def test_targets_of_another_model_do_not_keep_the_others_apart(files: Path, tmp_path: Path) -> None:
    words = [*FLAGS, "--checkpoint", f"{files}/0.tar", "--root", str(tmp_path), "--id", "a"]
    words += ["--epochs", "3", "--targets-at-once", "3"]
    assert command(*words, "--beside", f"{files}/other.tar", f"{files}/1.tar") == 0
    together = [record(tmp_path / name)["details"] for name in ("a", "a-3")]
    assert [details["targets_at_once"] for details in together] == [2, 2]
    assert "targets_at_once" not in record(tmp_path / "a-2")["details"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--beside", "none.tar"], "none.tar"),
        (["--beside", "1.tar", "--targets-at-once", "-1"], "--targets-at-once"),
        (["--beside", "1.tar", "--labels-only"], "--labels-only"),
        (["--beside", "1.tar", "--multiprocessing-distributed"], "--beside"),
    ],
)
def test_bad_input_is_one_sentence(
    files: Path,
    tmp_path: Path,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"{files}/{word}" if word.endswith(".tar") else word for word in words]
    given = [*FLAGS, "--checkpoint", f"{files}/0.tar", "--root", str(tmp_path)]
    assert command(*given, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.rglob("record.json"))


def test_an_attack_that_does_more_than_invert_does_so_for_each_target() -> None:
    """As fishing does, whose inversion alone would be of another batch."""

    class Upside(InvertingGradients):
        def reconstruct(self, target: Target, **run: Any) -> Reconstruction:
            found = super().reconstruct(target, **run)
            return dataclasses.replace(found, images=1 - found.images)

    config = InvertingGradients.published.changed(iterations=3)
    shared = share_model(ModelSpec("lenet", 10, 16, width=4), 2, 1)
    begun = [Begun(target, labels, on_snapshot=lambda *_: None) for target, labels in shared]
    options = {"device": torch.device("cpu"), "seed": 0}
    found = reconstruct_many(Upside(config), begun, at_once=2, **options)  # type: ignore[arg-type]
    plain = InvertingGradients(config)
    for each, (target, labels) in zip(found, shared, strict=True):
        expected = 1 - plain.reconstruct(target, labels=labels, **options).images
        torch.testing.assert_close(each.images, expected)
