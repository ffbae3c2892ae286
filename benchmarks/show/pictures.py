"""A drawn figure with what a reader is told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from core.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 140


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        file: PNG.
        caption: The figure's content in one sentence.
        labels: Axis values it belongs to, for the filter; may be empty.
    """

    file: Path
    caption: str
    labels: Mapping[str, str] = field(default_factory=dict)


def save_picture(
    figure: Figure, file: Path, caption: str, labels: Mapping[str, str] | None = None
) -> Picture:
    """Write a figure as PNG for screens and, beside it, as PDF for papers.

    Args:
        figure: The drawn figure.
        file: Ends in .png.
        caption: The figure's content in one sentence.
        labels: Axis values that the figure belongs to.
    """
    save_figure(figure, file, dpi=DOTS_PER_INCH, pdf=True)
    return Picture(file, caption, labels or {})
