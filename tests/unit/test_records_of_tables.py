"""Tables: columns and their encoding, what is read, how records are counted right."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attack.metrics import evaluate
from attack.metrics.records import (
    assign_records,
    calibration,
    comparison,
    confidence_bins,
    right_cells,
)
from core.data.columns import Columns
from core.data.records import load_table
from core.errors import InputError
from core.target import Truth

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=5)
ROWS = st.integers(2, 12)


@st.composite
def frames(draw: st.DrawFn) -> pandas.DataFrame:
    n = draw(ROWS)

    def cells(kind: st.SearchStrategy[object]) -> list[object]:
        return draw(st.lists(kind, min_size=n, max_size=n))

    return pandas.DataFrame(
        {
            "word": cells(WORDS),
            "level": cells(st.integers(-5, 5)),
            "number": cells(st.integers(-9999, 9999).map(lambda x: x / 8)),
        }
    )


@settings(max_examples=30, deadline=None)
@given(frames())
def test_what_is_decoded_is_what_was_encoded(frame: pandas.DataFrame) -> None:
    kinds = {"word": "categorical", "level": "ordinal", "number": "continuous"}
    columns = Columns.infer(frame, kinds)
    features = columns.encode(frame)
    decoded = columns.decode(features)
    assert decoded["word"].tolist() == frame["word"].tolist()
    assert decoded["level"].tolist() == frame["level"].tolist()
    assert np.allclose(decoded["number"], frame["number"], atol=1e-2, rtol=1e-5)
    assert torch.allclose(columns.project(features), features, atol=1e-6)
    assert right_cells(columns, columns.project(features), features, 1e-4).all()
    assert Columns.from_list(json.loads(json.dumps(columns.to_list()))) == columns


def test_kinds_are_inferred_and_a_file_beside_the_table_has_the_last_word(tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {
            "age": [30.5, 41.25, 52.0, 63.0],
            "stage": [1, 2, 3, 4],
            "sex": ["f", "m", "f", "m"],
            "ill": ["yes", "no", "no", "yes"],
        }
    )
    path = tmp_path / "patients.csv"
    frame.to_csv(path, index=False)
    table = load_table(path)
    assert [c.kind for c in table.columns.columns] == ["continuous", "ordinal", "categorical"]
    assert table.class_names == ("no", "yes")
    assert (
        table.to_frame()
        .astype(str)
        .equals(frame[["age", "stage", "sex"]].astype({"stage": float}).astype(str))
    )
    beside = tmp_path / "patients.columns.json"
    beside.write_text(json.dumps({"target": "sex", "columns": {"stage": "categorical"}}))
    table = load_table(path)
    assert table.class_names == ("f", "m")
    kinds = {c.name: c.kind for c in table.columns.columns}
    assert kinds == {"age": "continuous", "stage": "categorical", "ill": "categorical"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as CSV"),
        (b"a,b\n\xff\xfe,1\n", "cannot be read as CSV"),
        (b"a,b\n1,2\n", "1 records"),
        (b"a\n1\n2\n", "1 columns"),
        (b"a,b\n1,x\n,y\n3,x\n", "column a: 1 cells are empty"),
        (b"a,b\n1,x\n2,x\n3,x\n", "has 1 values"),
        (b"a,b\n1,x\ninf,y\n2.5,x\n", "not finite"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as refused:
        load_table(path)
    assert "--data" in str(refused.value)
    assert "\n" not in str(refused.value)


def rows_of(cell: Callable[[int], str], header: str = "age,x,ill") -> str:
    """Sixty records with one column made by a function."""
    lines = [f"{i},{cell(i)},{('no', 'yes')[i % 2]}" for i in range(60)]
    return "\n".join([header, *lines])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (rows_of(lambda i: "?" if i == 3 else str(i / 4)), r"column x: '\?' stands among numbers"),
        (rows_of(lambda i: f'"{i},000"'), "column x: '0,000' has a comma"),
        (rows_of(lambda i: f"{i // 3 + 1}.05.2024"), "column x: '1.05.2024' is a date"),
        (rows_of(lambda i: f"20{10 + i // 4}-05-31 10:00"), "column x: '2010-05-31 10:00' is a"),
        (rows_of(lambda i: f"P{i:03d}"), "every record has a category of its own, such as 'P000'"),
        (rows_of(lambda i: "1").replace(",", ";"), "has semicolons between its columns"),
        (rows_of(lambda i: "1").replace(",", "\t"), "has tabs between its columns"),
        (rows_of(lambda i: "1", ",x,ill"), "its column 1 has no name"),
        (rows_of(lambda i: "1", "x,x,ill"), "two columns named 'x'"),
        (rows_of(lambda i: "1", "41,2.5,yes"), r"holds numbers \(41, 2.5, yes\)"),
        (rows_of(lambda i: "ä").encode("latin-1"), "it is not in UTF-8"),
    ],
)
def test_what_is_probably_meant_otherwise_is_said(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    path = tmp_path / "patients.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as refused:
        load_table(path)
    assert "\n" not in str(refused.value)
    if "or describe the column as categorical" in str(refused.value):
        (tmp_path / "patients.columns.json").write_text('{"columns": {"x": "categorical"}}')
        assert load_table(path).columns.columns[1].kind == "categorical"


def test_few_words_among_numbers_and_huge_whole_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text(rows_of(lambda i: ("0", "1", "2", "more")[i % 4]))
    assert load_table(path).columns.columns[1].kind == "categorical"
    path.write_text(rows_of(lambda i: str(10**25 + 10**24 * i)))
    assert load_table(path).columns.columns[1].kind == "continuous"


@pytest.mark.parametrize("cell", ["w", "7.5"])
def test_a_column_that_says_nothing_is_named(
    cell: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "patients.csv"
    path.write_text(rows_of(lambda i: cell))
    table = load_table(path)
    assert "patients: every cell of the column x is the same" in caplog.text
    caplog.clear()
    # By the scales of a model a site's own records may well be all alike.
    load_table(path, trained=table.spec)
    assert not caplog.text


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"colums": {}}, "must be"),
        ({"target": "dead"}, "is about a column 'dead', which .* lacks"),
        ({"columns": {"agee": "ordinal"}}, "is about a column 'agee'"),
        ({"columns": {"age": "number"}}, "'number' is no kind"),
        ({"columns": []}, "must be"),
    ],
)
def test_a_description_of_something_else_is_refused(
    description: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "patients.csv"
    path.write_text(rows_of(str))
    (tmp_path / "patients.columns.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=said):
        load_table(path)
    # A kind of the column to predict says nothing and does no harm.
    (tmp_path / "patients.columns.json").write_text('{"columns": {"ill": "categorical"}}')
    assert load_table(path).class_names == ("no", "yes")


def columns_of_three() -> Columns:
    frame = pandas.DataFrame(
        {"x": [0.0, 1.0, 2.5, 4.0], "level": [1, 2, 3, 3], "word": ["a", "b", "a", "c"]}
    )
    return Columns.infer(frame, {"level": "ordinal"})


def test_cells_are_counted_as_by_hand() -> None:
    columns = columns_of_three()
    # Features: x and level in standard deviations, then the words a, b and c.
    truth = torch.tensor([[0.0, 0.0, 1, 0, 0], [1.0, 0.0, 0, 1, 0]])
    found = torch.tensor([[0.3, 0.1, 0.5, 0.3, 0.2], [1.33, 9.0, 0.4, 0.3, 0.3]])
    # By hand: .3 is within .319 and .33 is not; 0 and .1 are nearest to level 2, 9 to level 3; the
    # largest of (.5 .3 .2) is a, that of (.4 .3 .3) is a and not b.
    expected = [[True, True, True], [False, False, False]]
    assert right_cells(columns, found, truth).tolist() == expected
    evaluation = evaluate(found, None, Truth(truth, torch.zeros(2), columns=columns))
    assert [row["record_accuracy"] for row in evaluation.per_image] == [1.0, 0.0]
    assert evaluation.columns["word"]["accuracy"] == 0.5
    assert 0 < evaluation.baselines["marginal guess"]["record_accuracy"]["mean"] < 1
    shown = comparison(columns, found, truth)
    assert shown.iloc[3].tolist()[-1] == "a *"
    assert shown.iloc[1].tolist()[-1] == "a"


def test_records_are_assigned_as_by_trying_every_order() -> None:
    columns = columns_of_three()
    truth, found = columns.sample(5, seed=1), columns.sample(5, seed=2)
    right = [
        int(right_cells(columns, found[list(order)], truth).sum())
        for order in itertools.permutations(range(5))
    ]
    chosen = assign_records(columns, found, truth)
    assert int(right_cells(columns, found[chosen], truth).sum()) == max(right)


def test_confidence_is_held_against_correctness() -> None:
    columns = columns_of_three()
    truth = columns.sample(4, seed=3)
    found = truth.clone()
    found[2:, 0] += 5
    sure = right_cells(columns, found, truth).double()
    assert calibration(columns, found, truth, sure)["right cells surer than wrong ones"] == 1
    assert calibration(columns, found, truth, -sure)["right cells surer than wrong ones"] == 0


def test_cells_are_counted_by_confidence_as_one_by_one() -> None:
    columns = columns_of_three()
    truth, found = columns.sample(40, seed=3), columns.sample(40, seed=4)
    sure = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    sure[0, 0] = 1.0
    right = right_cells(columns, found, truth)
    counted: dict[int, list[float]] = {}
    for i, j in itertools.product(range(40), range(3)):
        place = min(9, int(float(sure[i, j]) * 10))
        entry = counted.setdefault(place, [0, 0.0, 0])
        entry[0] += 1
        entry[1] += float(sure[i, j])
        entry[2] += bool(right[i, j])
    bins = confidence_bins(columns, found, truth, sure)
    assert {b["bin"]: [b["cells"], pytest.approx(b["confidence"]), b["right"]] for b in bins} == {
        place: [cells, pytest.approx(total), met] for place, (cells, total, met) in counted.items()
    }
