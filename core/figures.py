"""Blank figures, and how they are saved: the one place that every room draws on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank_figure(
    width: float, height: float, *, constrained: bool = True, dpi: float | None = None
) -> Figure:
    """Make an empty figure.

    Args:
        width: Width of the figure in inches.
        height: Height of the figure in inches.
        constrained: Whether matplotlib moves the panels until no text overlaps.
        dpi: Dots per inch of the figure; None for matplotlib's own.
    """
    # The Figure class draws to files without a display and without pyplot's global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi)
    figure.set_layout_engine("constrained" if constrained else None)
    return figure


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure of rows x columns panels.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        width: Of one panel, in inches.
        height: Of one panel, in inches.

    Returns:
        The figure, and its axes as an array of rows x columns.
    """
    figure = blank_figure(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_beside(figure: Figure, *entries: Any, fontsize: float = 7) -> None:
    """Put a legend to the right of all panels, and make the figure as high as it takes.

    Args:
        figure: With its panels drawn.
        entries: Handles and labels; all of the figure's if there are none.
        fontsize: In points.
    """
    legend = figure.legend(*entries, fontsize=fontsize, loc="outside right upper")
    # A line and what is between two, by matplotlib's default, and the frame around all.
    lines = 1.6 * len(legend.get_texts()) + 3
    figure.set_figheight(max(figure.get_figheight(), lines * fontsize / 72))


def save_figure(
    figure: Figure,
    path: str | Path,
    *,
    dpi: float | None = None,
    tight: bool = False,
    pdf: bool = False,
) -> None:
    """Write a figure as PNG, atomically.

    Args:
        figure: The drawn figure.
        path: File to write; ends in .png.
        dpi: Dots per inch; None for the figure's own.
        tight: Whether empty margins are cut off.
        pdf: Whether the same is written as PDF beside it, for papers.
    """
    box = "tight" if tight else None
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi or "figure", bbox_inches=box)
    if pdf:
        with atomic_file(Path(path).with_suffix(".pdf")) as file:
            # Without a date, so that the same numbers give the same file.
            figure.savefig(file, format="pdf", bbox_inches=box, metadata={"CreationDate": None})
