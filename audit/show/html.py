"""An audit as one HTML file: no script, no other file, no network, and no pixel.

Its own policy forbids a browser to load or to run anything, whatever a record may hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from audit.decision import Verdict
from audit.record import AuditRecord
from audit.show.plots import Plot, plots_of
from audit.show.sections import GLOSSARY, Section, Table, sections_of
from core.escaping import in_one_line

CSS = Path(__file__).with_name("audit.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
TONES = {Verdict.LEAKS.value: "leaks", Verdict.NO_LEAK_FOUND.value: "none"}
TERMS = frozenset(meaning for _, meaning in GLOSSARY)
CLAIM = (
    "This page holds numbers only: no image of the training, no reconstruction and no name of a "
    "file. It loads nothing and runs nothing."
)


def to_html(record: AuditRecord) -> str:
    """The whole audit as one HTML document."""
    verdict, *others = sections_of(record)
    plots = plots_of(record)
    body = [*_header(record, verdict), *_contents(others), *_rest_of_verdict(verdict, plots)]
    for section in others:
        body += [f'<section id="{section.key}">', f"<h2>{_text(section.title)}</h2>"]
        body += [*_content(section, plots), "</section>"]
    return "\n".join([*_head(record), *body, f"<footer><p>{CLAIM}</p></footer>", *_TAIL])


def _head(record: AuditRecord) -> list[str]:
    return [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Audit of an update: {_text(record.verdict)}</title>",
        f"<style>\n{CSS.read_text(encoding='utf-8')}</style>",
        "</head>",
        "<body>",
    ]


_TAIL = ("</body>", "</html>", "")


def _header(record: AuditRecord, verdict: Section) -> Iterator[str]:
    """The verdict, its statement and what it means."""
    statement, meaning, *_ = verdict.sentences
    yield f'<header class="{TONES.get(record.verdict, "unsure")}">'
    yield '<p class="kind">What one update of federated learning gives away</p>'
    yield f"<h1>{_text(verdict.title)}</h1>"
    yield f'<p class="statement">{_text(statement)}</p>'
    yield f'<p class="meaning">{_text(meaning)}</p>'
    yield "</header>"


def _contents(sections: Iterable[Section]) -> Iterator[str]:
    yield '<nav aria-label="contents"><ul>'
    for section in sections:
        yield f'<li><a href="#{section.key}">{_text(section.title)}</a></li>'
    yield "</ul></nav>"


def _rest_of_verdict(verdict: Section, plots: Iterable[Plot]) -> Iterator[str]:
    yield '<section id="verdict"><h2>What the verdict rests on</h2>'
    yield from _paragraphs(verdict.sentences[2:])
    yield from _figures(verdict, plots)
    yield "</section>"


def _content(section: Section, plots: Iterable[Plot]) -> Iterator[str]:
    yield from _paragraphs(section.sentences)
    yield from _figures(section, plots)
    if section.table is not None:
        yield from _table(section.table, section.title)


def _paragraphs(sentences: Iterable[str]) -> Iterator[str]:
    for each in sentences:
        kind = ' class="term"' if each in TERMS else ""
        yield f"<p{kind}>{_text(each)}</p>"


def _figures(section: Section, plots: Iterable[Plot]) -> Iterator[str]:
    for plot in (plot for plot in plots if plot.section == section.key):
        said = _text(plot.text)
        svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{said}"', 1)
        yield f"<figure>{svg}<figcaption>{said}</figcaption></figure>"


def _table(table: Table, title: str) -> Iterator[str]:
    # What scrolls can be reached with the keyboard.
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(title)}">'
    yield "<table><thead><tr>"
    yield "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    yield "</tr></thead><tbody>"
    for first, *cells in table.rows:
        numbers = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        yield f'<tr><th scope="row">{_text(first)}</th>{numbers}</tr>'
    yield "</tbody></table></div>"


def _text(text: str) -> str:
    return escape(in_one_line(text))
