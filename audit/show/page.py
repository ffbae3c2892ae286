"""An audit for the terminal: one page that a data protection officer understands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from audit.record import AuditRecord
from audit.show.sections import Section, Table, sections_of
from core.escaping import in_one_line

WIDTH = 98
INDENT = "  "
# Of a name that makes room for numbers.
_SHORTEST_NAME = 12
MORE = "… all of it is in audit.html"
# Lines that a section may take, heading included: 96 together, with the lines between them.
LINES = {
    "verdict": 11, "update": 9, "received": 5, "labels": 6, "attacks": 14, "power": 7,
    "membership": 7, "classes": 6, "remedies": 14, "limits": 8,
}  # fmt: skip


def page_of(record: AuditRecord) -> str:
    """The audit in at most 96 lines of at most 98 characters."""
    parts = [_lines(section, LINES[section.key]) for section in sections_of(record)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _lines(section: Section, most: int) -> list[str]:
    """A section: its heading, its sentences, and as much of its table as there is room for."""
    table = [] if section.table is None else _columns(section.table)
    # A table keeps its header and two rows, however much is said above it.
    text = _clipped(_wrapped(section.sentences), most - 1 - min(len(table), 3))
    room = most - 1 - len(text)
    heading = _cut(section.title, WIDTH)
    return [heading.upper() if section.key == "verdict" else heading, *text, *_clipped(table, room)]


def _wrapped(sentences: Iterable[str]) -> list[str]:
    return [
        line
        for each in sentences
        for line in textwrap.wrap(
            in_one_line(each), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT
        )
    ]


def _clipped(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], INDENT + MORE]


def _columns(table: Table) -> list[str]:
    """The table in aligned columns, numbers to the right; a long name makes room for them."""
    rows = [[in_one_line(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = WIDTH - len(INDENT) - sum(width + 2 for width in widths[1:])
    if room >= _SHORTEST_NAME:
        widths[0] = min(widths[0], room)
        rows = [[_cut(first, widths[0]), *others] for first, *others in rows]
    return [_cut(INDENT + "  ".join(_aligned(row, widths)), WIDTH) for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def _cut(text: str, width: int) -> str:
    text = in_one_line(text).rstrip()
    return text if len(text) <= width else text[: width - 1] + "…"
