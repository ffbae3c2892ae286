"""Attacks at equal processor time: tables and pictures of what was recorded."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.show.statistics import Summary, summarize
from core.pictures import caption, save_gallery
from core.storage import load_checkpoint

RECONSTRUCTIONS = "reconstructions"
ORIGINAL = "original"
# Targets in the picture of several.
GALLERY = 8
# What differs in the names of targets of one kind.
_IMAGES = re.compile(r"_i\d+|, seed \d+")
# What is compared, with the decimals that tables show.
METRICS = (("psnr", "PSNR in dB", 2), ("ssim", "SSIM", 3))
FLAT = "flat colour"
# The SSIM whose first moment is looked for.
SEEN = 0.5
Row = dict[str, Any]


def reconstruction_file(
    folder: Path, checkpoint: str, attack: str, seed: int, seconds: float
) -> Path:
    """Where the reconstruction of one attack is kept, beside its originals."""
    name = f"{_stem(checkpoint)}_{attack.replace(':', '-')}_s{seed}_{seconds:g}s.pt"
    return folder / RECONSTRUCTIONS / name


def _stem(checkpoint: str) -> str:
    return checkpoint.removesuffix(".tar").split("-checkpoint")[0]


@dataclass(frozen=True)
class _Kept:
    """What one attack made of one target: images in the order of the originals, and scores."""

    originals: list[torch.Tensor]
    images: list[torch.Tensor]
    captions: list[str]


def draw(rows: list[Row], folder: Path) -> None:
    """A picture per target, and one of the first image of the first of every kind.

    Only of what all attacks have inverted in the longest time, and only where the
    reconstructions are kept.

    Args:
        rows: The record's.
        folder: Where the reconstructions are, and the pictures go.
    """
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    targets: dict[str, dict[str, _Kept]] = {}
    longest = max((row["budget_seconds"] for row in rows), default=0.0)
    for row in rows:
        kept = _kept(row, folder) if row["budget_seconds"] == longest else None
        if kept is not None:
            targets.setdefault(_target_name(row), {})[row["attack"]] = kept
    complete = {name: found for name, found in targets.items() if len(found) == len(attacks)}
    for name, found in complete.items():
        images = {attack: found[attack].images for attack in attacks}
        captions = {attack: found[attack].captions for attack in attacks}
        originals = {ORIGINAL: found[attacks[0]].originals}
        save_gallery(folder / f"{name}.png", originals | images, captions, title=name)
    first = {kind: name for name in reversed(complete) if (kind := _IMAGES.sub("", name))}
    if complete:
        shown = {kind: complete[name] for kind, name in reversed(first.items())}
        _draw_first_images(dict(list(shown.items())[:GALLERY]), attacks, folder)


def _draw_first_images(
    targets: dict[str, dict[str, _Kept]], attacks: list[str], folder: Path
) -> None:
    several = list(targets.values())
    rows = {ORIGINAL: [found[attacks[0]].originals[0] for found in several]}
    captions = {ORIGINAL: [name.replace("_", "\n", 1) for name in targets]}
    for attack in attacks:
        rows[attack] = [found[attack].images[0] for found in several]
        captions[attack] = [found[attack].captions[0] for found in several]
    save_gallery(folder / "gallery.png", rows, captions)


def _kept(row: Row, folder: Path) -> _Kept | None:
    names = row["checkpoint"], row["attack"], row["seed"], row["budget_seconds"]
    file = reconstruction_file(folder, *names)
    if not file.exists():
        return None
    tensors = load_checkpoint(file)
    captions = [caption(scores) for scores in row["evaluation"]["per_image"]]
    return _Kept(list(tensors["originals"]), list(tensors["images"]), captions)


def render_summary(rows: Sequence[Row]) -> str:
    """Per budget each attack's means over every kind of target, and how they differ.

    Intervals are 95 % bootstrap intervals over targets, of which each has images and a seed of
    its own. The first attack is compared with every other on the same targets.

    Args:
        rows: The record's.
    """
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    budgets = sorted({row["budget_seconds"] for row in rows})
    parts = []
    for budget in budgets:
        kinds = _kinds([row for row in rows if row["budget_seconds"] == budget], attacks)
        if not kinds:
            continue
        parts.append(f"## {budget:g} s of processor time\n")
        for metric, name, digits in METRICS:
            parts += [_means(kinds, attacks, metric, name, digits), ""]
        if len(attacks) > 1:
            parts += [_level(kinds, attacks), ""]
    everything = _kinds(rows, attacks)
    if everything and all(row.get("course") for row in rows):
        parts += [f"## Seconds of processor time to an SSIM of {SEEN:g}\n"]
        parts += [_times(everything, attacks), ""]
    return "\n".join(parts)


# Per kind of target and attack, its rows in the order of the targets.
Kinds = dict[str, dict[str, list[Row]]]


def _kinds(rows: Sequence[Row], attacks: Sequence[str]) -> Kinds:
    """Targets that every attack has seen, by what they share beside the images and the seed."""
    targets: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        targets.setdefault(_target_name(row), {}).setdefault(row["attack"], []).append(row)
    kinds: Kinds = {}
    for name, found in targets.items():
        if len(found) == len(attacks):
            kind = kinds.setdefault(_IMAGES.sub("", name), {a: [] for a in attacks})
            for attack in attacks:
                kind[attack] += found[attack]
    return kinds


def _score(row: Row, metric: str) -> float:
    return float(row["evaluation"]["summary"][metric]["mean"])


def _means(kinds: Kinds, attacks: Sequence[str], metric: str, name: str, digits: int) -> str:
    lines = [
        f"| {name} | targets | {' | '.join(attacks)} | {FLAT} |",
        f"| :--- | ---: |{' ---: |' * (len(attacks) + 1)}",
    ]
    for kind, found in kinds.items():
        cells = [_shown([_score(row, metric) for row in found[a]], digits) for a in attacks]
        flat = [row["evaluation"]["baselines"][FLAT][metric]["mean"] for row in found[attacks[0]]]
        cells.append(f"{statistics.mean(flat):.{digits}f}")
        lines.append(f"| {kind} | {len(flat)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(values: Sequence[float], digits: int, sign: str = "") -> str:
    return _interval(summarize(values), digits, sign)


def _interval(summary: Summary | None, digits: int, sign: str = "") -> str:
    if summary is None:
        return "–"
    mean = f"{summary.mean:{sign}.{digits}f}"
    if summary.low is None or summary.high is None:
        return mean
    return f"{mean} ({summary.low:{sign}.{digits}f} to {summary.high:{sign}.{digits}f})"


def _level(kinds: Kinds, attacks: Sequence[str]) -> str:
    """What the first attack has more than the others, and on how many kinds it is not behind."""
    first, *others = attacks
    columns = [f"{other}, {metric.upper()}" for other in others for metric in _NAMES]
    lines = [
        f"| {first} minus ... | {' | '.join(columns)} |",
        f"| :--- |{' ---: |' * (len(others) * len(METRICS))}",
    ]
    level = dict.fromkeys(_NAMES, 0)
    for kind, found in kinds.items():
        cells, behind = [], dict.fromkeys(_NAMES, False)
        for other in others:
            for metric, _, digits in METRICS:
                pairs = zip(found[first], found[other], strict=True)
                differences = [_score(a, metric) - _score(b, metric) for a, b in pairs]
                summary = summarize(differences)
                cells.append(_interval(summary, digits, "+"))
                behind[metric] |= _behind(summary)
        for metric in _NAMES:
            level[metric] += not behind[metric]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    counts = ", ".join(f"in {m.upper()} on {level[m]}" for m in _NAMES)
    lines += [
        "",
        f"`{first}` is best or level {counts} of {len(kinds)} rows: behind means that the",
        "interval of the difference to some other attack lies below 0.",
    ]
    return "\n".join(lines)


_NAMES = tuple(metric for metric, _, _ in METRICS)


def _behind(summary: Summary | None) -> bool:
    """Whether the whole interval of a difference lies below 0; of one value, the value."""
    assert summary is not None
    return (summary.mean if summary.high is None else summary.high) < 0


def _times(kinds: Kinds, attacks: Sequence[str]) -> str:
    lines = [
        f"| kind | targets | {' | '.join(attacks)} |",
        f"| :--- | ---: |{' ---: |' * len(attacks)}",
    ]
    for kind, found in kinds.items():
        cells = []
        for attack in attacks:
            earliest: dict[str, float] = {}
            for row in found[attack]:
                name = _target_name(row)
                earliest[name] = min(earliest.get(name, math.inf), _first_seen(row))
            times = list(earliest.values())
            seen = sum(math.isfinite(t) for t in times)
            # Of more than half: the median is one of them, and finite.
            middle = f", median {np.median(times):.1f} s" if 2 * seen > len(times) else ""
            cells.append(f"{seen} of {len(times)}{middle}")
        lines.append(f"| {kind} | {len(times)} | {' | '.join(cells)} |")
    lines += [
        "",
        "The earliest moment of all budgets at which the images on their way had it: how many",
        "targets ever did, and the median where more than half did.",
    ]
    return "\n".join(lines)


def _first_seen(row: Row) -> float:
    moments = [seconds for seconds, _, ssim in row["course"] if ssim >= SEEN]
    if _score(row, "ssim") >= SEEN:
        moments.append(row["cpu_seconds"])
    return min(moments, default=math.inf)


def _target_name(row: Row) -> str:
    name = _stem(row["checkpoint"])
    return f"{name}, seed {row['seed']}" if row["seed"] else name


def render(rows: list[Row]) -> str:
    """The rows as a Markdown table, mean over the images of each batch."""
    lines = [
        "| target | mode | batch | attack | iterations | CPU s | PSNR (dB) | SSIM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        target, summary = row["target"], row["evaluation"]["summary"]
        cells = [
            _target_name(row),
            "train" if target["train_mode"] else "eval",
            target["batch_size"],
            row["attack"],
            row["iterations"],
            f"{row['cpu_seconds']:.0f}",
            f"{summary['psnr']['mean']:.2f}",
            f"{summary['ssim']['mean']:.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
