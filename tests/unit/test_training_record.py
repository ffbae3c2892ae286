"""The record of a training: written, read, and read from files of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from training.record import FILE, SCHEMA_VERSION, TrainRecord, read_record, write_record
from training.settings import TrainingConfig

EPOCH = {
    "epoch": 1, "epsilon": 3.5, "images_per_second": 575.0, "lr": 0.1, "seconds": 1.7,
    "train_acc1": 13.9, "train_loss": 2.26, "val_acc1": 22.4, "val_loss": 2.2,
}  # fmt: skip
# As the first version wrote it: no schema version, and another word for the clipping.
FIRST_VERSION: dict[str, Any] = {
    "kind": "training", "status": "finished", "scheme": "DP-SGD", "n_train": 874, "n_val": 232,
    "config": {"batch_size": 64, "dp": True, "dp_clipping": "sample", "scheme": "DP-SGD"},
    "model": {
        "arch": "cnn", "image_size": 32, "malicious": "", "n_classes": 2, "norm": "group",
        "pool_kernel": 3, "stem": "cifar", "width": 4,
    },
    "data": {
        "class_names": ["a", "b"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2],
        "n_classes": 2, "name": "photo-patches", "shape": [3, 32, 32],
    },
    "processes": 1, "epochs_done": 1, "initial_val_acc1": 8.1, "best_val_acc1": 22.4,
    "final_val_acc1": 22.4, "final_train_acc1": 13.9, "images_per_second": 575.0,
    "seconds_per_epoch": 1.7, "seconds": 1.7, "history": [EPOCH],
    "privacy": {
        "accountant": "rdp", "clipping": "sample", "delta": 1e-5, "epsilon": 3.5,
        "epsilon_rdp": 3.6, "max_norm": 1.0, "noise_multiplier": 1.0, "note": "epsilon = 3.5",
        "sample_rate": 0.07, "steps": 14,
    },
    "checkpoints": {"initial": "model_init.pth.tar", "best": None, "last": None},
    "provenance": {"seed": 3},
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    (folder / FILE).write_text(json.dumps({**FIRST_VERSION, **changes}))
    return folder


def test_a_record_of_the_first_version_still_reads(tmp_path: Path) -> None:
    record = read_record(written(tmp_path))
    assert record.config == TrainingConfig(scheme="DP-SGD", batch_size=64, dp=True)
    assert record.config.per_sample
    assert record.privacy is not None
    assert record.privacy.clipping == "per-sample"
    assert (record.history[0].val_acc1, record.model["width"]) == (22.4, 4)


def test_what_is_written_reads_back_and_keeps_its_keys(tmp_path: Path) -> None:
    record = TrainRecord.from_dict(FIRST_VERSION)
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    content = json.loads((tmp_path / FILE).read_text())
    assert content["schema_version"] == SCHEMA_VERSION
    assert set(content) == {*FIRST_VERSION, "schema_version", "checksum", "loss", "federation"}
    assert set(content["privacy"]) == set(FIRST_VERSION["privacy"])


def test_batch_clipping_without_an_accountant(tmp_path: Path) -> None:
    privacy = {
        "clipping": "batch", "noise_multiplier": 0.01, "max_norm": 1.0, "delta": 1e-5,
        "epsilon": None, "note": "batch clipping: no guarantee",
    }  # fmt: skip
    record = read_record(written(tmp_path, privacy=privacy))
    assert record.privacy is not None
    assert record.privacy.epsilon is None
    assert record.privacy.accountant is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "update the program"),
        ({"kind": "attack"}, "not the record of a training run"),
        ({"history": [{"epoch": 1}]}, "not a whole record"),
        ({"config": None}, "not a whole record"),
    ],
)
def test_other_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_record(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("fields", "called"),
    [({}, "training"), ({"dp": True}, "DP-SGD"), ({"scheme": "GH"}, "GH")],
)
def test_a_training_without_a_scheme_has_a_name_in_its_progress(
    fields: dict[str, Any], called: str
) -> None:
    assert TrainingConfig(**fields).called == called
