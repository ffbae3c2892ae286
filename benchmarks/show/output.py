"""Everything that is written of a table: texts, numbers, pictures, the report."""

from __future__ import annotations

from pathlib import Path

from benchmarks.run.store import Store
from benchmarks.show import figures, render, report
from benchmarks.show.results import TableResult
from core.storage import write_entries, write_text


def write_outputs(result: TableResult, store: Store, folder: Path) -> None:
    """Write a table in every format, its figures and its report.

    Args:
        result: The results to show.
        store: Store that holds the table's cells.
        folder: Where to; made if missing.
    """
    text = render.to_text_table(result)
    name = result.table.name
    write_text(folder / f"{name}.txt", render.to_terminal(text) + "\n")
    write_text(folder / f"{name}.md", render.to_markdown(text))
    write_text(folder / f"{name}.tex", render.to_latex(text))
    write_text(folder / f"{name}.csv", render.to_csv(result))
    write_entries(folder / f"{name}.json", render.to_json(result))
    pictures = figures.draw_figures(result, store, folder)
    write_text(folder / "report.html", report.to_html(result, pictures, store, folder))
