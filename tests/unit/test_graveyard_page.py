"""The page on published defenses: who breaks them, or how long they were attacked in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import graveyard
from benchmarks.declare.measured_utility import Utility
from benchmarks.declare.tables import find_table, load_table
from benchmarks.graveyard import DIFFERENCES, Line, best_guess, lines_of, page_of
from core.errors import InputError

WORDS = {"none": "", "CENSOR": "censor:20", "ATS": "ats"}


def values(psnr: tuple[float, float, float], cpu: float | None, wall: float) -> dict[str, Any]:
    mean, low, high = psnr
    spent = None if cpu is None else {"mean": cpu, "n": 8, "low": None, "high": None}
    return {
        "psnr": {"mean": mean, "low": low, "high": high, "n": 16},
        "cpu seconds": spent,
        "seconds": {"mean": wall, "n": 8, "low": None, "high": None},
        "defended accuracy": {"mean": 61.25, "n": 3, "low": 58.0, "high": 64.0},
    }


def stored() -> dict[str, Any]:
    """A small table: CENSOR stands, ATS falls to the one who is told."""
    cells = {
        ("untold", "none"): values((30.0, 27.0, 33.0), 10, 20),
        ("told", "none"): values((30.0, 27.0, 33.0), 10, 20),
        ("untold", "CENSOR"): values((11.0, 10.0, 12.0), 90, 200),
        # Above the guess in the mean, but not with the whole interval.
        ("told", "CENSOR"): values((18.5, 17.0, 20.0), None, 360),
        ("untold", "ATS"): values((13.0, 12.0, 14.0), 10, 20),
        ("told", "ATS"): values((21.0, 19.0, 23.0), 10, 20),
    }
    guesses = {"flat colour": 18.0, "mean image": 13.0}
    return {
        "preset": "embedded",
        "rows": [
            {"labels": {"attacker": attacker, "defense": defense}, "values": found}
            for (attacker, defense), found in cells.items()
        ],
        "baselines": {name: {"psnr": {"mean": mean, "n": 16}} for name, mean in guesses.items()},
    }


def test_a_defense_that_stands_says_how_long_it_was_attacked() -> None:
    _, censor, _ = lines_of(stored(), WORDS)
    # Eight attacks of 90 s of a processor, and eight of 360 s of which only the clock is known.
    assert censor.seconds == 8 * (90 + 360)
    assert censor.verdict(best_guess(stored())) == (
        "not broken in 1 CPU-hour by `spectral`, not told and `spectral`, told"
    )


def test_a_defense_is_broken_where_the_whole_interval_is_above_the_best_guess() -> None:
    plain, censor, ats = lines_of(stored(), WORDS)
    assert best_guess(stored()) == 18.0
    assert ats.breakers(18.0) == ["told"]
    assert ats.verdict(18.0) == "broken, only by who is told"
    assert censor.breakers(16.9) == ["told"]
    assert plain.breakers(18.0) == ["untold", "told"]
    both = Line("x", "ats", {"paper's": (20.0, 19.0, 21.0), "told": (20.0, 19.0, 21.0)}, 1.0, None)
    assert both.verdict(18.0) == "broken by Inverting Gradients and `spectral`, told"


def test_the_page_shows_the_record(tmp_path: Path) -> None:
    (tmp_path / "graveyard.json").write_text(json.dumps(stored()))
    page = page_of(tmp_path)
    assert "the best guess reaches 18.00. Of 2 defenses\n1 are broken and 1 stand." in page
    (line,) = [line for line in page.splitlines() if line.startswith("| [CENSOR](")]
    assert line == (
        "| [CENSOR](generated/defenses/censor.md) | 11.00 (10.00 to 12.00) | "
        "18.50 (17.00 to 20.00) | 61.2 | "
        "not broken in 1 CPU-hour by `spectral`, not told and `spectral`, told |"
    )
    assert "| none | 30.00 (27.00 to 33.00) |" in page


def test_without_a_record_the_page_says_how_to_make_one(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "not among the committed records yet" in page
    assert "[`refiner`](generated/defenses/refiner.md)" in page
    assert "3.73 dB" in page


def test_every_defense_of_the_table_has_an_explanation() -> None:
    table = load_table(find_table("graveyard"), "embedded")
    words = {
        cell.config.get("defense", "").split(":")[0]
        for cell in table.cells()
        if cell.stage == "extract"
    }
    assert words - {""} == set(DIFFERENCES)
    assert "cpu seconds" in table.columns


def test_a_defense_that_the_table_does_not_declare_is_named() -> None:
    with pytest.raises(InputError, match="ATS is not among the declared"):
        lines_of(stored(), {"none": "", "CENSOR": "censor:20"})


def test_a_defense_too_dear_to_train_under_shows_what_was_trained_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graveyard, "utility_of", lambda word: Utility(44.04, 40.0, 48.0, 3))
    table = stored()
    for row in table["rows"]:
        row["labels"]["defense"] = row["labels"]["defense"].replace("CENSOR", "DCS-2")
        row["values"]["defended accuracy"] = None
    (tmp_path / "graveyard.json").write_text(json.dumps(table))
    page = page_of(tmp_path)
    (line,) = [line for line in page.splitlines() if line.startswith("| [DCS-2](")]
    assert "| 44.0 (`dcs2:50`) |" in line
    (line,) = [line for line in page.splitlines() if line.startswith("| [ATS](")]
    assert "| – |" in line
