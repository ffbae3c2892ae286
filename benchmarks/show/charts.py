"""Diagrams of a table's numbers.

Colours stand for the values of the table's first axis, in every diagram; what else differs
between its rows is told apart by marker, line style or shade.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.declare.columns import find_column
from benchmarks.run.store import Store
from benchmarks.show.pictures import Picture, save_picture
from benchmarks.show.results import RowResult, TableResult, summary_of
from benchmarks.show.statistics import Summary
from core.figures import legend_beside, subplots

# What a table's leakage is drawn by: the first that its rows have.
LEAKAGES = ("ssim", "tokens_placed")
EXACT, TOKENS_OVER_WIDTH = "sentence_exact", "attack.details.tokens_over_width"
UTILITY, DEFENDED = "validation accuracy", "defended accuracy"


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINE_STYLES = ("-", "--", ":", "-.")
# Matplotlib's cycle of colours has ten, and begins anew.
N_COLOURS = 10
PALEST = 0.35
# Above it, a cell's number is written in white.
DARK = 0.5


@dataclass(frozen=True)
class _Look:
    """How a row is told apart.

    Attributes:
        colour: By the value of the first axis.
        kind: Number of the combination of the other axes' values.
        opacity: By the kind, from 1 on downwards.
    """

    colour: str
    kind: int
    opacity: float

    @property
    def marker(self) -> str:
        """Of its point."""
        return MARKERS[self.kind % len(MARKERS)]

    @property
    def line(self) -> str:
        """Style of its line."""
        return LINE_STYLES[self.kind % len(LINE_STYLES)]


def _looks(rows: Sequence[RowResult]) -> list[_Look]:
    firsts = list(dict.fromkeys(_first(row) for row in rows))
    others = [labels_without(row, next(iter(row.row.labels))) for row in rows]
    kinds = list(dict.fromkeys(others))
    step = (1 - PALEST) / max(1, len(kinds) - 1)
    numbers = [kinds.index(other) for other in others]
    return [
        _Look(f"C{firsts.index(_first(row)) % N_COLOURS}", number, 1 - step * number)
        for row, number in zip(rows, numbers, strict=True)
    ]


def _styled(result: TableResult) -> Iterator[tuple[RowResult, _Look]]:
    return zip(result.rows, _looks(result.rows), strict=True)


def _first(row: RowResult) -> str:
    return next(iter(row.row.labels.values()))


def labels_without(row: RowResult, axis: str) -> str:
    """What a row is called where the value of this axis is told elsewhere."""
    return ", ".join(value for name, value in row.row.labels.items() if name != axis)


def _name(row: RowResult) -> str:
    return ", ".join(row.row.labels.values())


def _leakage(result: TableResult) -> str:
    """The metric that a table's leakage is drawn by."""
    held = (name for name in LEAKAGES for row in result.rows if _summary(row, name))
    return next(held, LEAKAGES[0])


def _title(metric: str) -> str:
    return find_column(metric).header


def tradeoff(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """What was leaked against what the model is worth, a point per row.

    Of a table with the column "defended accuracy" that one counts.
    """
    worth = DEFENDED if DEFENDED in result.table.columns else UTILITY
    name = _leakage(result)
    points = [(row, look, _mean(row, worth), _mean(row, name)) for row, look in _styled(result)]
    points = [p for p in points if not math.isnan(p[2]) and not math.isnan(p[3])]
    if not points:
        return
    figure, axes = subplots(1, 1, 6.2, 3.6)
    ax = axes[0][0]
    for row, look, utility, leakage in points:
        ax.errorbar(
            utility, leakage, yerr=_whiskers(row, name), fmt=look.marker, color=look.colour,
            capsize=2, label=_name(row),
        )  # fmt: skip
    ax.set(xlabel=f"{worth} (%)", ylabel=f"{_title(name)} of reconstructions (higher: more leaked)")
    ax.set_xlim(left=0)
    legend_beside(figure)
    caption = f"Privacy against utility: mean {_title(name)} with its 95 % interval"
    yield save_picture(figure, folder / "tradeoff.png", caption)


def _summary(row: RowResult, name: str) -> Summary | None:
    return summary_of(row.row, row.runs, find_column(name))


def _mean(row: RowResult, name: str) -> float:
    summary = _summary(row, name)
    return summary.mean if summary else math.nan


def _whiskers(row: RowResult, name: str) -> list[list[float]] | None:
    summary = _summary(row, name)
    if summary is None or summary.low is None or summary.high is None:
        return None
    return [[max(0.0, summary.mean - summary.low)], [max(0.0, summary.high - summary.mean)]]


def bars(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage of every row, with the baselines as lines."""
    leakage = _leakage(result)
    rows = [(row, look, _mean(row, leakage)) for row, look in _styled(result)]
    rows = [(row, look, mean) for row, look, mean in rows if not math.isnan(mean)]
    if not rows:
        return
    figure, axes = subplots(1, 1, 6, 0.3 * len(rows) + 1.2)
    ax = axes[0][0]
    for place, (row, look, mean) in enumerate(rows):
        ax.barh(place, mean, color=look.colour, alpha=look.opacity)
        error = _whiskers(row, leakage)
        if error is not None:
            ax.errorbar(mean, place, xerr=error, fmt="none", ecolor="k", elinewidth=1, capsize=2)
    ax.set_yticks(range(len(rows)), [_name(row) for row, _, _ in rows], fontsize=7)
    ax.invert_yaxis()
    for number, (name, metrics) in enumerate(result.baselines.items()):
        if leakage in metrics:
            ax.axvline(metrics[leakage].mean, ls=[":", "--", "-."][number % 3], c="k", label=name)
    if result.baselines:
        figure.legend(fontsize=7, loc="outside upper right", ncols=len(result.baselines))
    ax.set_xlabel(f"{_title(leakage)} (mean and 95 % interval)")
    yield save_picture(
        figure,
        folder / "bars.png",
        f"Mean {_title(leakage)} of the reconstructions; lines: guesses without the gradient",
    )


def heatmap(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage by the first and the last axis, a panel per combination of those between."""
    if len(result.table.axes) < 2:
        return
    leakage = _leakage(result)
    panels: dict[str, dict[tuple[str, str], float]] = {}
    for row in result.rows:
        first, *between, last = row.row.labels.values()
        value = _mean(row, leakage)
        # A run within a budget leaves whole rows and columns out.
        if not math.isnan(value):
            panels.setdefault(", ".join(between), {})[first, last] = value
    if not panels:
        return
    across = list(dict.fromkeys(first for cells in panels.values() for first, _ in cells))
    down = list(dict.fromkeys(last for cells in panels.values() for _, last in cells))
    figure, axes = subplots(1, len(panels), 0.55 * len(across) + 1.2, 0.28 * len(down) + 1.6)
    for ax, (name, cells) in zip(axes[0], panels.items(), strict=True):
        grid = [[cells.get((first, last), math.nan) for first in across] for last in down]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
        for y, x in itertools.product(range(len(down)), range(len(across))):
            if not math.isnan(grid[y][x]):
                ink = "w" if grid[y][x] > DARK else "k"
                ax.text(x, y, f"{grid[y][x]:.2f}", ha="center", va="center", color=ink, fontsize=6)
        ax.set_xticks(range(len(across)), across, rotation=45, ha="right", fontsize=7)
        ax.set_yticks(range(len(down)), down if ax is axes[0][0] else [], fontsize=7)
        ax.set_title(name, fontsize=8)
        ax.set_xlabel(result.table.axes[0])
    axes[0][0].set_ylabel(result.table.axes[-1])
    figure.colorbar(image, ax=axes[0], label=_title(leakage), fraction=0.03)
    caption = f"Mean {_title(leakage)} of the reconstructions; dark: leaked"
    yield save_picture(figure, folder / "heatmap.png", caption)


def curves(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Objective, and PSNR where it was traced, over the iterations of the first repeat."""
    traces = [(row, look, _trace(row)) for row, look in _styled(result)]
    traces = [(row, look, trace) for row, look, trace in traces if trace]
    quantities = [q for q in ("objective", "psnr") if any(q in p for *_, t in traces for p in t)]
    if not quantities:
        return
    figure, axes = subplots(1, len(quantities), 4.5, 3.4)
    for ax, quantity in zip(axes[0], quantities, strict=True):
        for row, look, trace in traces:
            points = [(p["iteration"], p[quantity]) for p in trace if p.get(quantity) is not None]
            if points:
                xs, ys = zip(*points, strict=True)
                ax.plot(xs, ys, look.line, color=look.colour, label=_name(row), lw=1)
        ax.set(xlabel="iteration", ylabel="PSNR (dB)" if quantity == "psnr" else quantity)
        if quantity == "objective":
            ax.set_yscale("log")
    legend_beside(figure, *axes[0][0].get_legend_handles_labels(), fontsize=6)
    yield save_picture(
        figure,
        folder / "curves.png",
        f"{' and '.join(quantities)} over the iterations of the attack",
    )


def _trace(row: RowResult) -> list[Mapping[str, float]]:
    """Points of the first repeat: what the attack saw, and the PSNR seen from outside."""
    if not row.runs:
        return []
    return [*row.runs[0].entries("attack.trace"), *row.runs[0].entries("attack.psnr_curve")]


def lines(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage along the last axis, a line per value of the others."""
    axis, leakage = result.table.axes[-1], _leakage(result)
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in result.rows:
        mean = _mean(row, leakage)
        if not math.isnan(mean):
            groups.setdefault(labels_without(row, axis), []).append((row.row.labels[axis], mean))
    if not groups:
        return
    figure, axes = subplots(1, 1, 5.5, 3.6)
    for name, points in groups.items():
        axes[0][0].plot(*zip(*points, strict=True), "o-", label=name)
    axes[0][0].set(xlabel=axis, ylabel=f"{_title(leakage)} (higher: more leaked)")
    axes[0][0].set_ylim(bottom=min(0.0, axes[0][0].get_ylim()[0]))
    if any(groups):
        axes[0][0].legend(fontsize=7)
    caption = f"Mean {_title(leakage)} of the reconstructions by {axis}"
    yield save_picture(figure, folder / "lines.png", caption)


def tokens_over_width(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Exact sentences against tokens over the layer's width, a line per value of the first axes."""
    axis = result.table.axes[-1]
    groups: dict[str, list[tuple[float, float, RowResult]]] = {}
    for row in result.rows:
        place, mean = _mean(row, TOKENS_OVER_WIDTH), _mean(row, EXACT)
        if not math.isnan(place) and not math.isnan(mean):
            groups.setdefault(labels_without(row, axis), []).append((place, mean, row))
    if not groups:
        return
    figure, axes = subplots(1, 1, 5.5, 3.6)
    ax = axes[0][0]
    for number, (name, points) in enumerate(groups.items()):
        colour, marker = f"C{number % N_COLOURS}", MARKERS[number % len(MARKERS)]
        points = sorted(points, key=lambda point: point[0])
        places, means, _ = zip(*points, strict=True)
        ax.plot(places, means, f"{marker}-", color=colour, label=name, alpha=0.8)
        for place, mean, row in points:
            error = _whiskers(row, EXACT)
            if error is not None:
                ax.errorbar(place, mean, yerr=error, fmt="none", ecolor=colour, capsize=2)
    ax.axvline(1, color="k", lw=0.8, ls=":")
    ax.set(xlabel="tokens with a gradient over width", ylabel=_title(EXACT), ylim=(-0.05, 1.05))
    if any(groups):
        ax.legend(fontsize=7)
    caption = "Share of exact sentences by tokens over width; dotted: as many tokens as the width"
    yield save_picture(figure, folder / "tokens_over_width.png", caption)


def layers(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """The rank-analysis index of every layer, a panel per row."""
    analyses = [(row, row.runs[0].entries("extract.rank_analysis.layers")) for row in result.rows]
    analyses = [(row, layers) for row, layers in analyses if layers]
    if not analyses:
        return
    figure, axes = subplots(len(analyses), 1, 6.5, 1.5)
    for (ax,), (row, layers) in zip(axes, analyses, strict=True):
        ax.bar(range(1, len(layers) + 1), [layer["index"] for layer in layers])
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(_name(row), fontsize=7, loc="left")
        # Indices span orders of magnitude on both sides of zero.
        ax.set_yscale("symlog", linthresh=10)
        ax.tick_params(labelsize=6)
    axes[-1][0].set_xlabel("layer")
    yield save_picture(
        figure, folder / "layers.png", "Rank-analysis index per layer (above zero: underdetermined)"
    )


def rounds(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage over the rounds of a federation: a panel per row, a line per site."""
    rows = [row for row in result.rows if row.runs and row.runs[0].entries("federated.leakage")]
    if not rows:
        return
    figure, axes = subplots(1, len(rows), 3.2, 2.8)
    for ax, row in zip(axes[0], rows, strict=True):
        run = row.runs[0]
        for site in sorted({entry["site"] for entry in run.entries("federated.leakage")}):
            entries = [e for e in run.leakage(site) if e["rdlv"] is not None]
            rounds = [entry["round"] for entry in entries]
            ax.plot(rounds, [entry["rdlv"] for entry in entries], "o-", ms=3, label=site)
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(_name(row), fontsize=8)
        ax.set_xlabel("round")
    lowest, highest = zip(*(ax.get_ylim() for ax in axes[0]), strict=True)
    for ax in axes[0]:
        ax.set_ylim(min(lowest), max(highest))
    axes[0][0].set_ylabel("RDLV (largest of the site's images)")
    axes[0][0].legend(fontsize=7)
    yield save_picture(
        figure,
        folder / "rounds.png",
        "Relative data leakage value over the rounds of the federation",
    )
