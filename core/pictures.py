"""Pictures of a result: originals above reconstructions, and the run of an attack.

A sample of any shape fits in the cells: an image as it is, a volume as a row of slices, a
signal as one line per channel, a row of a table as a grid of its values in colours.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.errors import InputError
from core.figures import blank_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_INCHES = 1.35
_DPI = 120
# Slices of a volume in a row, from one end to the other; its picture is as many cells wide.
_SLICES = 5
# Most values of a table's row that are written into their squares.
_WRITTEN = 64


def read_image(path: str | Path, shape: tuple[int, ...], flag: str) -> torch.Tensor:
    """Read one image, scaled to the size of a target's.

    Args:
        path: PNG, JPEG or whatever Pillow reads.
        shape: C, H, W of the target's images; a target of any other number of channels than 3
            gets the grey image in all of them.
        flag: What the user gave it with, for messages.

    Returns:
        C x H x W in [0, 1].

    Raises:
        InputError: Missing, or no image; or the target's samples are no images.
    """
    import numpy as np

    from core.data.image_files import decoded

    if len(shape) != 3:
        raise InputError(
            f"{flag} {path}: an image does not fit a target whose samples have shape "
            f"{' x '.join(map(str, shape))}"
        )
    channels, height, width = shape
    mode = "RGB" if channels == 3 else "L"
    image = decoded(path, flag, lambda file: file.convert(mode).resize((width, height)))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    pixels = pixels.reshape(height, width, -1).permute(2, 0, 1)
    return pixels.expand(channels, height, width).contiguous()


def save_comparison(
    path: str | Path,
    originals: torch.Tensor,
    reconstructions: torch.Tensor,
    scores: Sequence[Mapping[str, Any]] | None = None,
    *,
    title: str = "",
    columns: int = 8,
    max_images: int = 64,
) -> None:
    """Write a grid: each original, below it its reconstruction with PSNR and SSIM.

    Args:
        path: PNG file, written atomically.
        originals: N x C x H x W in [0, 1], or signals, volumes or rows of a table.
        reconstructions: The same shape, in the same order (`images[evaluation.order]`).
        scores: `Evaluation.per_image`; nothing is written below the images if None.
        title: Above the grid.
        columns: Pairs per row.
        max_images: Pairs shown at most; the title says how many there are.

    Raises:
        InputError: The two batches differ in shape.
    """
    if originals.shape != reconstructions.shape:
        raise InputError(
            f"originals {tuple(originals.shape)} and reconstructions "
            f"{tuple(reconstructions.shape)} cannot stand side by side"
        )
    shown = min(len(originals), max_images)
    if shown < len(originals):
        title = f"{title} ({shown} of {len(originals)} images)".strip()
    wide = _cells_across(originals)
    columns = max(1, min(columns // wide, shown))
    bands = math.ceil(shown / columns)
    figure = _figure(columns * wide * _CELL_INCHES, bands * 2.3 * _CELL_INCHES + 0.5)
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index in range(shown):
        band, column = divmod(index, columns)
        _show(axes[2 * band][column], originals[index])
        scale = _scale(originals[index])
        _show(axes[2 * band + 1][column], reconstructions[index], scale)
        if scores is not None:
            axes[2 * band + 1][column].set_title(caption(scores[index]), y=-0.24, fontsize=7)
    for band in range(bands):
        for row, name in enumerate(("original", "reconstruction")):
            _name_row(axes[2 * band + row][0], name)
    _save(figure, title, path)


def save_gallery(
    path: str | Path,
    rows: Mapping[str, Sequence[torch.Tensor]],
    captions: Mapping[str, Sequence[str]] | None = None,
    *,
    title: str = "",
) -> None:
    """Write one row of images under another: the originals, and what each attack made of them.

    Args:
        path: PNG file, written atomically.
        rows: By name as many images (C x H x W in [0, 1], of any sizes; or other samples)
            as the first row has.
        captions: By the name of a row, what is written above its images.
        title: Above the grid.

    Raises:
        InputError: The rows differ in length.
    """
    count = len(next(iter(rows.values())))
    if any(len(images) != count for images in rows.values()):
        raise InputError("the rows of a gallery must hold equally many images")
    wide = max((_cells_across(images) for images in rows.values()), default=1)
    figure = _figure(count * wide * _CELL_INCHES + 0.3, len(rows) * 1.15 * _CELL_INCHES + 0.3)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for band, (name, images) in zip(axes, rows.items(), strict=True):
        texts = (captions or {}).get(name, [""] * count)
        for axis, image, text in zip(band, images, texts, strict=True):
            axis.set_axis_off()
            _show(axis, image)
            axis.set_title(text, fontsize=7, pad=2)
        _name_row(band[0], name)
    _save(figure, title, path)


def save_images(
    path: str | Path, images: torch.Tensor, *, title: str = "", columns: int = 8
) -> None:
    """Write a grid of images (N x C x H x W in [0, 1], or others) as a PNG, atomically."""
    _save(image_grid(images, columns=columns), title, path)


def image_grid(
    images: torch.Tensor, captions: Sequence[object] | None = None, *, columns: int = 8
) -> Figure:
    """Draw a grid of images.

    Args:
        images: N x C x H x W in [0, 1], or signals, volumes or rows of a table.
        captions: N texts or numbers above them.
        columns: Images per row.

    Returns:
        A figure of its own, which pyplot does not know.
    """
    wide = _cells_across(images)
    columns = max(1, min(columns // wide, len(images)))
    rows = math.ceil(len(images) / columns)
    figure = _figure(columns * wide * _CELL_INCHES, rows * _CELL_INCHES + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index < len(images):
            _show(axis, images[index])
            if captions is not None:
                axis.set_title(str(captions[index]), fontsize=7, pad=2)
    return figure


def as_html(figure: Figure) -> str:
    """A figure as an HTML image that needs no file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def save_curve(
    path: str | Path,
    trace: Sequence[Mapping[str, float]],
    *,
    title: str = "",
    x: str = "iteration",
    left: str = "objective",
    right: str = "psnr",
) -> None:
    """Write the run of an attack: the objective (logarithmic) and the PSNR per iteration.

    Args:
        path: PNG file, written atomically.
        trace: `Reconstruction.trace`: one dictionary per printed iteration. The right
            axis is left out where no entry has its key.
        title: Above the axes.
        x: Key of the abscissa.
        left: Key of the left axis.
        right: Key of the right axis.

    Raises:
        InputError: The trace has no finite value of `left`.
    """
    points = _points(trace, x, left)
    if not points:
        raise InputError(f"the trace has no finite {left} to draw")
    figure = _figure(6.0, 3.6)
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), color="tab:blue")
    axis.set_xlabel(x)
    axis.set_ylabel(left, color="tab:blue")
    if min(value for _, value in points) > 0:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    known = _points(trace, x, right)
    if known:
        twin = axis.twinx()
        twin.plot(*zip(*known, strict=True), color="tab:red")
        twin.set_ylabel("PSNR (dB)" if right == "psnr" else right, color="tab:red")
    _save(figure, title, path)


def _points(trace: Sequence[Mapping[str, float]], x: str, y: str) -> list[tuple[float, float]]:
    return [
        (float(entry[x]), float(entry[y]))
        for entry in trace
        if entry.get(y) is not None and math.isfinite(entry[y])
    ]


def _figure(width: float, height: float) -> Figure:
    return blank_figure(max(width, 2.5), height, dpi=_DPI)


def _cells_across(samples: Sequence[torch.Tensor] | torch.Tensor) -> int:
    """How many cells of the grid the picture of a sample is wide."""
    dims = samples[0].dim() - 1 if len(samples) else 2
    return {1: 2, 3: _SLICES}.get(dims, 1)


def _scale(sample: torch.Tensor) -> tuple[float, float]:
    """Values of the darkest and of the brightest, or of the lowest and of the highest point.

    0 and 1 where they suffice: of images, and of volumes.
    """
    finite = sample[sample.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if sample.dim() > 2 and low > -1e-3 and high < 1 + 1e-3:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _show(axis: Axes, sample: torch.Tensor, scale: tuple[float, float] | None = None) -> None:
    """Draw one sample by the number of its axes.

    Args:
        axis: Where to draw.
        sample: C x H x W, C x D x H x W, C x L or F.
        scale: See `_scale`; of the sample itself if None.
    """
    low, high = _scale(sample) if scale is None else scale
    plain = sample.detach().float().cpu()
    if plain.dim() == 2:
        _show_signal(axis, plain, low, high)
        return
    shares = ((plain - low) / (high - low)).nan_to_num(0.5).clamp(0, 1)
    if plain.dim() == 1:
        _show_row(axis, plain, shares)
    else:
        _show_image(axis, _side_by_side(shares) if plain.dim() == 4 else shares)


def _show_image(axis: Axes, shown: torch.Tensor) -> None:
    """Three channels as colours, any other number as the grey of their mean."""
    options: dict[str, Any] = {"vmin": 0, "vmax": 1, "interpolation": "nearest"}
    if len(shown) == 3:
        axis.imshow(shown.permute(1, 2, 0).numpy(), **options)
    else:
        axis.imshow(shown.mean(0).numpy(), cmap="gray", **options)


def _side_by_side(volume: torch.Tensor) -> torch.Tensor:
    """Slices of a volume (C x D x H x W) at even distances, as one image with white gaps."""
    channels, depth, height, width = volume.shape
    count = min(_SLICES, depth)
    # In the middle of as many parts of equal depth.
    places = [(2 * i + 1) * depth // (2 * count) for i in range(count)]
    gap = volume.new_ones((channels, height, max(1, width // 16)))
    parts = [part for place in places for part in (gap, volume[:, place])]
    return torch.cat(parts[1:], dim=-1)


def _show_signal(axis: Axes, signal: torch.Tensor, low: float, high: float) -> None:
    """One line per channel of C x L, on the scale from low to high."""
    for line in signal:
        axis.plot(line.numpy(), linewidth=0.8)
    margin = 0.05 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    axis.set_xlim(0, max(1, signal.shape[1] - 1))


def _show_row(axis: Axes, row: torch.Tensor, shares: torch.Tensor) -> None:
    """The values of a table's row in reading order as coloured squares, with their numbers."""
    columns = math.ceil(math.sqrt(len(row)))
    squares = shares.new_full((math.ceil(len(row) / columns) * columns,), float("nan"))
    squares[: len(row)] = shares
    axis.imshow(squares.view(-1, columns).numpy(), vmin=0, vmax=1, cmap="viridis")
    for index, value in enumerate(row.tolist() if len(row) <= _WRITTEN else []):
        down, across = divmod(index, columns)
        ink = "black" if shares[index] > 0.5 else "white"
        size = max(2.0, 22 / columns)
        axis.text(across, down, f"{value:.2g}", color=ink, fontsize=size, ha="center", va="center")


def caption(score: Mapping[str, Any]) -> str:
    """PSNR and SSIM (else NCC) in a few characters; a star where it was recovered exactly."""
    parts = []
    if score.get("psnr") is not None:
        parts.append(f"{score['psnr']:.1f} dB" + ("*" if score.get("exact") else ""))
    if score.get("ssim") is not None:
        parts.append(f"{score['ssim']:.2f}")
    elif score.get("ncc") is not None:
        parts.append(f"r {score['ncc']:.2f}")
    return " / ".join(parts) or "no score"


def _name_row(axis: Axes, name: str) -> None:
    axis.text(
        -0.06, 0.5, name, transform=axis.transAxes, rotation=90, ha="right", va="center", fontsize=7
    )


def _save(figure: Figure, title: str, path: str | Path) -> None:
    if title:
        figure.suptitle(title, fontsize=9)
    save_figure(figure, path)
