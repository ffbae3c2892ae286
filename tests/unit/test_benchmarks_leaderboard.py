"""The leaderboard: what is ranked, what is shown apart, and how an entry comes about."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command import main
from benchmarks.declare.columns import find_column
from benchmarks.declare.records import Run
from benchmarks.leaderboard.entry import read_entry
from benchmarks.leaderboard.measure import About
from benchmarks.leaderboard.plan import Plan
from benchmarks.leaderboard.protocol import read_protocol
from benchmarks.run.store import Store
from benchmarks.show.leaderboard import (
    FOLDER,
    HEADER,
    NO_BETTER,
    UNRANKED_HEADER,
    load_board,
    load_entry,
    other_tables,
    show,
)
from benchmarks.show.table_entries import check_entry, make_entry, threat_model
from benchmarks.submission import (
    Defended,
    Desk,
    Measurement,
    ensemble_table,
    own_entries,
    submit_measured,
    submit_own,
)
from core.errors import InputError
from core.storage import write_json
from gradients.defenses.base import defense_class, defense_names
from tests.board_entries import SMALL, leak, spread
from tests.board_entries import entry as measured
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


def test_table_entries_are_listed_by_worst_leakage_without_a_rank(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    entries = [
        with_leakage(entry, "leaky", 0.9),
        with_leakage(entry, "useless", 0.2, utility=10.0),
        with_leakage(entry, "useful", 0.2, utility=90.0),
        with_leakage(entry, "other rules", 0.1, threat_model="labels known"),
    ]
    for number, each in enumerate(entries):
        write_json(tmp_path / f"{number}.json", each)
    first, second = other_tables(load_board(tmp_path, SMALL))
    assert [row[0] for row in first.rows] == ["useful", "useless", "leaky"]
    assert [row[0] for row in second.rows] == ["other rules"]
    assert first.title.startswith("Unranked")
    assert "rank" not in first.header


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


def test_the_command_renders_markdown_html_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.show.leaderboard.read_protocol", lambda: SMALL)
    entries = tmp_path / "entries"
    measured("A <b>", spread(0.8), accuracies=(50.0, 50.0)).write(entries / "a.json")
    measured("B", spread(0.4), accuracies=(80.0, 80.0)).write(entries / "b.json")
    assert main(["leaderboard", "--entries", str(entries), "--min-utility", "60"]) == 0
    assert "A <b>" not in capsys.readouterr().out
    assert main(["leaderboard", "--entries", str(entries)]) == 0
    assert "2 entries" in capsys.readouterr().out
    markdown = (entries / "leaderboard.md").read_text()
    assert markdown.index("| 1 | B |") < markdown.index("| 2 | A &lt;b> |")
    assert "(leaderboard.png)" in markdown
    assert (entries / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    html = (entries / "leaderboard.html").read_text()
    assert "A &lt;b&gt;" in html
    assert "A <b>" not in html
    assert "data:image/png" in html


def test_only_entries_of_one_protocol_and_attacker_are_ranked_together(
    entry: dict[str, Any], tmp_path: Path
) -> None:
    measured("mine", spread(0.4)).write(tmp_path / "a.json")
    measured("other attacker", spread(0.1), threat="eavesdropper-no-labels").write(
        tmp_path / "b.json"
    )
    measured("old", spread(0.1), protocol=dataclasses.replace(SMALL, name="Small-v0")).write(
        tmp_path / "c.json"
    )
    write_json(tmp_path / "d.json", entry)
    board = load_board(tmp_path, SMALL)
    assert {t: [e.defense for e in found] for t, found in board.measured.items()} == {
        "eavesdropper-no-labels": ["other attacker"],
        "honest-server": ["mine"],
    }
    assert [e.defense for e in board.others["Small-v0"]] == ["old"]
    assert board.size == 4
    said = show(tmp_path, tmp_path / "out", protocol=SMALL)
    assert "Small-v0: another protocol, not ranked" in said
    assert "honest-server (C)" in said
    assert (tmp_path / "out" / "leaderboard-eavesdropper-no-labels.png").exists()


def test_an_entry_of_other_values_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(SMALL, evaluations=1)
    measured("cheap", spread(0.1), protocol=other).write(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"a\.json: was measured by other values"):
        load_board(tmp_path, SMALL)


def test_settings_where_a_guess_does_as_well_are_marked(tmp_path: Path) -> None:
    first, second = (setting.name for setting in SMALL.settings)
    leaks = {first: leak([0.1] * 10), second: leak([0.9] * 10)}
    measured("mixed", spread(0.5), leaks=leaks).write(tmp_path / "a.json")
    show(tmp_path, tmp_path, protocol=SMALL)
    markdown = (tmp_path / "leaderboard.md").read_text()
    assert f"| mixed | 0.100{NO_BETTER} | 0.900 |" in markdown


def test_an_empty_folder_is_an_error_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", "--entries", str(tmp_path)]) == 2
    assert "--entries: there are no .json files" in capsys.readouterr().err


def test_the_committed_entries_are_of_the_projects_list() -> None:
    board = load_board(FOLDER, read_protocol())
    assert board.size
    listed = {m.about.defense for m in own_entries()}
    found = [entry for group in board.measured.values() for entry in group]
    assert {entry.defense for entry in found} <= listed


def filled(plan: Plan, store: Store, ssim: float) -> None:
    """Finish every cell of a plan with made-up numbers."""
    for cell in plan.trainings:
        accuracy = 60.0 + cell.config["seed"]
        record = {"final_val_acc1": accuracy, "privacy": None, "federation": {"epsilon": 2.5}}
        store.finish(cell, {**record, "seconds": 1.0, "provenance": {}})
    image = {"psnr": 20.0, "ssim": ssim, "identified": True, "label": False, "strongest": "dlg"}
    for cell in (cell for cells in plan.pieces.values() for cell in cells):
        images = [image] * cell.config["count"]
        store.finish(cell, {"images": images, "seconds": 2.0, "provenance": {"seed": 0}})
    for cell in plan.victims.values():
        store.finish(cell, {})


def test_what_was_computed_before_makes_the_entry(tmp_path: Path) -> None:
    said: list[str] = []
    desk = Desk(tmp_path / "store", tmp_path / "entries", jobs=1, protocol=SMALL, say=said.append)
    mine = Measurement(About("My noise", "Noise.", "here"), "gaussian:0.5", threat="C")
    plan = mine.plan(SMALL)
    filled(plan, Store((tmp_path / "store").resolve()), ssim=0.25)
    path = submit_measured(mine, desk)
    assert said == []
    entry = read_entry(path)
    assert path.name == "my-noise.json"
    assert (entry.apply, entry.threat, entry.epsilon) == ("gaussian:0.5", "honest-server", 2.5)
    assert [*entry.accuracies] == [60.0, 61.0]
    assert [*entry.leaks["lenet, initial, batch 2"].ssim] == [0.25] * 10
    # Two trainings of a second, and a piece of two seconds for each batch size.
    assert entry.seconds == 6.0
    assert path.parent == tmp_path / "entries"


def test_a_plan_covers_every_image_of_every_setting_once() -> None:
    plan = Measurement(About("x"), "none").plan(read_protocol())
    for cells in plan.pieces.values():
        places = [
            i
            for c in cells
            for i in range(c.config["first"], c.config["first"] + c.config["count"])
        ]
        assert places == list(range(32))
    assert all("defense" not in cell.config for cell in plan.cells())
    # The networks that are attacked are the same for every entry.
    other = Measurement(About("y"), "sign", sigma=1.0).plan(read_protocol())
    assert plan.victims == other.victims
    assert {c.config["defense"] for c in other.cells()} == {"sign"}
    assert all(c.config["enable-dp"] for c in other.trainings)
    assert not {c.key for c in plan.cells()} & {c.key for c in other.cells()}


def test_own_entries_that_are_there_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path / "store", tmp_path, jobs=1, quiet=True, protocol=SMALL)
    listed = [Measurement(About(name), "none") for name in ("A", "B", "C")]
    monkeypatch.setattr("benchmarks.submission.own_entries", lambda: listed)
    measured("A", spread(0.5)).write(tmp_path / "a.json")
    # Of another protocol: to be measured anew.
    old = dataclasses.replace(SMALL, evaluations=1)
    measured("B", spread(0.5), protocol=old).write(tmp_path / "b.json")
    filled(listed[1].plan(SMALL), Store((tmp_path / "store").resolve()), ssim=0.25)
    assert [path.name for path in submit_own(desk)] == ["b.json", "c.json"]


def test_the_projects_own_list_can_be_measured() -> None:
    plans = [measurement.plan(read_protocol()) for measurement in own_entries()]
    assert len(plans) >= 15
    assert len({plan.candidate for plan in plans}) == len(plans)
    applied = {word.split(":")[0] for p in plans for word in p.candidate.defense.split(",")}
    # Those of plugins may be registered as well, where other tests were before.
    own = {n for n in defense_names() if defense_class(n).__module__.startswith("gradients.")}
    assert applied >= own


def test_a_submission_without_a_rank_runs_all_attacks_on_the_defense() -> None:
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
        (["--apply", "clip:1", "--threat", "worst-case"], "GradInvBench-v1 has honest-server"),
        (["--apply", "clip:1", "--budget", "9"], "--budget: the protocol decides that"),
        (["--apply", "clip:1", "--utility", "9"], "--utility: the protocol decides that"),
        (["--apply", "clip:1", "--data", "x"], "--data: the protocol decides that"),
        (["--apply", "clip:1", "--sigma", "-1"], "--sigma must not be negative"),
        (["--apply", "clip:1", "--jobs", "0"], "--jobs must be at least 1"),
        (["--apply", "clip:1", "--plugin", "no_such_module"], "--plugin no_such_module"),
        ([], "give --apply NAME:PARAM, --all, or a computed table"),
    ],
)
def test_a_submission_of_nothing_known_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--defense", "Mine", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_entry_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--apply", "clip:1"]) == 2
    assert "give --defense" in capsys.readouterr().err
    assert main(["submit", "--apply", "clip:1", "--defense", "!"]) == 2
    assert "a file name needs a Latin letter or digit" in capsys.readouterr().err


def test_a_computed_table_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, store = example(tmp_path)
    monkeypatch.setattr("benchmarks.submission.load_table", lambda *given: result.table)
    words = ["submit", "mine.yaml", "--store", str(store.root), "--entries", str(tmp_path)]
    words += ["--defense", "My noise", "--utility", "70", "--where"]
    assert main([*words, "defense=noise"]) == 0
    assert "my-noise.json: worst SSIM" in capsys.readouterr().out
    entry = load_entry(tmp_path / "my-noise.json")
    assert isinstance(entry, Mapping)
    assert (entry["defense"], entry["utility"], entry["leakage"]["ssim"]["n"]) == (
        "My noise",
        70,
        4,
    )
    assert main([*words, "defence=noise"]) == 2
    assert "--where defence=noise: expected AXIS=VALUE" in capsys.readouterr().err


def test_a_named_threat_model_is_the_entrys() -> None:
    assert threat_model({"threat": "worst-case", "exact-bn": True}) == "worst-case"
    assert threat_model({"threat": "C"}) == "honest-server"


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
    evil = "a|b\n$\\frac$ <script>alert(1)</script> [x](javascript:alert(1)) \x1b[2J"
    write_json(tmp_path / "evil.json", {**entry, "defense": evil, "reference": evil})
    measured(evil, spread(0.5), description=evil).write(tmp_path / "measured.json")
    said = show(tmp_path, tmp_path, protocol=SMALL)
    assert "\x1b" not in said
    markdown = (tmp_path / "leaderboard.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith(("| 1 ", "| a\\|b"))]
    sizes = [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows]
    assert sizes == [len(HEADER), 1 + len(SMALL.settings), len(UNRANKED_HEADER)]
    html = (tmp_path / "leaderboard.html").read_text()
    for text in (markdown, html):
        assert "<script" not in text
        assert "](javascript:" not in markdown
        assert "\x1b" not in text or text is html
    assert "href" not in html
