"""Blank figures, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 140


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure, and its rows x columns panels of so many inches each."""
    # The Figure class draws to files without a display and without pyplot's global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path) -> None:
    """Write a picture for screens, and beside it the same as PDF for papers.

    Args:
        figure: What was drawn.
        path: Ends in .png.
    """
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    with atomic_file(path.with_suffix(".pdf")) as file:
        # Without a date, so that the same numbers give the same file.
        figure.savefig(file, format="pdf", metadata={"CreationDate": None})
