"""A table with made-up records in a real store, for everything that shows results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.declare.tables import Table, load_table
from benchmarks.run.stages import STAGES
from benchmarks.run.store import Store
from benchmarks.show.results import TableResult, collect

TABLE = """
title: Two defenses & a <broken> one
description: For tests.
axes:
  defense:
    none: {}
    noise: {extract: {sigma: 0.1}}
    broken: {extract: {sigma: 9}}
  batch size: {extract.batch-size: [1, 4]}
repeats:
  extract.seed: [0, 1]
train: {epochs: 1}
extract: {pretrained: train/model_best.pth.tar}
attack: {checkpoint: "extract/*.tar"}
columns: [psnr, worst psnr, interval psnr, ssim, lpips_alex, attack.details.number]
figures: [bars, heatmap, curves, lines]
published:
  - {where: {defense: none, batch size: 1}, text: 14.2 dB, source: Somebody 2020}
"""
# Without parsers any flag goes: the table must not depend on the real commands.
ANY_FLAG = {name: dataclasses.replace(stage, parser=None) for name, stage in STAGES.items()}


def write_table(folder: Path, text: str = TABLE) -> Path:
    """The table as a file."""
    file = folder / "example.yaml"
    file.write_text(text)
    return file


def load(folder: Path, text: str = TABLE, **options: Any) -> Table:
    """The table, expanded."""
    return load_table(write_table(folder, text), stages=ANY_FLAG, **options)


def fill(table: Table, store: Store) -> None:
    """Finish every cell with made-up numbers; what is broken fails."""
    for cell in table.cells():
        if cell.stage == "attack":
            extract = cell.inputs["checkpoint"].cell
            sigma = extract.config.get("sigma", 0)
            if sigma != 9:
                store.finish(cell, attack_record(20.0 - 50 * sigma + extract.config["seed"]))
        elif cell.config.get("sigma") == 9:
            store.fail(cell, "exit status 1: error: out of <memory>")
        else:
            store.finish(cell, {"seconds": 1.5, "provenance": {"versions": {"torch": "2"}}})


def attack_record(psnr: float) -> dict[str, Any]:
    """What the attack command writes, with two images around `psnr`."""
    images = [
        {"index": i, "psnr": psnr + i, "ssim": (psnr + i) / 40, "mse": 0.01, "lpips_alex": None}
        for i in (0, 1)
    ]
    baseline = {"psnr": {"mean": 12.5, "std": 1.0}, "ssim": {"mean": 0.1, "std": 0.0}}
    return {
        "seconds": 3.0,
        "details": {"number": 7},
        "trace": [{"iteration": i, "objective": 1 / (i + 1), "psnr": psnr - 9 + i} for i in (0, 9)],
        "evaluation": {
            "per_image": images,
            "baselines": {"flat colour": baseline},
            "missing": {"lpips_alex": "no weights"},
        },
    }


def example(folder: Path) -> tuple[TableResult, Store]:
    """The filled table and its store."""
    store = Store(folder / "store")
    table = load(folder)
    fill(table, store)
    return collect(table, store), store
