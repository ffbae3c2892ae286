"""Figures of a table: what was recovered, what it cost, how it went."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.declare.records import Run
from benchmarks.run.cells import Cell
from benchmarks.run.store import Store
from benchmarks.show import charts
from benchmarks.show.confidence import confidence
from benchmarks.show.pictures import Picture, save_picture
from benchmarks.show.results import RowResult, TableResult
from core.errors import InputError
from core.figures import subplots
from core.storage import load_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 8

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
    return [picture for name in names for picture in _DRAW[name](result, store, folder)]


def _reconstructions(result: TableResult, store: Store, folder: Path) -> Iterator[Picture]:
    """One picture per value of the first axis: originals above reconstructions."""
    axis = result.table.axes[0]
    values = dict.fromkeys(row.row.labels[axis] for row in result.rows)
    for value, stem in zip(values, _distinct_slugs(values), strict=True):
        rows = [row for row in result.rows if row.row.labels[axis] == value]
        strips = [(charts.labels_without(row, axis), _pairs(row, store)) for row in rows]
        strips = [(label, pairs) for label, pairs in strips if pairs]
        if strips:
            figure = _draw_strips(f"{axis}: {value}", strips)
            caption = f"{value}: originals above reconstructions, PSNR in dB and SSIM per image"
            file = folder / f"reconstructions-{stem}.png"
            yield save_picture(figure, file, caption, {axis: value})


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
    scores = Run({"attack": store.result(attack) or {}}).images
    if truth is None:
        return []
    found = store.input_file(attack, RECONSTRUCTION)
    images: Any = load_checkpoint(found, "--store").get("images")
    if getattr(images, "shape", None) != truth.images.shape:
        raise InputError(f"{found} does not hold the {len(truth.images)} images of its attack")
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
    figure, axes = subplots(2 * len(strips), columns, 1.25, 1.4)
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


_DRAW: dict[str, Draw] = {
    "rounds": charts.rounds,
    "reconstructions": _reconstructions,
    "tradeoff": charts.tradeoff,
    "bars": charts.bars,
    "heatmap": charts.heatmap,
    "curves": charts.curves,
    "lines": charts.lines,
    "confidence": confidence,
    "tokens_over_width": charts.tokens_over_width,
    "layers": charts.layers,
}


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
