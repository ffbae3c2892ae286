"""The stage 1 command on one process: flags, mistakes, a whole run, resuming."""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.losses import DEFAULT_LOSS, share_right
from core.models.building import ModelSpec, build_model
from core.storage import load_checkpoint
from tests.image_folders import write_tree
from training import checkpoints, schemes, trainer
from training.main_pytorch import build_parser, main, parse_args, run
from training.settings import TrainingConfig
from training.trainer import Sums

ROOT = Path(__file__).resolve().parents[2]

# Flag, type, default: the published command line. Rows may be added, never changed.
PUBLISHED = [
    ("--data", str, "photo-patches"),
    ("-a", str, "resnet18"),
    ("--arch", str, "resnet18"),
    ("-j", int, 4),
    ("--workers", int, 4),
    ("--epochs", int, 90),
    ("--start-epoch", int, 0),
    ("-b", int, 128),
    ("--batch-size", int, 128),
    ("--lr", float, 0.1),
    ("--learning-rate", float, 0.1),
    ("--momentum", float, 0.9),
    ("--wd", float, 1e-4),
    ("--weight-decay", float, 1e-4),
    ("--resume", str, ""),
    ("-e", None, False),
    ("--evaluate", None, False),
    ("--pretrained", str, None),
    ("--result-root", str, None),
    ("--syncbn", None, False),
    ("--enable_dp", None, False),
    ("--enable-dp", None, False),
    ("--sigma", float, 0.01),
    ("-c", float, 1.0),
    ("--max-per-sample-grad_norm", float, 1.0),
    ("--delta", float, 1e-5),
    ("--scheme", str, "None"),
    ("--seed", int, 0),
    ("-p", int, 10),
    ("--print-freq", int, 10),
    ("--gpu", int, None),
    ("--world-size", int, 1),
    ("--rank", int, 0),
    ("--dist-url", str, "tcp://127.0.0.1:10023"),
    ("--dist-backend", str, None),
    ("--multiprocessing-distributed", None, False),
]


@pytest.mark.parametrize(("flag", "kind", "default"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_flags(flag: str, kind: type | None, default: Any) -> None:
    action = build_parser()._option_string_actions[flag]
    assert action.default == default
    assert (action.nargs == 0) if kind is None else ((action.type or str) is kind)


@pytest.mark.parametrize("word", ["per-sample", "sample"])
def test_both_words_for_clipping_every_sample(word: str) -> None:
    assert parse_args(["--enable-dp", "--dp-clipping", word]).dp_clipping == "per-sample"


def test_scheme_sets_defaults_and_flags_win() -> None:
    args = parse_args(["--scheme", "GH"])
    assert (args.batch_size, args.syncbn) == (384, False)
    assert parse_args(["--scheme", "GH", "-b", "128"]).batch_size == 128
    assert parse_args(["--scheme", "RA"]).kernel_size_of_maxpool == 19
    args = parse_args(["--scheme", "DP-SGD", "--sigma", "1.5"])
    assert (args.enable_dp, args.syncbn, args.sigma) == (True, True, 1.5)
    assert Path(args.result_root) == Path("results/training/DP-SGD")
    custom = parse_args([])
    assert (custom.syncbn, custom.enable_dp, custom.batch_size) == (False, False, 128)


def test_help_is_quick_and_complete() -> None:
    done = subprocess.run(
        [sys.executable, "training/main_pytorch.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "--dp-clipping" in done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data")


def flags(data: Path, root: Path, *more: str) -> list[str]:
    small = ["--arch", "cnn", "--width", "4", "-b", "8", "--lr", "0.02", "--cpu", "-j", "0"]
    where = ["--data", str(data), "--result-root", str(root)]
    return [*where, *small, "--epochs", "2", "--no-tensorboard", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data: there is no folder nowhere"),
        (["--scheme", "puer"], "--scheme puer: unknown"),
        (["--arch", "resnet19"], "--arch resnet19: unknown"),
        (["--dist-backend", "nccl"], "use --dist-backend gloo"),
        (["--resume", "nothing.tar"], "--resume: there is no file nothing.tar"),
        (["--pretrained", "nothing.pth"], "--pretrained: there is no file"),
        (["--epochs", "-1"], "--epochs must be at least 0"),
        (["-b", "0"], "--batch-size must be at least 1"),
        (["--accumulate", "20"], "cannot be divided into 20 parts"),
        (["--lr", "0"], "--lr must be positive"),
        (["--sigma", "-1"], "--sigma must be at least 0"),
        (["--sigma", "nan", "--enable-dp"], "--sigma must be at least 0, not nan"),
        (["--momentum", "-1"], "--momentum must be at least 0"),
        (["--wd", "-1"], "--wd must be at least 0"),
        (["--width", "0"], "--width must be at least 1"),
        (["--bn-groups", "0"], "--bn-groups must be at least 1"),
        (["--lr", "inf"], "--lr must be positive"),
        (["-c", "nan"], "--max-per-sample-grad_norm must be positive"),
        (["--delta", "2"], "--delta must lie between"),
        (["--enable-dp", "--compile"], "cannot be combined"),
        (["--enable-dp", "--norm", "batch"], "--norm group"),
        (["--syncbn", "--arch", "lenet", "--scheme", "RA"], "has none"),
        (["--plugin", "no_such_module"], "--plugin no_such_module"),
        (["--world-size", "2"], "needs --multiprocessing-distributed"),
        (["--rank", "3"], "--rank 3 is not below"),
        (["--image-size", "4"], "--image-size 4"),
        (["--lr", "1e30"], "training diverged"),
        (["-b", "1", "--arch", "resnet18", "--stem", "imagenet"], "one value per channel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_status_2(
    more: list[str],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available() and more[0] == "--dist-backend":
        more = [*more, "--cpu"]
    assert main(flags(data, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_broken_checkpoints(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.tar"
    torch.save({"epoch": 1, "state_dict": {}, "optimizer": {}}, whole)
    truncated, foreign = tmp_path / "truncated.tar", tmp_path / "foreign.tar"
    truncated.write_bytes(whole.read_bytes()[:-60])
    torch.save({"weights": 1}, foreign)
    cases = [(truncated, "truncated"), (foreign, "no epoch"), (whole, "does not fit")]
    for path, message in cases:
        assert main(flags(data, tmp_path / "out", "--resume", str(path))) == 2
        assert message in capsys.readouterr().err


def test_a_run_leaves_checkpoints_record_metrics_and_curves(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    run(flags(data, root, "--save-every", "1"))
    names = sorted(path.name for path in root.glob("*.tar"))
    assert names[0].startswith("checkpoint_epoch_0001_acc1_")
    assert names[1].startswith("checkpoint_epoch_0002_acc1_")
    assert names[2:] == ["model_best.pth.tar", "model_init.pth.tar"]

    checkpoint = load_checkpoint(root / names[1])
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= set(checkpoint)
    assert (checkpoint["epoch"], checkpoint["arch"]) == (2, "cnn")
    assert isinstance(checkpoint["args"], argparse.Namespace)
    build_model(ModelSpec.from_dict(checkpoint["model"])).load_state_dict(checkpoint["state_dict"])
    assert checkpoint["data"]["n_classes"] == 2
    assert load_checkpoint(root / "model_init.pth.tar")["epoch"] == 0

    record = json.loads((root / "record.json").read_text())
    assert (record["status"], record["epochs_done"], record["processes"]) == ("finished", 2, 1)
    assert record["best_val_acc1"] == max(entry["val_acc1"] for entry in record["history"])
    assert record["images_per_second"] > 0
    assert all((root / name).exists() for name in record["checkpoints"].values())
    assert all(entry["val_acc5"] == 100 for entry in record["history"])
    rows = list(csv.DictReader((root / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(data: Path, tmp_path: Path) -> None:
    run(flags(data, tmp_path / "out", "--epochs", "8", "--lr-schedule", "cosine"))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["final_val_acc1"] == 100.0
    assert record["history"][-1]["train_loss"] < record["history"][0]["train_loss"]


def final_state(root: Path) -> dict[str, torch.Tensor]:
    path = checkpoints.latest_checkpoint(root)
    assert path is not None
    return load_checkpoint(path)["state_dict"]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("scheme", ["pure", "DP-SGD"])
@pytest.mark.parametrize("moment", ["mid-epoch", "after the best checkpoint"])
def test_resuming_is_bitwise_the_uninterrupted_run(
    scheme: str, moment: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scheme == "DP-SGD":
        pytest.importorskip("opacus")
    command = ["--scheme", scheme, "--epochs", "3", "-b", "6", "--resume", "auto", "--seed", "3"]
    run(flags(data, tmp_path / "whole", *command))
    with monkeypatch.context() as patch:
        _die_in_second_epoch(patch, moment)
        with pytest.raises(KilledError):
            run(flags(data, tmp_path / "cut", *command))
    run(flags(data, tmp_path / "cut", *command))
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    records = [json.loads((tmp_path / d / "record.json").read_text()) for d in ("whole", "cut")]
    assert records[0]["initial_val_acc1"] == records[1]["initial_val_acc1"] is not None
    for key in ("val_loss", "train_loss", "epsilon"):
        series = [[entry[key] for entry in record["history"]] for record in records]
        assert series[0] == series[1]


def _die_in_second_epoch(patch: pytest.MonkeyPatch, moment: str) -> None:
    """As kill -9 would, between any two instructions."""
    if moment == "mid-epoch":
        step = trainer.Trainer._to_device

        def dying(self: Any, *tensors: torch.Tensor) -> Any:
            if self.epoch == 1 and self.model.training and self.batches.epoch == 1:
                raise KilledError
            return step(self, *tensors)

        patch.setattr(trainer.Trainer, "_to_device", dying)
        return
    save = trainer.save_checkpoint

    def dying_save(state: dict[str, Any], path: Path) -> None:
        if "epoch_0002" in path.name:
            raise KilledError
        save(state, path)

    patch.setattr(trainer, "save_checkpoint", dying_save)


def test_an_earlier_run_is_not_overwritten_silently(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    run(flags(data, root, "--epochs", "1"))
    (root / ".model_best.pth.tar.x1y2").write_bytes(b"half a file of a killed run")
    assert main(flags(data, root)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(flags(data, root, "--overwrite")) == 0
    epochs = [checkpoints.checkpoint_epoch(path) for path in checkpoints.checkpoints(root)]
    assert epochs == [1, 2]
    assert not list(root.glob(".model_best*"))
    assert main(flags(data, root, "--resume", "auto", "--width", "8")) == 2
    assert "width = 4" in capsys.readouterr().err


def test_checkpoints_in_between_are_removed(data: Path, tmp_path: Path) -> None:
    run(flags(data, tmp_path / "out", "--epochs", "5", "--save-every", "2"))
    kept = [
        checkpoints.checkpoint_epoch(path) for path in checkpoints.checkpoints(tmp_path / "out")
    ]
    assert kept == [2, 4, 5]


def test_five_guesses_are_counted_as_by_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 9, generator=generator)
    labels = torch.randint(9, (40,), generator=generator)
    sums = Sums(torch.zeros(4, dtype=torch.float64))
    for part in (slice(0, 25), slice(25, 40), slice(0, 0)):
        loss = torch.nn.functional.cross_entropy(logits[part], labels[part], reduction="sum")
        right = logits[part].argmax(1) == labels[part]
        sums.add(
            loss, len(labels[part]), right, share_right(DEFAULT_LOSS, logits[part], labels[part], 5)
        )
    order = logits.argsort(1, descending=True).tolist()
    first, five = (
        100 * sum(label in row[:k] for row, label in zip(order, labels.tolist(), strict=True)) / 40
        for k in (1, 5)
    )
    assert sums.over_processes()[1:] == pytest.approx((first, five))
    assert first < five < 100
    assert sums.over_processes()[1] == pytest.approx(first)


def test_evaluate_and_pretrained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    run(flags(data, root))
    best = load_checkpoint(root / "model_best.pth.tar")
    capsys.readouterr()
    # Parameters as the original tools wrote them, from a parallel model.
    prefixed = {f"module.{name}": value for name, value in best["state_dict"].items()}
    torch.save(prefixed, tmp_path / "weights.pth")
    for source in (
        ["--resume", str(root / "model_best.pth.tar")],
        ["--pretrained", str(tmp_path / "weights.pth")],
    ):
        run(flags(data, tmp_path / "other", "-e", *source))
        assert f"acc1 {best['history'][-1]['val_acc1']:.2f}" in capsys.readouterr().out
    assert not list((tmp_path / "other").glob("*.tar"))


def test_pretrained_that_fits_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "weights.pth")
    weights = ["--pretrained", str(tmp_path / "weights.pth")]
    assert main(flags(data, tmp_path / "out", *weights)) == 2
    assert "no parameter fits" in capsys.readouterr().err


def test_weights_that_cannot_be_fetched(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(data, tmp_path / "out", "--pretrained")) == 2
    assert "--pretrained PATH" in capsys.readouterr().err


def test_full_disk(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message is clear and the checkpoint before survives."""
    import errno
    import os

    root = tmp_path / "out"
    run(flags(data, root, "--epochs", "1"))
    before = final_state(root)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(flags(data, root, "--resume", "auto")) == 2
    assert "No space left on device" in capsys.readouterr().err
    after = final_state(root)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(flags(data, root, "--resume", "auto")) == 0


def test_plugin_registers_a_scheme(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemes, "_SCHEMES", copy.copy(schemes._SCHEMES))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_schemes.py").write_text(
        "from training.schemes import Scheme, register_scheme\n"
        "register_scheme(Scheme('mine', batch_size=4, batch_norm='asynchronous'))\n"
    )
    args = parse_args(["--plugin", "my_schemes", "--scheme", "mine"])
    assert args.batch_size == 4


@pytest.mark.parametrize(
    "more",
    [
        ["--accumulate", "3"],
        ["--channels-last"],
        ["--amp", "bf16"],
        ["--bn-groups", "2"],
        ["--enable-dp", "--dp-clipping", "batch"],
        ["--lr-schedule", "cosine", "--warmup-epochs", "1"],
    ],
    ids=" ".join,
)
def test_variants_run(more: list[str], data: Path, tmp_path: Path) -> None:
    run(flags(data, tmp_path / "out", *more))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["status"] == "finished"
    if "batch" in more:
        assert record["privacy"]["epsilon"] is None
        assert "no guarantee" in record["privacy"]["note"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "more",
    [
        ["--amp", "bf16", "--channels-last"],
        ["--amp", "fp16", "--no-tf32"],
        ["--compile"],
        ["--scheme", "DP-SGD"],
        ["--multiprocessing-distributed", "--nproc-per-node", "1", "--scheme", "pure"],
        ["--multiprocessing-distributed", "--nproc-per-node", "2", "--dist-backend", "gloo"],
    ],
    ids=" ".join,
)
def test_variants_run_on_a_gpu(more: list[str], data: Path, tmp_path: Path) -> None:
    command = [flag for flag in flags(data, tmp_path / "out") if flag != "--cpu"]
    run([*command, *more, "--dist-url", "tcp://127.0.0.1:0"])
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["provenance"]["device_type"] == "cuda"


def test_accumulation_without_batch_norm_is_the_same_training(data: Path, tmp_path: Path) -> None:
    states = []
    for parts in ("1", "3"):
        run(flags(data, tmp_path / parts, "--norm", "group", "--accumulate", parts))
        states.append(final_state(tmp_path / parts))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_learning_rate_schedules() -> None:
    step = TrainingConfig(lr=0.1)
    assert [step.lr_at(epoch) for epoch in (0, 29, 30, 60)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001]
    )
    cosine = TrainingConfig(lr=0.1, lr_schedule="cosine", epochs=10, warmup=2)
    rates = [cosine.lr_at(epoch) for epoch in range(10)]
    assert rates[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.01


def test_comparison_picture(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from core.errors import exit_status
    from training import reports

    run(flags(data, tmp_path / "out", "--epochs", "1"))
    picture = tmp_path / "comparison.png"
    reports.run([str(tmp_path / "out"), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert exit_status(lambda: reports.run([str(data)])) == 2
    assert "there is no file" in capsys.readouterr().err
