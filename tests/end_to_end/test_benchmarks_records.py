"""Every value that the stages record is a column of a table by its path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import main_run
from attack.metrics import metric_names
from benchmarks.declare.records import is_recorded
from gradients.command import run as extract
from training.main_pytorch import main as train

SMALL = ["--arch", "cnn", "--width", "4", "--data", "photo-patches", "--image-size", "16"]


def paths(value: Any, place: str) -> Iterator[str]:
    """The paths of everything in a record; an empty part has none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # A parameter's name has dots of its own.
            yield from paths(inner, f"{place}.{str(key).replace('.', '_')}")
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for entry in value:
            yield from paths(entry, place)
    elif value not in (None, []):
        yield place


def unknown(stage: str, file: Path) -> list[str]:
    found = dict.fromkeys(paths(json.loads(file.read_text()), stage))
    return [path for path in found if not is_recorded(path, metric_names())]


def test_the_schema_of_paths_knows_all_that_the_stages_write(tmp_path: Path) -> None:
    trained = tmp_path / "train"
    words = ["--epochs", "1", "--workers", "0", "--scheme", "DP-SGD", "--result-root", str(trained)]
    train([*SMALL, *words])
    assert unknown("train", next(trained.rglob("record.json"))) == []
    shared = tmp_path / "extract"
    words = ["--workers", "0", "--batch-size", "2", "--ra", "--results", str(shared)]
    extract([*SMALL, *words])
    assert unknown("extract", next(shared.glob("*.json"))) == []
    (checkpoint,) = shared.glob("*-checkpoint.pth.tar")
    words = ["--checkpoint", str(checkpoint), "--attack", "auto", "--threat", "worst-case"]
    words += [
        "--epochs",
        "6",
        "--metric",
        "--GInfoR",
        "--quiet",
        "--root",
        str(tmp_path / "attack"),
    ]
    main_run.main(words)
    assert unknown("attack", next((tmp_path / "attack").rglob("record.json"))) == []
