"""Tables as text: terminal, Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.declare.columns import View
from benchmarks.declare.tables import Table
from benchmarks.run.cells import Cell
from benchmarks.run.committed import compact_records
from benchmarks.show.results import Line, RowResult, ShownColumn, TableResult
from benchmarks.show.statistics import Summary
from core.escaping import in_csv, in_markdown, in_one_line

DASH = "–"
PUBLISHED = "published"
BEATEN = "does not beat the best guess that knows nothing of the gradient, on the same images"


@dataclass
class TextTable:
    """A table whose every entry is text.

    Attributes:
        title: Title of the table, in one line.
        header: Names of columns.
        rows: Entries, as many as names.
        baselines: Rows below a rule.
        footnotes: Mark and sentence.
        n_labels: Number of columns at the left that show axes.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    baselines: list[list[str]] = field(default_factory=list)
    footnotes: list[tuple[str, str]] = field(default_factory=list)
    n_labels: int = 1


class _Footnotes:
    """Hands out a, b, c, ... for sentences, the same for the same."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def mark(self, sentence: str) -> str:
        letters = string.ascii_lowercase
        count = len(self._marks)
        new = letters[count % 26] * (1 + count // 26)
        return self._marks.setdefault(sentence, new)

    def listed(self) -> list[tuple[str, str]]:
        return [(mark, sentence) for sentence, mark in self._marks.items()]


def to_text_table(result: TableResult) -> TextTable:
    """Write every number of a result the way people read it."""
    notes = _Footnotes()
    columns, lines = result.shown_columns(), result.shown_lines()
    if (all_lines := len(result.lines())) > len(lines):
        notes.mark(f"{all_lines - len(lines)} of {all_lines} rows are not computed yet")
    published = any(line.first.row.published for line in lines)
    header = [*result.shown_axes, *(c.header for c in columns), *[PUBLISHED] * published]
    return TextTable(
        title=_title(result.table),
        header=header,
        rows=[_line_texts(line, columns, notes, published) for line in lines],
        baselines=_baseline_texts(result, published),
        footnotes=notes.listed(),
        n_labels=len(result.shown_axes),
    )


def _title(table: Table) -> str:
    # A folder is known by its name and a hash of its files.
    data = table.data.partition("@")[0]
    return f"{table.title} ({table.preset} preset{f', {data}' if data else ''})"


def _line_texts(
    line: Line, columns: Sequence[ShownColumn], notes: _Footnotes, published: bool
) -> list[str]:
    labels = list(line.labels.values())
    if line.errors:
        labels[-1] += f" [{notes.mark('; '.join(line.errors))}]"
    entries = [_entry(line.row(column), column.view, notes) for column in columns]
    papers = [f"{p.text} [{notes.mark(p.source)}]" for p in line.first.row.published]
    return [*labels, *entries, *[", ".join(papers) or DASH] * published]


def _entry(row: RowResult, view: View, notes: _Footnotes) -> str:
    if view.column.name in row.texts:
        return row.texts[view.column.name]
    if view.part == "change":
        return format_change(row.changes.get(view.column.name), view)
    summary = row.summaries[view.column.name]
    if summary is not None:
        guess = row.beaten_by.get(view.column.name) if view.part == "mean" else None
        mark = "" if guess is None else f" [{notes.mark(BEATEN)}]"
        return format_summary(summary, view) + mark
    if row.errors:
        return "failed"
    return f"{DASH} [{notes.mark(f'{view.column.header}: {row.notes[view.column.name]}')}]"


def format_change(change: Summary | None, view: View) -> str:
    """A paired difference and its 95 % interval; a dash where there is no pair."""
    if change is None:
        return DASH
    mean = f"{change.mean:+.{view.column.digits or 2}f}"
    if change.low is None or change.high is None:
        return mean
    return f"{mean} ({view.number(change.low)} to {view.number(change.high)})"


def format_summary(summary: Summary, view: View) -> str:
    """A number with its spread, the worst one, or the interval of the mean."""
    if view.part == "worst":
        return DASH if summary.worst is None else view.number(summary.worst)
    if view.part == "interval":
        if summary.low is None or summary.high is None:
            return DASH
        return f"{view.number(summary.low)} to {view.number(summary.high)}"
    # What happened once, or the same every time, has no spread worth the space.
    spread = f" ± {view.number(summary.std)}" if summary.std else ""
    return f"{view.number(summary.mean)}{spread}"


def _baseline_texts(result: TableResult, published: bool) -> list[list[str]]:
    texts = []
    for name, metrics in result.baselines.items():
        views = [column.view for column in result.shown_columns()]
        values = [_baseline_entry(metrics.get(v.column.name), v) for v in views]
        labels = [name, *[""] * (len(result.shown_axes) - 1)]
        texts.append([*labels, *values, *[DASH] * published])
    return texts


def _baseline_entry(summary: Summary | None, view: View) -> str:
    if summary is None or view.part != "mean":
        return DASH
    return view.number(summary.mean)


def to_terminal(table: TextTable) -> str:
    """A PrettyTable with its footnotes."""
    from prettytable import PrettyTable

    pretty = PrettyTable(_lines_of_one(table.header))
    pretty.title = in_one_line(table.title)
    pretty.align = "r"
    for name in pretty.field_names[: table.n_labels]:
        pretty.align[name] = "l"
    pretty.add_rows([_lines_of_one(row) for row in table.rows])
    if table.baselines:
        pretty.add_divider()
        pretty.add_rows([_lines_of_one(row) for row in table.baselines])
    notes = [in_one_line(f"[{mark}] {text}") for mark, text in table.footnotes]
    return "\n".join([pretty.get_string(), *notes])


def _lines_of_one(entries: Iterable[str]) -> list[str]:
    return [in_one_line(entry) for entry in entries]


def to_markdown(table: TextTable) -> str:
    """A Markdown table with its footnotes."""
    left = [":---"] * table.n_labels + ["---:"] * (len(table.header) - table.n_labels)
    baselines = [[f"*{row[0]}*", *row[1:]] for row in table.baselines]
    lines = [_pipes(row) for row in [table.header, left, *table.rows, *baselines]]
    notes = [f"- [{in_markdown(mark)}] {in_markdown(text)}" for mark, text in table.footnotes]
    return "\n".join([f"**{in_markdown(table.title)}**", "", *lines, "", *notes]).rstrip() + "\n"


def _pipes(entries: Iterable[str]) -> str:
    return f"| {' | '.join(map(in_markdown, entries))} |"


def to_latex(table: TextTable) -> str:
    """A LaTeX table for the booktabs package."""
    columns = "l" * table.n_labels + "r" * (len(table.header) - table.n_labels)
    body = [_ampersands(row) for row in table.rows]
    if table.baselines:
        body += ["\\midrule", *(_ampersands(row) for row in table.baselines)]
    notes = [rf"{{\footnotesize [{mark}] {_latex(text)}\par}}" for mark, text in table.footnotes]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _ampersands(table.header),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *notes,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _ampersands(entries: Iterable[str]) -> str:
    return rf"{' & '.join(_latex(entry) for entry in entries)} \\"


_LATEX = {
    "\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "∞": r"$\infty$", "ε": r"$\varepsilon$",
    "σ": r"$\sigma$", "δ": r"$\delta$", "×": r"$\times$", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def _latex(text: str) -> str:
    return re.sub(".", lambda match: _LATEX.get(match[0], match[0]), in_one_line(text))


def to_csv(result: TableResult) -> str:
    """One line per row; every column as mean, std, interval, worst and n."""
    parts = [f.name for f in dataclasses.fields(Summary)]
    columns = {view.column.name: view.column for view in result.views}
    names = [name for name, column in columns.items() if column.text is None]
    worded = [name for name, column in columns.items() if column.text is not None]
    numbered = [f"{n} {p}" for n in names for p in parts]
    header = [*result.table.axes, *worded, *numbered, "published", "error"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(in_csv, header))
    for row in result.rows:
        summaries = [row.summaries[n] for n in names]
        numbers = [getattr(s, p) if s else None for s in summaries for p in parts]
        papers = "; ".join(f"{p.text} ({p.source})" for p in row.row.published)
        texts = [row.texts.get(name) for name in worded]
        words = [*row.row.labels.values(), *texts, *numbers, papers, "; ".join(row.errors)]
        writer.writerow(map(in_csv, words))
    return buffer.getvalue()


def to_json(result: TableResult) -> dict[str, Any]:
    """Everything a program may want of a result, as plain values."""
    return {
        "table": result.table.name,
        "title": result.table.title,
        "preset": result.table.preset,
        "data": result.table.data,
        "rows": [_row_json(row) for row in result.rows],
        "records": compact_records(_finished(result)),
        "baselines": {
            name: {metric: dataclasses.asdict(s) for metric, s in metrics.items()}
            for name, metrics in result.baselines.items()
        },
    }


def _finished(result: TableResult) -> Iterator[tuple[Cell, Mapping[str, Any]]]:
    """Every finished cell with what it recorded."""
    for row in result.rows:
        for cells, run in zip(row.row.repeats, row.runs, strict=True):
            for stage, cell in cells.items():
                if stage in run.records:
                    yield cell, run.records[stage]


def _row_json(row: RowResult) -> dict[str, Any]:
    return {
        "labels": dict(row.row.labels),
        "values": {
            name: None if s is None else dataclasses.asdict(s) for name, s in row.summaries.items()
        },
        "texts": dict(row.texts),
        "notes": dict(row.notes),
        **_compared_json(row),
        "errors": list(row.errors),
        "published": [dataclasses.asdict(p) for p in row.row.published],
        "cells": [{stage: c.key for stage, c in run.items()} for run in row.row.repeats],
    }


def _compared_json(row: RowResult) -> dict[str, Any]:
    """What a table that compares its rows adds."""
    changes = {n: dataclasses.asdict(s) for n, s in row.changes.items() if s is not None}
    compared = {"changes": changes, "beaten by": dict(row.beaten_by)}
    return {name: values for name, values in compared.items() if values}
