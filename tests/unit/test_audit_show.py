"""What stores and shows an audit: the file, the page, the HTML, the protocol's report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from audit.record import AuditRecord
from audit.show.page import page_of
from audit.show.sections import GLOSSARY, sections_of
from audit.show.store import FILE, read_audit, record_of, write_audit
from core.errors import InputError
from core.storage import write_json
from tests.audit_records import VERDICTS, bare, example

RECORDS = [*map(example, VERDICTS), *map(bare, VERDICTS)]


def plain(record: AuditRecord) -> dict[str, Any]:
    """What `audit.json` holds, without its checksum."""
    return json.loads(json.dumps({"kind": "audit", **dataclasses.asdict(record)}))


def changed(values: Any, path: str, value: Any) -> Any:
    """Plain values with the one at a path ("power.0.found") replaced."""
    key, _, rest = path.partition(".")
    copy = list(values) if isinstance(values, list) else dict(values)
    place: Any = int(key) if isinstance(copy, list) else key
    copy[place] = changed(copy[place], rest, value) if rest else value
    return copy


# -- The file -----------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_is_read_as_it_was_written(record: AuditRecord, tmp_path: Path) -> None:
    path = write_audit(record, tmp_path / "out")
    assert path == tmp_path / "out" / FILE
    assert read_audit(path) == read_audit(path.parent) == record


def test_a_record_without_what_came_later_is_read(tmp_path: Path) -> None:
    """A field with a default may be missing: that is how the layout grows."""
    values = plain(bare())
    for field in dataclasses.fields(AuditRecord):
        if field.default is not dataclasses.MISSING:
            del values[field.name]
    assert record_of(values) == bare()
    with pytest.raises(InputError, match=r"schema version 2 .* update the program"):
        record_of({**values, "schema_version": 2})


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "another verdict": ("verdict", "all is well", "verdict is 'all is well', not one of leaks"),
    "a remedy's verdict": ("remedies.0.verdict", "fine", r"remedies\[0\].verdict"),
    "true is no number": ("seconds", True, "seconds is True, not a finite number"),
    "a text is no number": ("update.norm", "1", "update.norm is '1', not a finite number"),
    "not a number": ("update.norm", float("nan"), "not a finite number"),
    "infinity": ("attacks.1.objectives.0", float("inf"), r"attacks\[1\].objectives\[0\]"),
    "1.0 is not whole": ("power.0.of", 1.0, r"power\[0\].of is 1.0, not a whole number"),
    "a huge number": ("seed", 10**300, "not a whole number"),
    "less than none": ("labels.true_counts.0", -1, "cannot be negative"),
    "no probability": ("attacks.1.test.p_value", 1.5, "not between 0 and 1"),
    "more found than planted": ("power.0.found", 11, r"power\[0\].found is larger"),
    "a list of nothing known": ("attacks", {"0": 1}, "attacks is not a list"),
    "an object that is a list": ("local", [], "local is not an object"),
    "none where none may be": ("update", None, "update is not an object"),
    "an endless text": ("statement", "x" * 3000, "statement is not a text of up to"),
    "pixels": ("update.pixels", [0.1, 0.2], "field update.pixels is unknown"),
    "a version that is none": ("schema_version", "1", "schema version '1'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_record_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    path, value, message = HOSTILE[case]
    write_json(tmp_path / FILE, changed(plain(example()), path, value))
    with pytest.raises(InputError, match=message) as refused:
        read_audit(tmp_path)
    assert FILE in str(refused.value)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    update = dataclasses.replace(example().update, norm=float("inf"))
    with pytest.raises(InputError, match=r"update\.norm is inf"):
        write_audit(dataclasses.replace(example(), update=update), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("cannot read /data/site/patient_7.nii.gz here", "cannot read (name left out) here"),
        (r"of C:\scans\a.png, 3 images", "of (name left out), 3 images"),
        ("jane-doe.dcm is larger", "(name left out) is larger"),
        ("../x/y and ~/z", "(name left out) and (name left out)"),
        ("90 % of 1/2, and/or 3.5 of mymodel:build", "90 % of 1/2, and/or 3.5 of mymodel:build"),
        ("see https://arxiv.org/abs/2202.06924", "see https://arxiv.org/abs/2202.06924"),
    ],
)
def test_names_of_files_are_left_out_of_sentences(text: str, kept: str, tmp_path: Path) -> None:
    write_audit(dataclasses.replace(example(), warnings=(text,)), tmp_path)
    assert read_audit(tmp_path).warnings == (kept,)


# -- The page -----------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS)
def test_the_page_begins_with_the_verdict_and_fits(record: AuditRecord) -> None:
    lines = page_of(record).splitlines()
    assert lines[0] == f"VERDICT: {record.verdict.upper()}"
    assert record.statement[1:60] in " ".join(lines)
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 100


def test_the_page_of_a_large_audit_fits_too() -> None:
    record = example()
    many = dataclasses.replace(
        record,
        attacks=record.attacks * 20, power=record.power * 20, membership=record.membership * 50,
        classes=record.classes * 50, remedies=record.remedies * 20,
        warnings=("a long sentence of words " * 20,) * 40, granted=("much of it",) * 200,
    )  # fmt: skip
    lines = page_of(many).splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 100
    for section in sections_of(many):
        assert section.title.lower() in "\n".join(lines).lower()


@pytest.mark.parametrize("record", RECORDS)
def test_a_term_is_explained_where_it_occurs_first_and_once(record: AuditRecord) -> None:
    sections = sections_of(record)
    for term, meaning in GLOSSARY:
        explained = [s.key for s in sections if meaning in s.sentences]
        using = [
            s.key for s in sections
            if re.search(term, " ".join([*s.sentences, *(s.table.header if s.table else ())]))
        ]  # fmt: skip
        assert explained == using[:1]


def test_the_page_says_what_was_measured() -> None:
    page = page_of(example())
    for number in ("87.5 %", "10 of 10", "0.49 to 0.61", "9,999", "61,386", "0.0004", "adamw"):
        assert number in page
    assert "Nothing is found from here on: noise 0.01 (cosine 0.83), batch-size 64." in page
    assert page_of(bare()).count("Not measured") == 3


HOSTILE_TEXT = "<script>alert(1)</script> \x1b[31mred\x1b[0m [x](http://evil) | \u202eback"


def with_texts(value: Any, text: str) -> Any:
    """A record with every text replaced, but for the verdict."""
    if isinstance(value, str):
        return text if value not in VERDICTS else value
    if isinstance(value, tuple):
        return tuple(with_texts(each, text) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value)(**{f.name: with_texts(getattr(value, f.name), text) for f in fields})
    return value


def test_the_page_obeys_no_escape_sequence() -> None:
    page = page_of(with_texts(example(), HOSTILE_TEXT))
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "\\x1b[31mred" in page
