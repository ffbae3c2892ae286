"""One HTML file per table, without network; it needs no other file, save for many pictures.

Sentences and records that were recovered stand beside the true ones, cell by cell.

Pictures are part of the page as long as they are few. Of further ones the page holds a small
copy that leads to the file beside it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attack.recovered import STYLE, Recovered
from benchmarks.declare.columns import View
from benchmarks.run.cells import Cell
from benchmarks.run.committed import COMPUTED_BY
from benchmarks.run.store import Store
from benchmarks.show.pictures import Picture
from benchmarks.show.render import DASH, TextTable, to_text_table
from benchmarks.show.results import Line, RowResult, ShownColumn, TableResult
from core.errors import InputError

ASSETS = Path(__file__).resolve().parent / "assets"
# Numbers of a result that are tables of their own and would drown the rest.
LONG = 400
# Bytes of pictures that are part of the page whole; side of the copies of others, in pixels.
WHOLE_BYTES, THUMBNAIL = 4 << 20, 256


def to_html(
    result: TableResult, pictures: Sequence[Picture], store: Store, folder: Path | None = None
) -> str:
    """The report as one HTML document.

    Args:
        result: The results to show.
        pictures: What was drawn of them.
        store: Store that holds the table's cells.
        folder: Where the page will lie; None: beside the first picture.
    """
    text = to_text_table(result)
    template = string.Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(text.title),
        description=escape(result.table.description),
        css=(ASSETS / "report.css").read_text(encoding="utf-8") + STYLE,
        js=(ASSETS / "report.js").read_text(encoding="utf-8"),
        filters="\n".join(_filters(result)),
        table="\n".join(_table(result, text)),
        footnotes="\n".join(_footnotes(text)),
        figures="\n".join(_figures(pictures, folder)),
        cells="\n".join(_cells(result, store)),
    )


def _filters(result: TableResult) -> Iterator[str]:
    for axis in result.shown_axes:
        values = dict.fromkeys(row.row.labels[axis] for row in result.rows)
        options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
        name = escape(axis)
        yield (
            f'<select name="{name}" aria-label="filter by {name}">'
            f'<option value="">every {name}</option>{options}</select>'
        )


def _table(result: TableResult, text: TextTable) -> Iterator[str]:
    n_labels = text.n_labels
    yield '<table class="numbers"><thead><tr>'
    for index, name in enumerate(text.header):
        kind = ' class="label"' if index < n_labels else ""
        yield f'<th{kind}><button type="button">{escape(name)}</button></th>'
    yield "</tr></thead><tbody>"
    columns = result.shown_columns()
    for line, entries in zip(result.shown_lines(), text.rows, strict=True):
        yield _row(line, entries, columns, n_labels)
    yield '</tbody><tbody class="baselines">'
    for entries in text.baselines:
        yield f"<tr>{''.join(_plain(e, i < n_labels) for i, e in enumerate(entries))}</tr>"
    yield "</tbody></table>"


def plain_table(table: TextTable) -> str:
    """A text table as HTML, without anything to click."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = [
        f"<tr>{''.join(_plain(e, i < table.n_labels) for i, e in enumerate(row))}</tr>"
        for row in table.rows
    ]
    notes = "\n".join(_footnotes(table))
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table class="numbers"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _row(line: Line, entries: Sequence[str], columns: Sequence[ShownColumn], n_labels: int) -> str:
    failed = ' class="failed"' if line.errors else ""
    labels = [_plain(entry, True) for entry in entries[:n_labels]]
    shown = zip(columns, entries[n_labels:], strict=False)
    numbers = [_number(line.row(column), column.view, entry) for column, entry in shown]
    rest = [_plain(entry, False) for entry in entries[n_labels + len(columns) :]]
    return f"<tr{failed}{_data_labels(line.labels)}>{''.join([*labels, *numbers, *rest])}</tr>"


def _plain(entry: str, label: bool) -> str:
    kind = ' class="label"' if label else ""
    value = "" if entry == DASH else entry
    return f'<td{kind} data-value="{escape(value)}">{escape(entry)}</td>'


def _number(row: RowResult, view: View, entry: str) -> str:
    """An entry that sorts by its value and explains itself when pointed at."""
    summary = row.summaries[view.column.name]
    if summary is None:
        word = row.texts.get(view.column.name, "")
        return f'<td data-value="{escape(word)}">{escape(entry)}</td>'
    value = summary.worst if view.part == "worst" else summary.mean
    hint = f"n = {summary.n}"
    if summary.low is not None:
        hint += f", 95 % interval of the mean {summary.low:.4g} to {summary.high:.4g}"
    return f'<td data-value="{"" if value is None else value}" title="{hint}">{escape(entry)}</td>'


def _data_labels(labels: Mapping[str, str]) -> str:
    return f' data-labels="{escape(json.dumps(dict(labels)))}"' if labels else ""


def _footnotes(text: TextTable) -> Iterator[str]:
    yield '<ul class="notes">'
    for mark, sentence in text.footnotes:
        yield f"<li>[{escape(mark)}] {escape(sentence)}</li>"
    yield "</ul>"


def _figures(pictures: Sequence[Picture], folder: Path | None) -> Iterator[str]:
    room = WHOLE_BYTES
    for picture in pictures:
        room -= picture.file.stat().st_size
        beside = folder or pictures[0].file.parent
        shown = _whole(picture) if room >= 0 else _small(picture, beside)
        caption = escape(picture.caption)
        yield (
            f"<figure{_data_labels(picture.labels)}>{shown}<figcaption>{caption}</figcaption>"
            "</figure>"
        )


def _whole(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    return (
        f'<button type="button" aria-label="enlarge"><img src="data:image/png;base64,{data}" '
        f'alt="{escape(picture.caption)}"></button>'
    )


def embedded(picture: Picture) -> str:
    """A figure as part of a page without anything to click."""
    data = base64.b64encode(picture.file.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _small(picture: Picture, folder: Path) -> str:
    """A small copy that leads to the file."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(picture.file) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    place = quote(Path(os.path.relpath(picture.file, folder)).as_posix())
    return (
        f'<a href="./{escape(place)}"><img src="data:image/jpeg;base64,{data}" '
        f'alt="{escape(picture.caption)}"></a>'
    )


def _cells(result: TableResult, store: Store) -> Iterator[str]:
    names = result.table.labels()
    users: dict[str, tuple[Cell, list[Mapping[str, str]]]] = {}
    for row in result.rows:
        for cell in (cell for run in row.row.repeats for cell in run.values()):
            users.setdefault(cell.key, (cell, []))[1].append(row.row.labels)
    for key, (cell, labels) in users.items():
        yield _cell(cell, names[key], _common(labels), store)


def _common(labels: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {a: v for a, v in labels[0].items() if all(other[a] == v for other in labels)}


def _cell(cell: Cell, name: str, labels: Mapping[str, str], store: Store) -> str:
    result, failure = store.result(cell), store.failure(cell)
    state = "failed" if failure else "not run" if result is None else "finished"
    code = (result or {}).get(COMPUTED_BY) or cell.code
    facts: dict[str, Any] = {"key": cell.key, "code": code}
    facts |= {f"--{flag}": value for flag, value in cell.config.items()}
    facts |= {f"--{f}": f"{i.cell.stage} {i.cell.key}/{i.pattern}" for f, i in cell.inputs.items()}
    facts |= _made(result or {})
    rows = "".join(
        f"<tr><td><code>{escape(k)}</code></td><td>{escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    said = f"<pre>{escape(failure['error'])}</pre>" if failure else _recovered(result or {})
    return (
        f"<details{_data_labels(labels)}><summary>{escape(name)} ({state})</summary>"
        f"{said}<table>{rows}</table></details>"
    )


def _recovered(result: Mapping[str, Any]) -> str:
    """Sentences or records beside the true ones, where the cell attacked such."""
    values = result.get("recovered")
    if values is None:
        return ""
    try:
        return Recovered.from_record(values).to_html()
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"


def _made(result: Mapping[str, Any]) -> dict[str, Any]:
    """How a cell's result was made, and what it took."""
    seconds = {k: result[k] for k in ("seconds", "wall_seconds") if k in result}
    return {**dict(_flatten(result.get("provenance") or {})), **seconds}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}.")
        elif len(str(item)) < LONG:
            yield f"{prefix}{key}", item
