"""The record of an extraction: written, read, and read from files without a version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from gradients.command import main
from gradients.record import SCHEMA_VERSION, ExtractRecord, read_record, write_record
from tests.image_folders import write_tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of the command wrote."""
    root = tmp_path_factory.mktemp("extracted")
    where = ["--data", str(write_tree(root / "data")), "--results", str(root / "out")]
    private = ["--enable-dp", "--dp-clipping", "per-sample", "--sigma", "1"]
    assert (
        main([*where, "--arch", "cnn", "--width", "4", "-b", "2", "--cpu", "--ra", *private]) == 0
    )
    return root / "out"


def content(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_the_commands_record_reads_back(folder: Path, tmp_path: Path) -> None:
    (path,) = folder.glob("*.json")
    record = read_record(path)
    assert record.schema_version == SCHEMA_VERSION
    assert record.target.model["arch"] == "cnn"
    assert record.target.gradient_norm > 0
    assert record.privacy is not None
    assert record.privacy.clipping == "per-sample"
    assert len(record.measured.indices) == 2
    assert record.ranks[0].name == "conv1"
    write_record(record, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content(folder)


def test_a_record_without_a_version_still_reads(folder: Path) -> None:
    values = content(folder)
    del values["schema_version"]
    assert ExtractRecord.from_dict(values) == ExtractRecord.from_dict(content(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 99}', "update the program"),
        ('{"labels": [1]}', "not a whole record of an extraction"),
        ("{", "is not JSON"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_record(tmp_path / "record.json")
