"""Recovered sentences and records beside the true ones: what is marked, how much, and where not."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import gradinvbench as gib
from attack.metrics import evaluate, evaluate_text
from attack.record import AttackRecord, read_record
from attack.recovered import (
    MAX_CELL,
    MAX_COLUMNS,
    MAX_TOKENS,
    SHOWN,
    Recovered,
    recovered_records,
    recovered_sentences,
)
from audit.record import AuditRecord
from audit.show.store import record_of
from benchmarks.run.committed import compact_records
from benchmarks.show.report import to_html
from core.data.columns import Columns
from core.data.specs import DataSpec
from core.errors import InputError
from core.target import Truth
from federated.gate.allowed import NotAllowedError, scores
from tests.audit_records import bare
from tests.audit_records import example as audited
from tests.example_results import example
from tests.unit.test_audit_show import plain
from tests.unit.test_text import Writer, shared


class Cells(HTMLParser):
    """The cells of a page's tables, with the texts in them that are marked."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.marked: list[str] = []
        self.tags: set[str] = set()
        self._in: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self._in.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if "td" in self._in or "th" in self._in:
            self.rows[-1][-1] += text
        if "mark" in self._in:
            self.marked.append(text)


def of_records(frame: pandas.DataFrame, n: int, wrong: int) -> tuple[Recovered, pandas.DataFrame]:
    """The first n records of a frame, beside themselves with some numbers moved."""
    columns = Columns.infer(frame)
    true = columns.encode(frame)[:n]
    found = true.clone()
    found[:wrong, 0] += 1
    evaluation = evaluate(found, None, Truth(true, torch.zeros(n), columns=columns))
    ordered = found[evaluation.order]
    return recovered_records(columns, true, ordered, evaluation), columns.decode(ordered)


def frame(n: int = 12) -> pandas.DataFrame:
    rng = np.random.default_rng(0)
    words = {"word": rng.choice(["a", "b", "c"], n)}
    return pandas.DataFrame({"age": rng.normal(60, 9, n), **words, "dose": rng.normal(0, 1, n)})


def test_records_stand_under_the_true_ones_and_wrong_cells_are_marked() -> None:
    given = frame()
    shown, found = of_records(given, 10, wrong=3)
    assert Recovered.from_record(json.loads(json.dumps(shown.to_record()))) == shown
    cells = Cells(shown.to_html())
    assert cells.rows[0] == ["record", "", "age", "word", "dose"]
    trues, recovered = cells.rows[1 : 2 * SHOWN : 2], cells.rows[2 : 2 * SHOWN + 1 : 2]
    assert [row[3] for row in trues] == given["word"].tolist()[:SHOWN]
    assert [float(row[2]) for row in recovered] == pytest.approx(found["age"][:SHOWN], rel=1e-3)
    # By hand: a standard deviation off in the first three, and .319 is the limit.
    wrong = [f"{age:.4g}" for age in found["age"][:3]]
    assert cells.marked == wrong
    assert cells.rows[-2] == ["", "share right", "0.700", "1.000", "1.000"]
    guesses = [float(cell) for cell in cells.rows[-1][2:]]
    assert all(0 < guess < 1 for guess in guesses)
    assert "The first 8 of 10 records." in shown.to_html()
    assert "marginal guess 0." in shown.to_html()


def test_tokens_that_are_wrong_are_marked() -> None:
    data = DataSpec.of_tokens("words", 4, 5, ["a ", "b ", "c ", "<i>", "e "])
    true = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4]])
    found = torch.tensor([[0, 1, 4, 3], [4, 4, 4, 4]])
    evaluation = evaluate_text(found, None, Truth(true, true), data)
    shown = recovered_sentences(true, found, data, evaluation)
    assert Recovered.from_record(json.loads(json.dumps(shown.to_record()))) == shown
    cells = Cells(shown.to_html())
    assert cells.rows == [["true", "recovered"], ["a b c <i>", "a b e <i>"], ["e e e e "] * 2]
    assert cells.marked == ["e "]
    assert "tokens in place 0.875" in shown.to_html()


def test_what_others_wrote_is_no_html_and_turns_no_line() -> None:
    evil = "</td><script>x</script>\u202e\x1b[2J"
    given = frame().replace({"word": {"a": evil}}).rename(columns={"dose": evil})
    page = of_records(given, 4, wrong=1)[0].to_page(evil, evil)
    cells = Cells(page)
    assert "script" not in cells.tags
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert any("<script>" in cell for row in cells.rows for cell in row)


def test_a_record_keeps_a_bounded_part() -> None:
    rng = np.random.default_rng(0)
    columns = {f"{i}-{'n' * 200}": rng.choice(["a" * 5000, "b" * 5000], 40) for i in range(100)}
    shown, _ = of_records(pandas.DataFrame(columns), 40, wrong=0)
    assert len(json.dumps(shown.to_record())) < 2 * SHOWN * MAX_COLUMNS * (MAX_CELL + 30)
    assert (len(shown.pairs), len(shown.columns)) == (SHOWN, MAX_COLUMNS)
    assert "The first 64 of 100 columns." in shown.to_html()
    ids = torch.zeros(2, 2 * MAX_TOKENS, dtype=torch.long)
    data = DataSpec.of_tokens("words", 2 * MAX_TOKENS, 2, ["w" * 5000, "b"])
    evaluation = evaluate_text(ids, None, Truth(ids, ids), data)
    text = recovered_sentences(ids, ids, data, evaluation)
    assert len(json.dumps(text.to_record())) < 20_000
    assert "The first 256 of 512 tokens." in text.to_html()


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 3},
        {"pairs": [{"true": ["a"], "recovered": [["a"]]}]},
        {"pairs": [{"true": ["a"], "recovered": [["a", 1]]}]},
        {"columns": ["age"]},
        {"scores": [["x", "<b>"]]},
        {"more": 1},
    ],
)
def test_a_broken_record_is_said_to_be_one(change: dict[str, Any], tmp_path: Path) -> None:
    values = {**of_records(frame(), 4, wrong=1)[0].to_record(), **change}
    with pytest.raises(InputError, match="recovered samples in the record"):
        Recovered.from_record(values)
    result, store = example(tmp_path)
    cell = next(c for c in result.table.cells() if c.stage == "attack" and store.is_finished(c))
    store.finish(cell, {"recovered": values})
    assert "recovered samples in the record" in to_html(result, [], store)


def test_a_report_shows_them_and_a_committed_table_keeps_them(tmp_path: Path) -> None:
    shown, _ = of_records(frame(), 4, wrong=1)
    result, store = example(tmp_path)
    cell = next(c for c in result.table.cells() if c.stage == "attack" and store.is_finished(c))
    record = {"recovered": shown.to_record(), "tables": ["long"]}
    store.finish(cell, record)
    assert shown.to_html() in to_html(result, [], store)
    (kept,) = compact_records([(cell, record)]).values()
    again = Recovered.from_record(kept["result"]["recovered"])
    assert again.pairs == shown.pairs


@pytest.mark.parametrize("attack", ["analytic", "dager"])
def test_the_command_writes_them_to_its_record_and_a_page(attack: str, tmp_path: Path) -> None:
    from attack.cli.command import main

    if attack == "dager":
        target, truth = shared(2)
        options = ["--model", "tests.unit.test_text:Writer"]
        gib.save_target(tmp_path / "a.tar", target, truth, builder=options[1])
        assert isinstance(target.build_model(), Writer)
    else:
        target, truth = gib.share(small(), gib.table("diabetes").batch(1))
        options = ["--model", "tests.unit.test_recovered:small"]
        gib.save_target(tmp_path / "a.tar", target, truth, builder=options[1])
    words = ["--attack", attack, "--metric", "--cpu", "--id", "run", "--root", str(tmp_path)]
    assert not main([*words, *options, "--checkpoint", str(tmp_path / "a.tar")])
    record = read_record(tmp_path / "run" / "record.json")
    assert isinstance(record, AttackRecord)
    assert record.recovered is not None
    shown = Recovered.from_record(record.recovered)
    assert all(piece.right for pair in shown.pairs for piece in pair.recovered)
    page = (tmp_path / "run" / "reconstruction.html").read_text()
    assert shown.to_html() in page
    assert not Cells(page).marked


def small() -> torch.nn.Module:
    """Built by the command."""
    return torch.nn.Sequential(torch.nn.Linear(11, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


# -- What leaves a site ---------------------------------------------------------------------------


def test_no_record_of_an_audit_has_a_place_for_them() -> None:
    values = of_records(frame(), 4, wrong=1)[0].to_record()
    assert record_of(plain(bare())) == bare()
    with pytest.raises(InputError, match="field recovered is unknown"):
        record_of({**plain(bare()), "recovered": values})
    # In the section of an attack as little as in the whole.
    whole = plain(audited())
    whole["attacks"][0]["recovered"] = values
    with pytest.raises(InputError, match=r"field attacks\[0\]\.recovered is unknown"):
        record_of(whole)
    assert "recovered" not in {field.name for field in dataclasses.fields(AuditRecord)}


@pytest.mark.parametrize("part", ["pairs", "columns", "scores", None])
def test_no_gate_lets_them_pass(part: str | None) -> None:
    values = of_records(frame(), 4, wrong=1)[0].to_record()
    with pytest.raises(NotAllowedError, match="is not one number"):
        scores({"recovered": values if part is None else values[part]}, "metrics")
