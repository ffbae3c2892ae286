"""Figures of the federated stage, drawn without a display."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from audit.leakage import LeakageRecord
from core.errors import InputError
from core.figures import blank_figure, save_figure
from federated.experiment.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
# Values by x of one line.
Points = dict[float, list[float]]


def rdlv_per_round(records: Sequence[LeakageRecord], path: str | Path) -> None:
    """RDLV over rounds, a line per site (mean over its images) with their spread.

    Args:
        records: Of one run; withheld updates are marked.
        path: PNG to write.

    Raises:
        InputError: No record holds a measured value.
    """
    lines: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    for record in records:
        lines[record.site][record.round_number] += record.rdlv_per_image
    figure, ax = _axes()
    _draw_lines(ax, lines)
    held = [
        (r.round_number, r.rdlv) for r in records if r.decision == "withhold" and r.rdlv is not None
    ]
    if held:
        x, y = zip(*held, strict=True)
        ax.scatter(x, y, marker="x", color="black", zorder=3, label="withheld")
    ax.set_xlabel("round")
    ax.locator_params(axis="x", integer=True)
    ax.set_ylabel("relative data leakage value")
    ax.legend(fontsize=8)
    _save(figure, path)


def rdlv_vs_gauss(runs: Sequence[Run], path: str | Path) -> None:
    """RDLV over the noise level, a line per site, with the test accuracy on a second axis.

    Args:
        runs: Runs with different noise levels.
        path: PNG to write.

    Raises:
        InputError: No record holds a measured value.
    """
    lines: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    accuracy: Points = defaultdict(list)
    for run in runs:
        for record in run.records:
            lines[record.site][run.sigma0] += record.rdlv_per_image
        if run.test_accuracy is not None:
            accuracy[run.sigma0].append(run.test_accuracy)
    figure, ax = _axes()
    _draw_lines(ax, lines)
    ax.set_xlabel(r"Gaussian privacy $\sigma_0$")
    _spread_axis(ax, [run.sigma0 for run in runs])
    ax.set_ylabel("relative data leakage value")
    ax.legend(fontsize=8, loc="upper right")
    if accuracy:
        second = ax.twinx()
        x = sorted(accuracy)
        second.plot(x, [np.mean(accuracy[s]) for s in x], "--", color="grey", label="test accuracy")
        second.set_ylim(0, 1)
        second.set_ylabel("test accuracy of the global model")
        second.legend(fontsize=8, loc="lower left")
    _save(figure, path)


def reconstruction_table(
    runs: Sequence[Run], path: str | Path, *, site: str, round_number: int | None = None
) -> None:
    """A site's training images beside their best reconstructions at every noise level.

    Args:
        runs: Runs with different noise levels.
        path: PNG to write.
        site: Name of the site whose images are drawn.
        round_number: Of which round; the first one recorded if None.

    Raises:
        InputError: There are no kept images of that site and round.
    """
    columns: list[tuple[str, np.ndarray, list[float]]] = []
    for run in runs:
        record = _chosen(run.records, site, round_number)
        matches = None if record is None else record.best_matches()
        if record is not None and matches is not None:
            if not columns:
                columns.append(("original", matches[0], []))
            title = rf"$\sigma_0$ = {run.sigma0:g}"
            columns.append((title, matches[1], record.rdlv_per_image))
    if not columns:
        raise InputError(f"no run holds kept images of {site}; run it with images kept")
    rows = min(8, len(columns[0][1]))
    figure = blank_figure(1.25 * len(columns), 1.45 * rows, constrained=False)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures, values) in zip(axes.T, columns, strict=True):
        for index, (ax, picture) in enumerate(zip(column, pictures, strict=False)):
            ax.imshow(picture.transpose(1, 2, 0).clip(0, 1))
            ax.set_axis_off()
            value = f"RDLV {values[index]:+.2f}" if values else ""
            ax.set_title("\n".join(filter(None, [title if index == 0 else "", value])), fontsize=7)
    _save(figure, path)


def _chosen(
    records: Iterable[LeakageRecord], site: str, round_number: int | None
) -> LeakageRecord | None:
    fitting = (r for r in records if r.site == site and round_number in (None, r.round_number))
    return min(fitting, key=lambda r: r.round_number, default=None)


def _draw_lines(ax: Axes, lines: dict[str, Points]) -> None:
    """Mean with the range of all values, a line per name; the zero line."""
    if not any(values for points in lines.values() for values in points.values()):
        raise InputError("none of the results holds a measured RDLV; see the reasons recorded")
    ax.axhline(0, color="black", linewidth=1)
    for name, points in sorted(lines.items()):
        x = [at for at in sorted(points) if points[at]]
        if not x:
            continue
        (line,) = ax.plot(x, [np.mean(points[at]) for at in x], marker="o", ms=3, label=name)
        low, high = [min(points[at]) for at in x], [max(points[at]) for at in x]
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _spread_axis(ax: Axes, values: Sequence[float]) -> None:
    """Noise levels over several powers of ten need a logarithmic axis that has a zero."""
    positive = [v for v in values if v > 0]
    if positive and max(positive) > 20 * min(positive):
        ax.set_xscale("symlog", linthresh=min(positive))


def _axes() -> tuple[Figure, Axes]:
    figure = blank_figure(6.4, 4.2, constrained=False)
    ax = figure.subplots()
    ax.grid(alpha=0.3)
    return figure, ax


def _save(figure: Figure, path: str | Path) -> None:
    save_figure(figure, path, dpi=DOTS_PER_INCH, tight=True)
