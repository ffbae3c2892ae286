"""Lines of tables in the documents' Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def row_of(cells: Iterable[str]) -> str:
    """One row of a table.

    Args:
        cells: Its texts, in Markdown already.
    """
    return f"| {' | '.join(cells)} |"
