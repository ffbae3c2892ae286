"""Figures of a table: what was recovered, what it cost, how it went."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cells import Cell
from benchmarks.columns import dig, find_column, measured_leakage
from benchmarks.report import Picture
from benchmarks.results import RowResult, TableResult
from benchmarks.statistics import summarize
from benchmarks.store import Store
from training.storage import atomic_file, load_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 8
LEAKAGE = "ssim"
UTILITY = "validation accuracy"
# Matplotlib's cycle of colours begins anew after ten lines.
N_COLOURS = 10
LINE_STYLES = ("-", "--", ":")

Draw = Callable[[TableResult, Store, Path], Iterator[Picture]]


@dataclass(frozen=True)
class Pair:
    """An original beside its reconstruction.

    Attributes:
        original: H x W x C in [0, 1].
        reconstruction: The one assigned to it, H x W x C in [0, 1].
        scores: Metrics of this image.
    """

    original: np.ndarray
    reconstruction: np.ndarray
    scores: Mapping[str, Any]


def draw_figures(result: TableResult, store: Store, folder: Path) -> list[Picture]:
    """Draw a table's figures into `folder`; a figure without data is left out."""
    names = result.table.figures
    return [picture for name in names for picture in FIGURES[name](result, store, folder)]


def _reconstructions(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """One picture per value of the first axis: originals above reconstructions."""
    axis = result.table.axes[0]
    values = dict.fromkeys(row.row.labels[axis] for row in result.rows)
    for value, stem in zip(values, _distinct_slugs(values), strict=True):
        rows = [row for row in result.rows if row.row.labels[axis] == value]
        strips = [(_rest(row, axis), _pairs(row, store)) for row in rows]
        strips = [(label, pairs) for label, pairs in strips if pairs]
        if strips:
            path = folder / f"reconstructions-{stem}.png"
            _save(_draw_strips(f"{axis}: {value}", strips), path)
            caption = f"{value}: originals above reconstructions, PSNR in dB and SSIM per image"
            yield Picture(path, caption, {axis: value})


def _rest(row: RowResult, axis: str) -> str:
    return ", ".join(value for name, value in row.row.labels.items() if name != axis)


def _pairs(row: RowResult, store: Store) -> list[Pair]:
    pairs = [pair for cells in row.row.repeats for pair in _pairs_of(cells, store)]
    return pairs[:MAX_IMAGES]


def _pairs_of(cells: Mapping[str, Cell], store: Store) -> list[Pair]:
    """The originals of one attack with the reconstructions assigned to them."""
    if not {"extract", "attack"} <= cells.keys() or not store.is_finished(cells["attack"]):
        return []
    from gradients.checkpoint import load_target

    attack = cells["attack"]
    checkpoint = attack.inputs["checkpoint"]
    truth = load_target(store.input_file(checkpoint.cell, checkpoint.pattern))[1]
    record = store.record(attack) or {}
    scores = dig(record, "result.evaluation.per_image") or []
    if truth is None:
        return []
    images = load_checkpoint(store.input_file(attack, RECONSTRUCTION))["images"]
    order = [s.get("reconstruction") for s in scores]
    return [
        Pair(_picture(truth.images[s["index"]]), _picture(images[index]), s)
        for s, index in zip(scores, order, strict=True)
        if index is not None
    ]


RECONSTRUCTION = "reconstruction.pt"


def _picture(image: Any) -> np.ndarray:
    return image.detach().float().clamp(0, 1).permute(1, 2, 0).numpy()


def _draw_strips(title: str, strips: Sequence[tuple[str, list[Pair]]]) -> Figure:
    columns = max(len(pairs) for _, pairs in strips)
    figure, axes = _subplots(2 * len(strips), columns, 1.25, 1.4)
    for index, (label, pairs) in enumerate(strips):
        for column in range(columns):
            above, below = axes[2 * index][column], axes[2 * index + 1][column]
            for ax in (above, below):
                ax.axis("off")
            if column < len(pairs):
                _show(above, pairs[column].original, label if column == 0 else "")
                _show(below, pairs[column].reconstruction, _score_text(pairs[column].scores))
    figure.suptitle(title, fontsize=10)
    return figure


def _show(ax: Any, image: np.ndarray, title: str) -> None:
    # Nearest: the reader shall see pixels, not an interpolation of them.
    ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, fontsize=7, pad=2, loc="left")


def _score_text(scores: Mapping[str, Any]) -> str:
    psnr, ssim = scores.get("psnr"), scores.get("ssim")
    texts = [f"{psnr:.1f} dB" if psnr is not None else "", f"{ssim:.2f}" if ssim else ""]
    return " ".join(filter(None, texts))


def _tradeoff(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """What was leaked against what the model is worth, a point per row."""
    points = [(row, _mean(row, UTILITY), _mean(row, LEAKAGE)) for row in result.rows]
    points = [p for p in points if not math.isnan(p[1]) and not math.isnan(p[2])]
    if not points:
        return
    figure, axes = _subplots(1, 1, 5.5, 3.8)
    ax = axes[0][0]
    for row, utility, leakage in points:
        ax.errorbar(utility, leakage, yerr=_whiskers(row, leakage), fmt="o", capsize=2)
        ax.annotate(" ".join(row.row.labels.values()), (utility, leakage), fontsize=7,
                    xytext=(4, 4), textcoords="offset points")  # fmt: skip
    ax.set(xlabel=f"{UTILITY} (%)", ylabel="SSIM of reconstructions (higher: more leaked)")
    # Room for the names at the right.
    ax.margins(x=0.3, y=0.1)
    path = folder / "tradeoff.png"
    _save(figure, path)
    yield Picture(path, "Privacy against utility: mean SSIM with its 95 % interval")


def _mean(row: RowResult, name: str) -> float:
    column = find_column(name)
    summary = summarize([v for run in row.runs for v in column.values(run) if v is not None])
    return summary.mean if summary else math.nan


def _whiskers(row: RowResult, mean: float) -> list[list[float]] | None:
    column = find_column(LEAKAGE)
    summary = summarize([v for run in row.runs for v in column.values(run) if v is not None])
    if summary is None or summary.low is None or summary.high is None:
        return None
    return [[max(0.0, mean - summary.low)], [max(0.0, summary.high - mean)]]


def _bars(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage of every row, with the baselines as lines."""
    rows = [(row, _mean(row, LEAKAGE)) for row in result.rows]
    rows = [(row, mean) for row, mean in rows if not math.isnan(mean)]
    if not rows:
        return
    figure, axes = _subplots(1, 1, 6, 0.35 * len(rows) + 1.2)
    ax = axes[0][0]
    for place, (row, mean) in enumerate(rows):
        ax.barh(place, mean, xerr=_whiskers(row, mean), capsize=2)
    ax.set_yticks(range(len(rows)), [" ".join(r.row.labels.values()) for r, _ in rows], fontsize=7)
    ax.invert_yaxis()
    for number, (name, metrics) in enumerate(result.baselines.items()):
        if LEAKAGE in metrics:
            ax.axvline(metrics[LEAKAGE].mean, ls=[":", "--", "-."][number % 3], c="k", label=name)
    if result.baselines:
        ax.legend(fontsize=7)
    ax.set_xlabel("SSIM (mean and 95 % interval)")
    path = folder / "bars.png"
    _save(figure, path)
    yield Picture(path, "Mean SSIM of the reconstructions; lines: guesses without the gradient")


def _curves(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Objective, and PSNR where it was traced, over the iterations of the first repeat."""
    traces = [(row, _trace(row)) for row in result.rows]
    traces = [(row, trace) for row, trace in traces if trace]
    quantities = [q for q in ("objective", "psnr") if any(q in p for _, t in traces for p in t)]
    if not quantities:
        return
    figure, axes = _subplots(1, len(quantities), 4.5, 3.4)
    for ax, quantity in zip(axes[0], quantities, strict=True):
        for number, (row, trace) in enumerate(traces):
            points = [(p["iteration"], p[quantity]) for p in trace if p.get(quantity) is not None]
            if points:
                name = " ".join(row.row.labels.values())
                style = LINE_STYLES[number // N_COLOURS % len(LINE_STYLES)]
                ax.plot(*zip(*points, strict=True), style, label=name, lw=1)
        ax.set(xlabel="iteration", ylabel=quantity)
        if quantity == "objective":
            ax.set_yscale("log")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=6, loc="outside right upper")
    path = folder / "curves.png"
    _save(figure, path)
    yield Picture(path, f"{' and '.join(quantities)} over the iterations of the attack")


def _trace(row: RowResult) -> list[Mapping[str, float]]:
    """Points of the first repeat: what the attack saw, and the PSNR seen from outside."""
    attack = row.runs[0].get("attack", {}) if row.runs else {}
    return [*(attack.get("trace") or []), *(attack.get("psnr_curve") or [])]


def _lines(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage along the last axis, a line per value of the others."""
    axis = result.table.axes[-1]
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in result.rows:
        mean = _mean(row, LEAKAGE)
        if not math.isnan(mean):
            name = ", ".join(v for a, v in row.row.labels.items() if a != axis)
            groups.setdefault(name, []).append((row.row.labels[axis], mean))
    if not groups:
        return
    figure, axes = _subplots(1, 1, 5.5, 3.6)
    for name, points in groups.items():
        axes[0][0].plot(*zip(*points, strict=True), "o-", label=name)
    axes[0][0].set(xlabel=axis, ylabel="SSIM (higher: more leaked)")
    if any(groups):
        axes[0][0].legend(fontsize=7)
    path = folder / "lines.png"
    _save(figure, path)
    yield Picture(path, f"Mean SSIM of the reconstructions by {axis}")


def _layers(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """The rank-analysis index of every layer, a panel per row."""
    analyses = [(row, dig(row.runs[0], "extract.rank_analysis.layers")) for row in result.rows]
    analyses = [(row, layers) for row, layers in analyses if layers]
    if not analyses:
        return
    figure, axes = _subplots(len(analyses), 1, 6.5, 1.5)
    for (ax,), (row, layers) in zip(axes, analyses, strict=True):
        ax.bar(range(1, len(layers) + 1), [layer["index"] for layer in layers])
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(", ".join(row.row.labels.values()), fontsize=7, loc="left")
        # Indices span orders of magnitude on both sides of zero.
        ax.set_yscale("symlog", linthresh=10)
        ax.tick_params(labelsize=6)
    axes[-1][0].set_xlabel("layer")
    path = folder / "layers.png"
    _save(figure, path)
    yield Picture(path, "Rank-analysis index per layer (above zero: underdetermined)")


def _rounds(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """Leakage over the rounds of a federation: a panel per row, a line per site."""
    rows = [row for row in result.rows if row.runs and dig(row.runs[0], "federated.leakage")]
    if not rows:
        return
    figure, axes = _subplots(1, len(rows), 3.2, 2.8)
    for ax, row in zip(axes[0], rows, strict=True):
        run = row.runs[0]
        for site in sorted({entry["site"] for entry in run["federated"]["leakage"]}):
            entries = [e for e in measured_leakage(run, site) if e["rdlv"] is not None]
            rounds = [entry["round"] for entry in entries]
            ax.plot(rounds, [entry["rdlv"] for entry in entries], "o-", ms=3, label=site)
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(", ".join(row.row.labels.values()), fontsize=8)
        ax.set_xlabel("round")
    lowest, highest = zip(*(ax.get_ylim() for ax in axes[0]), strict=True)
    for ax in axes[0]:
        ax.set_ylim(min(lowest), max(highest))
    axes[0][0].set_ylabel("RDLV (largest of the site's images)")
    axes[0][0].legend(fontsize=7)
    path = folder / "rounds.png"
    _save(figure, path)
    yield Picture(path, "Relative data leakage value over the rounds of the federation")


FIGURES: dict[str, Draw] = {
    "rounds": _rounds,
    "reconstructions": _reconstructions,
    "tradeoff": _tradeoff,
    "bars": _bars,
    "curves": _curves,
    "lines": _lines,
    "layers": _layers,
}


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    # The Figure class draws to files without a display and without pyplot's global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _distinct_slugs(texts: Iterable[str]) -> list[str]:
    """A file name for every text; "0.1" and "-0.1" would share one."""
    slugs: list[str] = []
    for text in texts:
        plain = _slug(text)
        same = (f"{plain}-{count}".strip("-") for count in itertools.count(2))
        slugs.append(
            plain if plain and plain not in slugs else next(s for s in same if s not in slugs)
        )
    return slugs


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
