"""What stores and shows an audit: the file, the page, the HTML, the protocol's report."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audit.record import AuditRecord
from audit.reports import write_reports
from audit.show.html import to_html
from audit.show.ms6 import ATTACKERS, NOT_MEASURED, to_ms6
from audit.show.page import page_of
from audit.show.plots import plots_of
from audit.show.sections import GLOSSARY, sections_of
from audit.show.store import FILE, read_audit, record_of, write_audit
from core.errors import InputError
from core.storage import write_json
from tests.audit_records import VERDICTS, bare, example
from tests.browser import Page, find_browser

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
    with pytest.raises(InputError, match=r"schema version 3 .* update the program"):
        record_of({**values, "schema_version": 3})
    assert record_of({**values, "schema_version": 1}) == bare()


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
    "no probability": ("attacks.2.test.p_value", 1.5, "not between 0 and 1"),
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
    assert len(lines) <= 96
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
    assert len(lines) <= 96
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
    text = " ".join(page.split())
    assert "Nothing is found any more with: noise: 0.01 (cosine 0.83); batch-size: 64." in text
    assert "The time of the audit (--budget) ended the search. Not tried" in text
    assert "dp-sgd: noise multiplier 0.3, clipping norm 1 per image; shared-layers: the" in text
    assert "(round 20)" in page
    assert page_of(bare()).count("Not measured") == 3


HOSTILE_TEXT = (
    r"<script>alert(1)</script> $\frac{ <b>$ | [x](http://evil) "
    "\x1b[31mred\x1b[0m \u202eback, of /data/site/jane_roe-7.nii.gz or jane.png"
)


def remedies_of(**changes: Any) -> str:
    """The sentences on what helps."""
    record = dataclasses.replace(example(), **changes)
    (section,) = [s for s in sections_of(record) if s.key == "remedies"]
    return " ".join(section.sentences)


def test_what_did_not_help_is_told_from_what_was_not_tried() -> None:
    weak = tuple(dataclasses.replace(r, enough=False) for r in example().remedies)
    ended = remedies_of(remedies=weak)
    assert "Of what was tried nothing was enough, and not all was tried." in ended
    assert "ended the search" in ended
    complete = remedies_of(remedies=weak, untried=())
    assert "Nothing of all that was tried is enough" in complete
    assert "ended the search" not in complete
    none = remedies_of(remedies=())
    assert "No defense was tried on it." in none
    assert "ended the search" in none


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


# -- The HTML -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All that is written of an audit whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "out"
    write_reports(with_texts(example(), HOSTILE_TEXT), folder, "ms6")
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pages(written: dict[str, str]) -> dict[str, str]:
    """What is slow to draw, drawn once."""
    return {
        "whole": to_html(example()), "bare": to_html(bare()), "hostile": written["audit.html"]
    }  # fmt: skip


def test_the_html_holds_every_section_figure_and_number(pages: dict[str, str]) -> None:
    page = html.unescape(pages["whole"])
    for section in sections_of(example()):
        assert f'<section id="{section.key}">' in page
        assert section.title in page
        assert all(sentence in page for sentence in section.sentences)
        rows = section.table.rows if section.table else ()
        assert all(f">{cell}<" in page for row in rows for cell in row)
    assert page.count("<figure>") == page.count("<svg ") == 7
    told = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert told == re.findall(r"<figcaption>(.*?)</figcaption>", page)


@pytest.mark.parametrize("name", ["whole", "bare", "hostile"])
def test_the_html_holds_no_pixel_no_script_and_leads_nowhere(
    name: str, pages: dict[str, str]
) -> None:
    page = pages[name].lower()
    forbidden = ("<image", "<img", "data:", "base64", "<script", "<b>", "<link", "@import")
    assert [word for word in forbidden if word in page] == []
    assert set(re.findall(r'(?:src|href)="(.)', page)) <= {"#"}
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    # No handler of an event, in any tag.
    assert not re.search(r"<[^>]*\son\w+=", page)
    identifiers = re.findall(r'\sid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_the_html_shows_texts_of_a_record_as_texts(pages: dict[str, str]) -> None:
    # In a sentence, and as the name of a row in a figure.
    assert pages["hostile"].count("&lt;script&gt;alert(1)&lt;/script&gt; $\\frac{ &lt;b&gt;$") > 20
    assert "\\x1b[31mred" in pages["hostile"]


def test_an_audit_without_numbers_has_no_figure(pages: dict[str, str]) -> None:
    assert "<svg" not in pages["bare"]
    assert "Verdict: cannot tell" in pages["bare"]


def test_the_same_numbers_give_the_same_figures() -> None:
    one = dataclasses.replace(bare(), power=example().power)
    assert plots_of(one) == plots_of(one)
    assert [plot.section for plot in plots_of(one)] == ["power"]


@pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on this machine (apt-get install chromium)"
)
@pytest.mark.parametrize(("width", "name"), [(1200, "whole"), (390, "hostile")])
def test_the_html_in_a_browser(
    width: int, name: str, tmp_path: Path, pages: dict[str, str]
) -> None:
    (tmp_path / "audit.html").write_text(pages[name])
    browser = find_browser()
    assert browser is not None
    with Page(browser, tmp_path / "profile", width) as page:
        page.open(tmp_path / "audit.html")
        assert page.run("document.querySelector('h1').innerText") == "Verdict: leaks"
        sizes = page.run("[...document.querySelectorAll('figure svg')].map(s => s.clientWidth)")
        assert len(sizes) == 7
        assert min(sizes) > 300
        # Colours that are variables arrive in the figures.
        dots = "[...document.querySelectorAll('#attacks use')].map(u => getComputedStyle(u).fill)"
        assert "rgb(179, 64, 11)" in page.run(dots)
        # Wide tables scroll inside their box; the page itself never does.
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth") is True
        assert page.run("document.scripts.length + document.images.length") == 0
        assert page.complaints == []


# -- The protocol's report ------------------------------------------------------------------


def test_the_protocol_asks_for_numbers_and_all_are_there() -> None:
    """Section 5: the fields of attack A, B and C, each with its value from the record."""
    record, report = example(), to_ms6(example())
    for rate in record.membership:
        interval = f"{rate.auroc_low:.3f} to {rate.auroc_high:.3f}"
        balanced = ("0.700", f"{rate.balanced_accuracy:.3f}")
        numbers = (f"{rate.auroc:.3f}", interval, *balanced, "64", "64")
        of_class = "all" if rate.of_class is None else str(rate.of_class)
        assert f"| {of_class} | {' | '.join(numbers)} |" in report
    for attack in record.attacks:
        assert f"{'x'.join(map(str, attack.shape))}" in report
        for found in attack.similarities:
            own = np.array(found.best_member)
            spread = (own.min(), np.median(own), own.max(), np.percentile(own, 99))
            row = " | ".join(f"{value:.3f}" for value in spread)
            assert f"{row} | {found.above_noise} of {len(own)} |" in report
            assert f"{found.noise_99:.3f}" in report
            assert f"mean image of held-out cases | – | – | {found.mean_image:.3f}" in report
    assert "300 iterations, 31.9 s" in report
    assert "1 restart for each of 3 classes" in report
    assert "Round used: 20." in report
    assert [line for line in report.splitlines() if line.startswith(("- A: ", "- C: "))] == [
        "- A: 3.5 s.",
        "- C: 61 s.",
    ]
    assert NOT_MEASURED not in report.replace(f"{NOT_MEASURED}: the attack starts from none", "")


def test_what_was_not_measured_is_said_with_its_reason() -> None:
    report = to_ms6(bare())
    assert report.count("not measured: membership was not asked for") == len(ATTACKERS)
    assert "Round used: not measured: it was not said (--round N)" in report
    assert "not measured: no attack could be run" in report
    assert "## C. Model inversion of the global model\n\nNot run." in report
    # What an audit of two states alone has: the model that was sent is no single-site model.
    rates = tuple(r for r in example().membership if r.method[5:] == "threshold")
    part = dataclasses.replace(example(), membership=tuple(r for r in rates if r.model[0] in "gl"))
    assert "not measured: no global models of several rounds were given" in to_ms6(part)
    assert "not measured: no model of this site's data alone (--single-site)" in to_ms6(part)
    assert "not measured: not several models of it, one per round (--single-site)" in to_ms6(part)


@pytest.mark.parametrize("record", [*RECORDS, with_texts(example(), HOSTILE_TEXT)])
def test_the_report_is_markdown_with_whole_tables(record: AuditRecord) -> None:
    report = to_ms6(record)
    tables = re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)
    for table in tables:
        # An escaped bar is part of a cell.
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1
    assert "<script" not in report
    assert "\x1b" not in report
    assert "[x](http" not in report


# -- Everything that is written -----------------------------------------------------------------


def test_nothing_written_holds_pixels_or_names_of_files(written: dict[str, str]) -> None:
    assert set(written) == {"audit.json", "audit.html", "ms6.md"}
    for text in written.values():
        assert "(name left out)" in text
        assert not re.search(r"jane|_roe|/data/|\.png|\.nii|<image|base64", text)
    # The longest list is that of the noise images: no image has so few pixels.
    assert longest_list(json.loads(written["audit.json"])) == 100


def longest_list(value: Any) -> int:
    """Entries of the longest list in plain values."""
    if isinstance(value, dict):
        return max(map(longest_list, value.values()), default=0)
    if isinstance(value, list):
        return max([len(value), *map(longest_list, value)])
    return 0
