"""The page on what was tried in the attack: which changes help, and which do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation import UNCHANGED, page_of
from benchmarks.declare.tables import find_table, load_table

KINDS = ("one", "four")
CHANGES = {
    "no race": ((-2.0, -3.0, -1.0), (0.5, -0.5, 1.5)),
    "signs": ((-1.0, -1.5, -0.5), (1.0, 0.5, 1.5)),
    "more starts": ((0.5, 0.25, 0.75), (0.0, -1.0, 1.0)),
    "noise": ((0.1, -0.2, 0.4), (0.1, -0.2, 0.4)),
}


def row(variant: str, kind: str, change: tuple[float, ...] | None, cpu: float) -> dict[str, Any]:
    values = {"psnr": {"mean": 20.0}, "attack.details.cpu_seconds": {"mean": cpu}}
    found: dict[str, Any] = {"labels": {"variant": variant, "kind": kind}, "values": values}
    if change is not None:
        found["changes"] = {"psnr": dict(zip(("mean", "low", "high"), change, strict=True))}
    return found


@pytest.fixture
def page(tmp_path: Path) -> str:
    rows = [row(UNCHANGED, kind, None, 2.0) for kind in KINDS]
    for variant, changes in CHANGES.items():
        cpu = 6.0 if variant == "more starts" else 2.0
        rows += [row(variant, k, c, cpu) for k, c in zip(KINDS, changes, strict=True)]
    (tmp_path / "ablation.json").write_text(json.dumps({"rows": rows}))
    return page_of(tmp_path)


def test_every_change_stands_with_its_interval_and_its_time(page: str) -> None:
    assert "| *as it is* | 20.00 | 20.00 | 1 |" in page
    assert "| no race | **-2.00 (-3.00 to -1.00)** | +0.50 (-0.50 to +1.50) | 1.0 |" in page
    assert "| more starts | **+0.50 (+0.25 to +0.75)** | +0.00 (-1.00 to +1.00) | 3.0 |" in page


def test_the_page_says_who_helps(page: str) -> None:
    assert "worse on some kinds of targets and better on none: no race." in page
    assert "better on some and worse on none: more starts." in page
    assert "better on some and worse on others: signs." in page
    assert "level on all: noise." in page


def test_without_a_record_it_says_how_to_make_one(tmp_path: Path) -> None:
    assert "`python -m benchmarks ablation`\ncomputes it" in page_of(tmp_path)


def test_the_table_changes_one_thing_per_row() -> None:
    table = load_table(find_table("ablation"), "embedded")
    variants = {r.labels["variant"]: r for r in table.rows if r.labels["kind"] == "one, initial"}
    unchanged = variants.pop(UNCHANGED).repeats[0]["attack"].config
    for name, changed in variants.items():
        config = changed.repeats[0]["attack"].config
        differing = {
            flag for flag in {*config, *unchanged} if config.get(flag) != unchanged.get(flag)
        }
        assert 1 <= len(differing) <= 3, name
        # The same targets and starts as the attack as it is.
        assert [r["attack"].config["seed"] for r in changed.repeats] == [0, 1, 2] * 8
