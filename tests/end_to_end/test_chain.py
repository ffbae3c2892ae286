"""Train, extract, attack, report: the whole chain through the harness, very small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.show.results import load_results
from tests.launched import Command

TABLE = """
title: A chain in miniature
axes:
  scheme:
    pure: {train: {scheme: pure}, extract: {syncbn: true}}
    GH: {train: {scheme: GH, processes: 2}, extract: {processes: 2}}
train: {arch: cnn, width: 4, epochs: 1, batch-size: 64, workers: 0, lr: 0.02}
extract: {pretrained: train/model_best.pth.tar, batch-size: 2, workers: 0}
attack:
  checkpoint: extract/*-checkpoint.pth.tar
  attack: spectral
  epochs: 5
  metric: true
columns: [validation accuracy, epsilon, label accuracy, mse, psnr, ssim, lpips_alex, seconds]
figures: [reconstructions, tradeoff, bars, curves]
"""


def run(folder: Path) -> tuple[int | None, str]:
    process = Command(
        "-m", "benchmarks", str(folder / "tiny.yaml"),
        "--store", str(folder / "store"), "--output", str(folder / "out"),
    )  # fmt: skip
    said, _ = process.communicate(timeout=280)
    return process.returncode, said


@pytest.mark.slow
def test_chain_from_training_to_report(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TABLE)
    status, said = run(tmp_path)
    assert status == 0, said
    assert "6 cells finished" in said

    rows = json.loads((tmp_path / "out" / "tiny.json").read_text())["rows"]
    for row in rows:
        values = row["values"]
        assert 0 <= values["validation accuracy"]["mean"] <= 100
        assert values["psnr"]["n"] == 2
        # Five iterations recover little, but more than noise (about 8 dB).
        assert 5 < values["psnr"]["mean"] < 60
        assert row["notes"]["epsilon"] == "not differentially private"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"reconstructions-pure.png", "reconstructions-gh.png", "report.html"} <= names
    assert {"tradeoff.png", "bars.png", "curves.png", "tiny.md", "tiny.csv", "tiny.tex"} <= names
    assert len(load_results(tmp_path / "store")) == 6

    status, said = run(tmp_path)
    assert status == 0
    assert "6 cells found" in said
    assert json.loads((tmp_path / "out" / "tiny.json").read_text())["rows"] == rows
