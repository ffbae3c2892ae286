"""Attacks at equal processor time: tables and pictures of what was recorded."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.pictures import caption, save_gallery
from core.storage import load_checkpoint

RECONSTRUCTIONS = "reconstructions"
ORIGINAL = "original"
# Targets in the picture of several.
GALLERY = 8
# What differs in the names of targets of one kind.
_IMAGES = re.compile(r"_i\d+|, seed \d+")
# PSNR in dB and SSIM, means over the images of a batch.
Scores = tuple[float, float]


def reconstruction_file(folder: Path, checkpoint: str, attack: str, seed: int) -> Path:
    """Where the reconstruction of one attack is kept, beside its originals."""
    name = f"{_stem(checkpoint)}_{attack.replace(':', '-')}_s{seed}.pt"
    return folder / RECONSTRUCTIONS / name


def _stem(checkpoint: str) -> str:
    return checkpoint.removesuffix(".tar").split("-checkpoint")[0]


@dataclass(frozen=True)
class _Kept:
    """What one attack made of one target: images in the order of the originals, and scores."""

    originals: list[torch.Tensor]
    images: list[torch.Tensor]
    captions: list[str]


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """A picture per target, and one of the first image of the first targets.

    Only of what all attacks have inverted, and only where the reconstructions are kept.

    Args:
        rows: The record's.
        folder: Where the reconstructions are, and the pictures go.
    """
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    targets: dict[str, dict[str, _Kept]] = {}
    for row in rows:
        kept = _kept(row, folder)
        if kept is not None:
            targets.setdefault(_target_name(row), {})[row["attack"]] = kept
    complete = {name: found for name, found in targets.items() if len(found) == len(attacks)}
    for name, found in complete.items():
        images = {attack: found[attack].images for attack in attacks}
        captions = {attack: found[attack].captions for attack in attacks}
        originals = {ORIGINAL: found[attacks[0]].originals}
        save_gallery(folder / f"{name}.png", originals | images, captions, title=name)
    if complete:
        _draw_first_images(dict(list(complete.items())[:GALLERY]), attacks, folder)


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


def _kept(row: dict[str, Any], folder: Path) -> _Kept | None:
    file = reconstruction_file(folder, row["checkpoint"], row["attack"], row["seed"])
    if not file.exists():
        return None
    tensors = load_checkpoint(file)
    captions = [caption(scores) for scores in row["evaluation"]["per_image"]]
    return _Kept(list(tensors["originals"]), list(tensors["images"]), captions)


def render_summary(rows: list[dict[str, Any]]) -> str:
    """PSNR / SSIM of each attack: means over each kind of target, wins, and every target."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    targets = _scores_by_target(rows)
    lines = [
        f"| mean PSNR in dB / SSIM | targets | {' | '.join(attacks)} |",
        f"| :--- | ---: |{' ---: |' * len(attacks)}",
    ]
    for kind, group in _kinds(targets, attacks).items():
        means = [_shown(_mean(scores[attack] for scores in group)) for attack in attacks]
        lines.append(f"| {kind} | {len(group)} | {' | '.join(means)} |")
    for index, metric in enumerate(("PSNR", "SSIM")):
        wins = [str(_wins(targets, attack, index)) for attack in attacks]
        lines.append(f"| best in {metric} | {len(targets)} | {' | '.join(wins)} |")
    lines += ["", f"| target | {' | '.join(attacks)} |", f"| :--- |{' ---: |' * len(attacks)}"]
    for name, scores in targets.items():
        lines.append(f"| {name} | {' | '.join(_shown(scores.get(a)) for a in attacks)} |")
    return "\n".join(lines) + "\n"


def _scores_by_target(rows: list[dict[str, Any]]) -> dict[str, dict[str, Scores]]:
    targets: dict[str, dict[str, Scores]] = {}
    for row in rows:
        summary = row["evaluation"]["summary"]
        scores = summary["psnr"]["mean"], summary["ssim"]["mean"]
        targets.setdefault(_target_name(row), {})[row["attack"]] = scores
    return targets


def _kinds(
    targets: dict[str, dict[str, Scores]], attacks: list[str]
) -> dict[str, list[dict[str, Scores]]]:
    """Targets that every attack has seen, by what they share beside the images and the seed."""
    kinds: dict[str, list[dict[str, Scores]]] = {}
    for name, scores in targets.items():
        if len(scores) == len(attacks):
            kinds.setdefault(_IMAGES.sub("", name), []).append(scores)
    return kinds


def _mean(scores: Iterable[Scores]) -> Scores:
    psnr, ssim = zip(*scores, strict=True)
    return statistics.mean(psnr), statistics.mean(ssim)


def _shown(scores: Scores | None) -> str:
    return "–" if scores is None else f"{scores[0]:.2f} / {scores[1]:.3f}"


def _wins(targets: dict[str, dict[str, Scores]], attack: str, metric: int) -> int:
    """Targets on which no attack that ran is better."""
    won = 0
    for scores in targets.values():
        values = {name: value[metric] for name, value in scores.items()}
        won += len(values) > 1 and attack in values and values[attack] == max(values.values())
    return won


def _target_name(row: dict[str, Any]) -> str:
    name = _stem(row["checkpoint"])
    return f"{name}, seed {row['seed']}" if row["seed"] else name


def render(rows: list[dict[str, Any]]) -> str:
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
