"""The measurement of label rules: batches, the record, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attack.knowledge.labels.last_layer import lowest_feature
from benchmarks.label_rules import measure as measuring
from benchmarks.label_rules.__main__ import main
from benchmarks.label_rules.measure import INITIAL, Cell, Setting, measure
from benchmarks.label_rules.networks import CHANNELS, NETWORKS, ONE_SIGN, SIDE, network
from benchmarks.label_rules.record import Record
from core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_the_features_are_what_the_page_says() -> None:
    for name in NETWORKS:
        target, _ = measuring._shared(Setting(name, INITIAL, 10, 2), 0)
        negative = lowest_feature(target, target.build_model()) is not None
        assert negative == (name != ONE_SIGN), name


def test_networks_are_seeded_and_differ() -> None:
    one, same, other = (network("LSTM", 3, seed) for seed in (0, 0, 1))
    x = torch.rand(2, CHANNELS, SIDE, SIDE)
    assert torch.equal(one(x), same(x))
    assert not torch.equal(one(x), other(x))


def test_single_images_are_certain_for_the_default_and_not_for_signs() -> None:
    cell = measure(Setting("CNN, LayerNorm", INITIAL, 10, 1), 12)
    assert cell.accuracy["exact"] == [1.0] * 12
    assert sum(cell.accuracy["idlg"]) < 12
    assert cell.right == []


def test_two_classes_have_one_image_of_each() -> None:
    setting = Setting("CNN, tanh", INITIAL, 2, 2)
    for number in range(3):
        _, labels = measuring._shared(setting, number)
        assert labels.tolist() == [0, 1]


def test_the_record_is_resumed_and_shown(tmp_path: Path) -> None:
    record = Record.read(tmp_path)
    setting = Setting("LSTM", INITIAL, 10, 4)
    record.add(Cell(setting, {"exact": [1.0, 0.5], "llg": [0.25, 0.25]}, [1e-6, 1e-2], [0.1, 0.2]))
    again = Record.read(tmp_path)
    assert again.holds(setting, 2)
    assert not again.holds(setting, 3)
    page = again.page()
    assert "| `exact` |  |  | 0.750 [0.500, 1.000], n = 2 |" in page
    assert "(1 of 2 below 0.001" in page


def test_the_page_shows_the_committed_record() -> None:
    record = Record.read(ROOT / "results" / "label_rules")
    assert (ROOT / "docs" / "label-rules.md").read_text(encoding="utf-8") == record.page()


def test_bad_flags_are_refused() -> None:

    with pytest.raises(InputError, match="--batches 0"):
        main(["--batches", "0"])
