"""The record of stage 3: one writer, one reader, and what older versions wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attack.record import SCHEMA_VERSION, AttackRecord, LabelRecord, from_json, read_record
from core.errors import InputError

# As written before there were versions; today's readers find the numbers by these keys.
OLD: dict[str, Any] = {
    "key": "0123456789abcdef",
    "status": "finished",
    "attack": "spectral",
    "threat": {"name": "custom", "granted": ["batch size"], "adaptive": False},
    "config": {"tv": 1.0, "optimizer": "Adam", "stages": [0.3, 0.3, 0.4]},
    "arguments": {"epochs": 5},
    "target": {"batch_size": 2, "train_mode": True},
    "provenance": {"seed": 0, "processes": 1},
    "seconds": 1.5,
    "iterations": 5,
    "objective": 0.25,
    "labels": [3, 1],
    "details": {},
    "trace": [{"iteration": 0, "objective": 1.0}],
    "psnr_curve": [],
    "pictures": ["reconstruction.png"],
    "label_accuracy": 1.0,
    "evaluation": {"per_image": [{"psnr": 20.0, "mae": 0.1}]},
    "tables": ["table"],
}


def test_an_old_record_is_read_and_keeps_its_keys() -> None:
    record = from_json(OLD)
    assert isinstance(record, AttackRecord)
    assert (record.schema_version, record.objective) == (0, 0.25)
    assert record.to_json() == {**OLD, "schema_version": 0}


def test_what_an_old_record_lacks_has_a_default() -> None:
    record = from_json({"key": "0", "attack": "dlg"})
    assert isinstance(record, AttackRecord)
    assert (record.threat, record.psnr_curve, record.evaluation) == ({}, [], None)
    assert "evaluation" not in record.to_json()
    assert record.to_json()["config"] is None


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    record = AttackRecord(key="0", attack="dlg", GInfoR={"images": []})
    (tmp_path / "record.json").write_text(json.dumps(record.to_json()))
    assert read_record(tmp_path / "record.json") == record
    assert record.schema_version == SCHEMA_VERSION


def test_records_of_labels_alone_are_told_apart() -> None:
    record = from_json({"key": "0", "status": "finished", "label_rules": {"llg": {}}})
    assert isinstance(record, LabelRecord)
    assert "config" not in record.to_json()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a record of an attack"),
        ('{"rows": []}', "is not a record of an attack"),
        ('{"key": "0", "schema_version": 99}', "written by a newer version"),
    ],
)
def test_other_files_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_record(tmp_path / "record.json")
