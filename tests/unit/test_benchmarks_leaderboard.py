"""The leaderboard ranks by the worst, per threat model, and refuses broken entries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command import main
from benchmarks.declare.columns import find_column
from benchmarks.declare.records import Run
from benchmarks.show.leaderboard import (
    FOLDER,
    HEADER,
    check_entry,
    load_entries,
    make_entry,
    rank,
    show,
    threat_model,
)
from benchmarks.submission import Defended, ensemble_table
from core.errors import InputError
from core.storage import write_json
from tests.example_results import example


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    result, _ = example(tmp_path)
    return make_entry(result.rows[:2], "No defense", "Nothing is done.")


def with_leakage(entry: dict[str, Any], name: str, worst: float, **more: Any) -> dict[str, Any]:
    ssim = {**entry["leakage"]["ssim"], "worst": worst, "mean": worst / 2}
    return {**entry, "defense": name, "leakage": {**entry["leakage"], "ssim": ssim}, **more}


def test_entry_is_of_the_worst_row(tmp_path: Path) -> None:
    result, _ = example(tmp_path)
    # `none` leaks more than `noise`; its largest SSIM is 22/40.
    leakage = make_entry(result.rows[:4], "Both")["leakage"]
    assert leakage["ssim"]["worst"] == pytest.approx(22 / 40)
    assert leakage["ssim"]["n"] == 4
    assert leakage["psnr"]["mean"] == 21


def test_unfinished_rows_make_no_entry(tmp_path: Path) -> None:
    result, _ = example(tmp_path)
    with pytest.raises(InputError, match="the row broken 1 is not finished"):
        make_entry(result.rows[4:], "Broken")


def test_entries_are_ranked_by_worst_leakage_and_then_by_utility(entry: dict[str, Any]) -> None:
    entries = [
        with_leakage(entry, "leaky", 0.9),
        with_leakage(entry, "useless", 0.2, utility=10.0),
        with_leakage(entry, "useful", 0.2, utility=90.0),
        with_leakage(entry, "other rules", 0.1, threat_model="labels known"),
    ]
    first, second = rank(entries)
    assert [row[:2] for row in first.rows] == [["1", "useful"], ["2", "useless"], ["3", "leaky"]]
    assert [row[1] for row in second.rows] == ["other rules"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": 3}, "field defense has the wrong type"),
        ({"utility": "high"}, "field utility has the wrong type"),
        ({"utility": True}, "field utility has the wrong type"),
        ({"schema": 2}, "schema 2 instead of 1"),
        ({"extra": 1}, "unknown field extra"),
        ({"leakage": {}}, "leakage.ssim.n is not a number"),
        (
            {"leakage": {"ssim": {"n": 1, "mean": 0.1, "worst": float("nan")}}},
            "leakage.ssim.worst is not a number",
        ),
        ({"utility": float("inf")}, "utility inf is not a percentage"),
        ({"utility": float("nan")}, "utility nan is not a percentage"),
        ({"utility": -1}, "utility -1 is not a percentage"),
        ({"epsilon": float("nan")}, "epsilon nan is not a finite number"),
        ({"epsilon": -2.0}, "epsilon -2.0 is not a finite number"),
    ],
)
def test_broken_entries_are_refused(
    entry: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    check_entry(entry, "mine")
    with pytest.raises(InputError, match=f"mine: .*{message}"):
        check_entry({**entry, **change}, "mine")


def test_a_missing_field_is_named(entry: dict[str, Any]) -> None:
    del entry["attack"]
    with pytest.raises(InputError, match="the field attack is missing"):
        check_entry(entry, "mine")


def test_threat_model_says_what_is_granted() -> None:
    assert "labels known; batch statistics unknown" in threat_model({"pseudo-label-init": "known"})
    assert "labels unknown; batch statistics known" in threat_model({"exact-bn": True})


def test_the_command_renders_markdown_and_html(
    tmp_path: Path, entry: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    entries = tmp_path / "entries"
    entries.mkdir()
    (entries / "a.json").write_text(json.dumps(with_leakage(entry, "A <b>", 0.5, utility=50.0)))
    (entries / "b.json").write_text(json.dumps(with_leakage(entry, "B", 0.4, utility=80.0)))
    assert main(["leaderboard", "--entries", str(entries), "--min-utility", "60"]) == 0
    assert "A <b>" not in capsys.readouterr().out
    assert main(["leaderboard", "--entries", str(entries)]) == 0
    markdown = (entries / "leaderboard.md").read_text()
    assert markdown.index("| 1 | B |") < markdown.index("| 2 | A &lt;b> |")
    html = (entries / "leaderboard.html").read_text()
    assert "A &lt;b&gt;" in html
    assert "A <b>" not in html


def test_an_empty_folder_is_an_error_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", "--entries", str(tmp_path)]) == 2
    assert "--entries: there are no .json files" in capsys.readouterr().err


@pytest.mark.skipif(not any(FOLDER.glob("*.json")), reason="no entries are committed")
def test_the_committed_entries_follow_the_schema() -> None:
    assert load_entries(FOLDER)


def test_a_submission_runs_all_attacks_on_the_defense() -> None:
    (row,) = ensemble_table("Mine", Defended("clip:2", budget=50)).rows
    assert {run["extract"].config["defense"] for run in row.repeats} == {"clip:2"}
    attack = row.repeats[0]["attack"].config
    assert attack["attack"] == "auto"
    assert (attack["threat"], attack["epochs"]) == ("honest-server", 50)
    (plain,) = ensemble_table("Mine", Defended("none")).rows
    assert "defense" not in plain.repeats[0]["extract"].config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--apply", "nothing:1"], "unknown defense"),
        (["--apply", "clip:1", "--threat", "nobody"], "--threat nobody"),
        ([], "give --apply NAME:PARAM, or a computed table"),
    ],
)
def test_a_submission_of_nothing_known_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--defense", "Mine", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_computed_table_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, store = example(tmp_path)
    monkeypatch.setattr("benchmarks.submission.load_table", lambda *given: result.table)
    words = ["submit", "mine.yaml", "--store", str(store.root), "--entries", str(tmp_path)]
    words += ["--defense", "My noise", "--utility", "70", "--where"]
    assert main([*words, "defense=noise"]) == 0
    assert "my-noise.json: worst SSIM" in capsys.readouterr().out
    (entry,) = load_entries(tmp_path)
    assert (entry["defense"], entry["utility"], entry["leakage"]["ssim"]["n"]) == (
        "My noise",
        70,
        4,
    )
    assert main([*words, "defence=noise"]) == 2
    assert "--where defence=noise: expected AXIS=VALUE" in capsys.readouterr().err


def test_a_named_threat_model_is_the_entrys() -> None:
    assert threat_model({"threat": "worst-case", "exact-bn": True}) == "worst-case"


def test_columns_tell_the_choice_from_the_worst_case() -> None:
    worst = {"index": 0, "psnr": 30.0, "psnr_attack": "dlg", "ssim": 0.9, "ssim_attack": "spear"}
    record = {
        "threat": {"name": "honest-server"},
        "details": {"chosen": "spectral"},
        "worst_case": {"per_image": [worst]},
        "evaluation": {"per_image": [{"psnr": 20.0}]},
        "label_rules": {"yin": {"accuracy": None, "reason": "labels repeat"}},
    }
    run = Run({"attack": record})
    assert find_column("psnr").values(run) == [20.0]
    assert find_column("worst-case psnr").values(run) == [30.0]
    texts = ("threat", "chosen attack", "strongest attack")
    columns = [find_column(name) for name in texts]
    assert [c.text(run) for c in columns if c.text] == ["honest-server", "spectral", "spear"]
    assert find_column("labels by yin").note(run) == "labels repeat"


@pytest.mark.parametrize(
    ("metric", "change", "message"),
    [
        ("ssim", {"worst": 1.5}, "ssim.worst is 1.5: must lie between -0.1 and 1"),
        ("ssim", {"mean": -0.5}, "ssim.mean is -0.5: must lie between"),
        ("ssim", {"mean": 0.6, "worst": 0.5}, "ssim: the worst image, 0.5, gives away less"),
        ("psnr", {"mean": 20.0, "worst": 19.0}, "psnr: the worst image"),
        ("mse", {"mean": 0.1, "worst": 0.2}, "mse: the worst image"),
        ("mse", {"mean": -0.1}, "mse.mean is -0.1: must lie between 0 and inf"),
        ("ssim", {"n": 2.5}, "ssim.n is 2.5: images are counted by whole numbers"),
        ("ssim", {"n": 0}, "ssim.n is 0"),
        ("ssim", {"n": 10**400}, "ssim.n is not a number"),
    ],
)
def test_impossible_leakage_is_refused(
    metric: str, change: dict[str, float], message: str, entry: dict[str, Any]
) -> None:
    check_entry(entry, "entry")
    changed = {**entry["leakage"], metric: {**entry["leakage"][metric], **change}}
    with pytest.raises(InputError, match=message):
        check_entry({**entry, "leakage": changed}, "entry")


def test_what_others_wrote_in_an_entry_stays_text(entry: dict[str, Any], tmp_path: Path) -> None:
    evil = "a|b\n<script>alert(1)</script> [x](javascript:alert(1)) \x1b[2J"
    write_json(tmp_path / "evil.json", {**entry, "defense": evil, "reference": evil})
    said = show(tmp_path, tmp_path)
    assert "\x1b" not in said
    markdown = (tmp_path / "leaderboard.md").read_text()
    (row,) = [line for line in markdown.splitlines() if line.startswith("| 1 ")]
    assert len(re.findall(r"(?<!\\)\|", row)) == len(HEADER) + 1
    html = (tmp_path / "leaderboard.html").read_text()
    for text in (markdown, html):
        assert "<script" not in text
        assert "](javascript:" not in markdown
        assert "\x1b" not in text or text is html
    assert "href" not in html
