"""Renew the tables of the pages that show speed, from the records.

python -m benchmarks.speed.pages
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.reading import read_json_object

Record = dict[str, Any]
# What the page on speed shows of the table.
SHOWN = (
    "convnet-32px-b1-eval",
    "convnet-32px-b32-train",
    "resnet18-32px-b1-eval",
    "resnet18-32px-b8-train",
    "resnet18-64px-b4-train",
    "resnet18-224px-b1-eval",
    "resnet18-224px-b4-train",
    "vgg11-32px-b1-eval",
)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.speed.pages", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--records", default="results/speed", metavar="DIR")
    parser.add_argument("--readme", default="docs/how-fast.md", metavar="FILE")
    parser.add_argument("--scaling", default="docs/scaling.md", metavar="FILE")
    parser.add_argument("--front", default="README.md", metavar="FILE")
    parser.add_argument("--limits", default="docs/how-to-read.md", metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write table.md, and put tables into the two pages."""
    from benchmarks.speed.render import render
    from core.storage import write_text

    args = build_parser().parse_args(argv)
    records = read_records(Path(args.records))
    gpu = gpu_records(Path(args.records))
    pages = {
        "readme": readme_blocks(records) | {"gpu": gpu_page(gpu)},
        "scaling": scaling_blocks(records),
        "front": {"gpu": f"{gpu_line(gpu)}\n"},
        "limits": {"gpu": f"{gpu_limit(gpu)}\n"},
    }
    for flag, blocks in pages.items():
        page = Path(getattr(args, flag))
        if not page.exists():
            raise InputError(f"--{flag} {page}: there is no such file")
        write_text(page, renew(page.read_text(encoding="utf-8"), blocks))
    write_text(Path(args.records) / "table.md", render(records))


def read_records(folder: Path) -> dict[str, Record]:
    """Every record of a folder, by the name of its section."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"--records {folder}: there are no records; run `-m benchmarks.speed`")
    return {file.stem: read_json_object(file, "--records", "record of speed") for file in files}


def gpu_records(folder: Path) -> dict[str, Record]:
    """The records of `make gpu`, by section; empty where no GPU has been measured."""
    files = sorted((folder / "gpu").glob("*.json"))
    read = {file.stem: read_json_object(file, "--records", "record of speed") for file in files}
    return {name: record for name, record in read.items() if _is_of_a_gpu(record)}


def _is_of_a_gpu(record: Record) -> bool:
    return bool(record.get("provenance", {}).get("device_type") == "cuda")


def gpu_line(records: dict[str, Record]) -> str:
    """One sentence for the front page: what was measured on a GPU, or that nothing was."""
    if not records:
        return (
            "No number here is from a GPU yet: `make gpu` measures all that waits for one, in at "
            "most 25 minutes."
        )
    device = next(iter(records.values()))["provenance"]["device"]
    told = []
    if "gpu-iterations" in records:
        ratios = [row["speedup_over_R1"] for row in records["gpu-iterations"]["rows"]]
        told.append(
            f"an iteration is {min(ratios):.1f} to {max(ratios):.1f} times as fast as the "
            "published loop's"
        )
    if "gpu-images" in records:
        row = records["gpu-images"]["rows"][0]
        told.append(
            f"{row['iterations']:,} iterations at {row['image_size']} px (batch {row['batch']}) "
            f"take {row['seconds']:.0f} s"
        )
    return f"On a GPU ({device}, `make gpu`): {'; '.join(told) or 'see the records'}."


def gpu_limit(records: dict[str, Record]) -> str:
    """The item of the page of limits."""
    measured = (
        "every number here but those that name a GPU was computed on a CPU"
        if records
        else "every number here was computed on a CPU"
    )
    return (
        f"- The same code is meant for CPU and CUDA, but {measured}. In CI all\n"
        "  stages run on a pretended accelerator, which refuses what a GPU refuses about devices\n"
        "  (`tests/pretended_device.py`); kernels, streams and memory it cannot show."
    )


def gpu_page(records: dict[str, Record]) -> str:
    """The tables of the page on speed; a sentence where there is none."""
    from benchmarks.speed.render import render

    shown = {name: record for name, record in records.items() if name != "gpu-iterations"}
    return f"{gpu_line(records)}\n\n{render(records)}" if shown else f"{gpu_line(records)}\n"


def readme_blocks(records: dict[str, Record]) -> dict[str, str]:
    """The table of iterations of the page on speed."""
    from benchmarks.speed.render import conditions, iterations_in_short

    record = records["iterations"]
    rows = {row["case"]: row for row in record["rows"]}
    shown = [rows[name] for name in SHOWN if name in rows]
    return {"speed": f"{iterations_in_short(shown)}\n{conditions(record)}\n"}


def scaling_blocks(records: dict[str, Record]) -> dict[str, str]:
    """The tables of the page on scaling."""
    from benchmarks.speed.render import SECTIONS, conditions
    from benchmarks.speed.scaling import machine_table, predicted_table

    predicted, measured = records["scaling"], records["processes"]
    draw = SECTIONS["processes"][1]
    return {
        "machine": machine_table(predicted["machine"]),
        "predicted": predicted_table(predicted["rows"]),
        "measured": f"{draw(measured['rows'])}\n{conditions(measured)}\n",
    }


def renew(page: str, blocks: dict[str, str]) -> str:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        InputError: A block has no place in the page.
    """
    for name, text in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise InputError(f"a page has no place for the table {name} ({begin})")
        page = f"{before}{begin}\n{text}{end}{after}"
    return page


if __name__ == "__main__":
    sys.exit(exit_status(main))
