"""The page on what was tried in the attack `spectral`, from the committed table `ablation`.

`docs/generate.py` writes it. A change counts as better or worse on a kind of target where the 95 %
interval of its paired difference leaves out zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import row_of
from core.reading import read_json_object

TABLE = "ablation"
# The row that all others are compared with.
UNCHANGED = "as it is"


def page_of(folder: Path) -> str:
    """The page.

    Args:
        folder: Of the rendered table; without it the page says how to compute it.

    Raises:
        InputError: The table's file cannot be read.
    """
    path = folder / f"{TABLE}.json"
    if not path.exists():
        return _PAGE.format(measured=_UNMEASURED)
    stored = read_json_object(path, what=f"table {TABLE}")
    rows = {(r["labels"]["variant"], r["labels"]["kind"]): r for r in stored["rows"]}
    variants = list(dict.fromkeys(variant for variant, _ in rows if variant != UNCHANGED))
    kinds = list(dict.fromkeys(kind for _, kind in rows))
    header = ["change", *(f"{kind}, dB" for kind in kinds), "time"]
    lines = [row_of(header), row_of([":---", *("---:" for _ in kinds), "---:"])]
    lines.append(
        row_of([f"*{UNCHANGED}*", *(_level(rows[UNCHANGED, kind]) for kind in kinds), "1"])
    )
    for name in variants:
        changes = [_change(rows[name, kind]) for kind in kinds]
        lines.append(row_of([name, *changes, _cost(rows, name, kinds)]))
    judged = {name: [_sign(rows[name, kind]) for kind in kinds] for name in variants}
    return _PAGE.format(measured=_MEASURED.format(table="\n".join(lines), read=_reading(judged)))


def _reading(judged: Mapping[str, Sequence[int]]) -> str:
    """Who is better or worse, in words."""
    worse = [name for name, signs in judged.items() if -1 in signs and 1 not in signs]
    better = [name for name, signs in judged.items() if 1 in signs and -1 not in signs]
    mixed = [name for name, signs in judged.items() if 1 in signs and -1 in signs]
    level = [name for name, signs in judged.items() if not any(signs)]
    said = [
        ("worse on some kinds of targets and better on none", worse),
        ("better on some and worse on none", better),
        ("better on some and worse on others", mixed),
        ("level on all", level),
    ]
    return "\n".join(f"- {what}: {'; '.join(names) if names else 'none'}." for what, names in said)


def _level(row: Mapping[str, Any]) -> str:
    value = row["values"].get("psnr")
    return "–" if value is None else f"{value['mean']:.2f}"


def _change(row: Mapping[str, Any]) -> str:
    change = row.get("changes", {}).get("psnr")
    if change is None:
        return "–"
    text = f"{change['mean']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
    return f"**{text}**" if _sign(row) else text


def _sign(row: Mapping[str, Any]) -> int:
    """1 of what is better, -1 of what is worse, 0 where the interval holds zero."""
    change = row.get("changes", {}).get("psnr")
    if change is None or change["low"] is None:
        return 0
    return int(change["low"] > 0) - int(change["high"] < 0)


def _cost(rows: Mapping[tuple[str, str], Any], name: str, kinds: Sequence[str]) -> str:
    """Processor time in units of the attack's own, over all kinds of targets."""
    column = "attack.details.cpu_seconds"
    pairs = [(rows[name, kind]["values"].get(column), rows[UNCHANGED, kind]["values"].get(column))
             for kind in kinds]  # fmt: skip
    known = [(mine["mean"], whole["mean"]) for mine, whole in pairs if mine and whole]
    if not known:
        return "–"
    return f"{sum(mine for mine, _ in known) / sum(whole for _, whole in known):.1f}"


_UNMEASURED = """The table is not among the committed records yet. `python -m benchmarks ablation`
computes it."""

_MEASURED = """Mean PSNR of the attack as it is, then by how much each change moves it, with the
95 % interval of the paired difference; in bold where that leaves out zero (of so many cells a few
do by chance). The last column is processor time, the attack as it is being 1.
[All of it, with SSIM](../results/reference/ablation/ablation.md).

{table}

{read}"""

_PAGE = """# What was tried

<!-- Written by docs/generate.py. Change benchmarks/ablation.py or the table instead. -->

The parts of this project's attack [`spectral`](generated/attacks/spectral.md), each replaced by
something else: one change at a time, the same images, starts and iterations (600), known labels,
networks in evaluation mode. Eight targets of one photograph of 16 px and eight of four, three
starts each, of which the mean counts; a small convolutional network, initial and trained.

    python -m benchmarks ablation

{measured}

What is better here is no default yet: a default changes with evidence on more than one network.
Each row is a flag: weights that rise with depth are `--layers linear`.
What became of the contrast of single images in train mode are `spectral-2` and `spectral-3`
([how strong](how-strong.md#contrast-in-train-mode)). Not fading the whole batch's contrast, and
fitting contrast and brightness to the gradient at the end, were tried as well and did not help;
they are not in the code.
"""
