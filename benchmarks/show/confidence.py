"""How often the cells of records are right, by how sure the attack is of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.run.store import Store
from benchmarks.show.pictures import Picture, save_picture
from benchmarks.show.results import RowResult, TableResult
from core.figures import subplots

GUESS = "tabular.batches.marginal_guess"
# A share of fewer cells is no share.
FEWEST = 20
# Of the normal distribution, for 95 %.
Z = 1.96


class Point(NamedTuple):
    """The cells of one tenth of the confidences.

    Attributes:
        confidence: Their mean.
        right: Share of right ones.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    confidence: float
    right: float
    low: float
    high: float


def confidence(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """A panel per combination of the axes before the last one, a line per value of that."""
    axis = result.table.axes[-1]
    panels: dict[str, list[RowResult]] = {}
    for row in result.rows:
        if points_of(row):
            name = ", ".join(v for k, v in row.row.labels.items() if k != axis)
            panels.setdefault(name, []).append(row)
    if not panels:
        return
    figure, axes = subplots(1, len(panels), 4.2, 3.6)
    for ax, (name, rows) in zip(axes[0], panels.items(), strict=True):
        for number, row in enumerate(rows):
            points, colour = points_of(row), f"C{number}"
            spread = [[p.right - p.low for p in points], [p.high - p.right for p in points]]
            ax.errorbar(
                [p.confidence for p in points], [p.right for p in points], yerr=spread, fmt="o-",
                ms=3, lw=1, capsize=2, color=colour, label=f"{axis} {row.row.labels[axis]}",
            )  # fmt: skip
            guesses = [guess for run in row.runs for guess in run.numbers(GUESS)]
            ax.axhline(sum(guesses) / len(guesses), color=colour, ls=":", lw=0.8)
        ax.set(xlabel="confidence of a cell", xlim=(0, 1), ylim=(0, 1.02))
        ax.set_title(name, fontsize=8)
        ax.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("share of right cells")
    yield save_picture(
        figure,
        folder / "confidence.png",
        "Share of right cells by the attack's confidence, with 95 % intervals; dotted: a guess "
        "that knows the columns' distributions",
    )


def points_of(row: RowResult) -> list[Point]:
    """The tenths of a row's confidences that hold enough cells, over all of its batches."""
    sums: dict[int, Counter[str]] = {}
    batches = [batch for run in row.runs for batch in run.entries("tabular.batches")]
    for entry in (entry for batch in batches for entry in batch.get("confidence", [])):
        counts = {name: entry[name] for name in ("cells", "confidence", "right")}
        sums.setdefault(int(entry["bin"]), Counter()).update(counts)
    return [_point(counts) for _, counts in sorted(sums.items()) if counts["cells"] >= FEWEST]


def _point(counts: Mapping[str, float]) -> Point:
    """A share with its interval.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    n, right = counts["cells"], counts["right"]
    share, square = right / n, Z**2 / n
    center = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    low, high = min(center - half, share), max(center + half, share)
    return Point(counts["confidence"] / n, share, low, high)
