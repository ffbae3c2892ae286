"""Markdown tables of the speed records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _iterations(rows: list[Row]) -> str:
    header = ["case", "R1 ms", "R2 ms", "ours ms", "over R1", "over R2", "over breaching"]
    header += ["cosine to float64", "times roofline"]
    return table(
        header,
        [
            [
                row["case"],
                *(_ms(row["seconds"][name]) for name in ("R1", "R2", "ours")),
                _times(row["speedup_over_R1"]),
                _times(row["speedup_over_R2"]),
                _times(row.get("speedup_over_breaching")),
                f"{row['cosine_to_float64']:.6f}",
                _times(row["times_roofline"]),
            ]
            for row in rows
        ],
    )


def _small(rows: list[Row]) -> str:
    header = ["case", "breaching ms", "ours ms", "`--trace` ms", "over breaching"]
    header += ["`--trace` over breaching", "gain of `--trace`"]
    return table(
        header,
        [
            [
                row["case"],
                *(_ms(row["seconds"].get(name)) for name in ("breaching", "ours", "traced")),
                _times(row.get("ours_over_breaching")),
                _times(row.get("traced_over_breaching")),
                _times(row["traced_over_ours"]),
            ]
            for row in rows
        ],
    )


def iterations_in_short(rows: list[Row]) -> str:
    """The front page's columns of some cases."""
    header = ["case", "published, ms", "ours, ms", "faster", "than `breaching`"]
    return table(
        header,
        [
            [
                _spelled(row["case"]),
                *(_ms(row["seconds"][name]) for name in ("R1", "ours")),
                *(f"{row[f'speedup_over_{name}']:.1f} x" for name in ("R1", "breaching")),
            ]
            for row in rows
        ],
    )


def _spelled(case: str) -> str:
    """`resnet18-32px-b8-train` in words."""
    arch, size, batch, mode = case.rsplit("-", 3)
    name = _ARCHITECTURES.get(arch, arch)
    return f"{name}, {size[:-2]} px, batch {batch[1:]}{', train mode' if mode == 'train' else ''}"


_ARCHITECTURES = {"convnet": "ConvNet", "resnet18": "ResNet-18", "vgg11": "VGG-11"}
_RESTARTS = ("one by one", "together", "chosen", "halved")


def _restarts(rows: list[Row]) -> str:
    header = ["case", "restarts", "one ms", "one by one", "together", "as chosen"]
    header += ["as chosen, `--halving`", "times roofline"]
    return table(
        header,
        [
            [
                row["case"],
                row["restarts"],
                _ms(row["seconds"]["one"]),
                *(_times(row["times_one"].get(k)) for k in _RESTARTS),
                _times(row["times_roofline"]),
            ]
            for row in rows
        ],
    )


def _memory(rows: list[Row]) -> str:
    header = ["case", "method", "peak MiB", "imports", "model and target", "attack"]
    header += ["attack, share of R1's", "with model and target", "whole process", "iteration s"]
    base = {row["case"]: row for row in rows if row["method"] == "R1"}
    return table(
        header,
        [
            [
                row["case"],
                row["method"],
                *(round(part / 2**20) for part in (row["peak_bytes"], *_memory_parts(row))),
                *(_percent(row, base[row["case"]], less) for less in ("held", "import")),
                f"{100 * row['peak_bytes'] / base[row['case']]['peak_bytes']:.0f} %",
                f"{row['seconds']:.2f}" if "seconds" in row else "",
            ]
            for row in rows
        ],
    )


def _percent(row: Row, base: Row, less: str) -> str:
    """The peak beyond what was there before, as a share of another's."""
    own, other = (r["peak_bytes"] - r[f"{less}_bytes"] for r in (row, base))
    return f"{100 * own / max(1, other):.0f} %"


def _memory_parts(row: Row) -> tuple[int, int, int]:
    imports, held, peak = row["import_bytes"], row["held_bytes"], row["peak_bytes"]
    return imports, held - imports, peak - held


def _processes(rows: list[Row]) -> str:
    header = ["case", "processes", "iteration ms", "speed-up", "apart", "through sockets"]
    header += ["MB sent", "MB of parameters", "all-reduce of them, ms"]

    def speed_up(row: Row, kind: str) -> str:
        seconds = row["seconds"]
        # Measured in turns with the rest; alone, an iteration is the whole.
        whole = seconds.get("whole", seconds["iteration"])
        return _times(whole / seconds[kind]) if kind in seconds else ""

    return table(
        header,
        [
            [
                row["case"],
                row["processes"],
                _ms(row["seconds"]["iteration"]),
                *(speed_up(row, kind) for kind in ("iteration", "apart", "sockets")),
                f"{row['sent_bytes'] / 1e6:.1f}",
                f"{row['bytes'] / 1e6:.1f}",
                _ms(row["seconds"]["all-reduce"]) if row["processes"] > 1 else "",
            ]
            for row in rows
        ],
    )


def _levers(rows: list[Row]) -> str:
    header = ["lever", "case", "without ms", "with ms", "gain", "cosine to float64", "remark"]
    return table(
        header,
        [
            [
                row["lever"],
                row["case"],
                _ms(row["seconds"]["without"]),
                _ms(row["seconds"]["with"]),
                _times(row["gain"]),
                f"{row['cosine_to_float64']:.6f}" if "cosine_to_float64" in row else "",
                row.get("remark", ""),
            ]
            for row in rows
        ],
    )


def _parts(rows: list[Row]) -> str:
    return table(
        ["part", "figure", "unit"],
        [[row["part"], f"{row['value']:.4g}", row["unit"]] for row in rows],
    )


def _gpu_iterations(rows: list[Row]) -> str:
    header = ["case", "R1 ms", "R2 ms", "ours ms", "over R1", "cosine to float64", "peak MiB"]
    return table(
        header,
        [
            [
                row["case"],
                *(_ms(row["seconds"][name]) for name in ("R1", "R2", "ours")),
                _times(row["speedup_over_R1"]),
                f"{row['cosine_to_float64']:.6f}",
                _mib(row["peak_bytes"]["ours"]),
            ]
            for row in rows
        ],
    )


def _mib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else str(round(n_bytes / 2**20))


def _gpu_restarts(rows: list[Row]) -> str:
    header = ["case", "restarts", "ms", "ms per restart", "peak MiB"]
    return table(
        header,
        [
            [
                row["case"],
                row["restarts"],
                _ms(row["seconds"]),
                _ms(row["seconds"] / row["restarts"]),
                _mib(row["peak_bytes"]),
            ]
            for row in rows
        ],
    )


def _gpu_levers(rows: list[Row]) -> str:
    header = ["lever", "case", "ms", "gain", "first call s", "cosine to float64", "PSNR dB"]
    header += ["peak MiB", "what ran"]
    return table(
        header,
        [
            [
                row["lever"],
                row["case"],
                _ms(row["seconds"]),
                _times(row["gain"]),
                f"{row['first_call_seconds']:.1f}",
                f"{row['cosine_to_float64']:.6f}",
                f"{row['psnr']:.2f}",
                _mib(row["peak_bytes"]),
                "; ".join(row["events"]) or "as asked for",
            ]
            for row in rows
        ],
    )


def _targets(rows: list[Row]) -> str:
    header = ["case", "targets", "in turn ms", "at once ms", "at once, per target", "gain"]
    return table(
        header,
        [
            [
                row["case"],
                row["targets"],
                *(_ms(row["seconds"][way]) for way in ("in turn", "at once")),
                _ms(row["seconds"]["at once"] / row["targets"]),
                _times(row["gain"]),
            ]
            for row in rows
        ],
    )


def _executors(rows: list[Row]) -> str:
    header = ["executor", "cells", "rounds", "start s", "cells s", "time, local is 1"]
    return table(
        header,
        [
            [
                row["executor"],
                row["cells"],
                row["rounds"],
                f"{row['start_seconds']:.1f}",
                f"{row['cells_seconds']:.1f}",
                f"{row['over_local']:.2f}",
            ]
            for row in rows
        ],
    )


def _gpu_ranks(rows: list[Row]) -> str:
    alone = {row["case"]: row["seconds"] for row in rows if row["ranks"] == 1}
    return table(
        ["case", "ranks", "ms", "speed-up", "peak MiB of a rank"],
        [
            [
                row["case"],
                row["ranks"],
                _ms(row["seconds"]),
                _times(alone[row["case"]] / row["seconds"]),
                _mib(row["peak_bytes"]),
            ]
            for row in rows
        ],
    )


def _gpu_images(rows: list[Row]) -> str:
    header = ["images", "model", "px", "batch", "iterations", "seconds", "PSNR dB", "SSIM"]
    return table(
        [*header, "peak MiB"],
        [
            [
                row["source"],
                row["arch"],
                row["image_size"],
                row["batch"],
                row["iterations"],
                f"{row['seconds']:.0f}",
                f"{row['psnr']:.2f}",
                f"{row['ssim']:.3f}",
                _mib(row["peak_bytes"]),
            ]
            for row in rows
        ],
    )


SECTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "iterations": ("Seconds per iteration", _iterations),
    "small": ("Whole iterations of Inverting Gradients on small networks", _small),
    "restarts": ("Several restarts, in units of one", _restarts),
    "memory": ("Peak memory", _memory),
    "processes": ("One batch over several processes, one thread each", _processes),
    "levers": ("What each lever gave", _levers),
    "parts": ("The other parts", _parts),
    "targets": ("Several targets of one model", _targets),
    "executors": ("The same cells by the two executors", _executors),
    "gpu-iterations": ("On a GPU: seconds per iteration", _gpu_iterations),
    "gpu-restarts": ("On a GPU: restarts in one call", _gpu_restarts),
    "gpu-levers": ("On a GPU: what each lever gave", _gpu_levers),
    "gpu-targets": ("On a GPU: several targets of one model", _targets),
    "gpu-ranks": ("On a GPU: one batch over ranks that share the card", _gpu_ranks),
    "gpu-images": ("On a GPU: whole attacks", _gpu_images),
}


def render(records: dict[str, dict[str, Any]]) -> str:
    """All tables.

    Args:
        records: Record of each section, by its name in `SECTIONS`.
    """
    texts = []
    for name, (title, draw) in SECTIONS.items():
        if name in records:
            record = records[name]
            texts.append(f"## {title}\n\n{draw(record['rows'])}\n{conditions(record)}\n")
    return "\n".join(texts)


def conditions(record: dict[str, Any]) -> str:
    """What a record was measured on, in a sentence."""
    made = record["provenance"]
    if made.get("device_type") == "cuda":
        return f"{made['device']}, torch {made['versions']['torch']}."
    return (
        f"{made['processor']}, {made['cores']} cores, {made['threads']} threads, "
        f"torch {made['versions']['torch']}, load average {made['load_average']:.1f} at the start."
    )
