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
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write table.md, and put tables into the two pages."""
    from benchmarks.speed.render import render
    from core.storage import write_text

    args = build_parser().parse_args(argv)
    records = read_records(Path(args.records))
    for flag, blocks in (("readme", readme_blocks), ("scaling", scaling_blocks)):
        page = Path(getattr(args, flag))
        if not page.exists():
            raise InputError(f"--{flag} {page}: there is no such file")
        write_text(page, renew(page.read_text(encoding="utf-8"), blocks(records)))
    write_text(Path(args.records) / "table.md", render(records))


def read_records(folder: Path) -> dict[str, Record]:
    """Every record of a folder, by the name of its section."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"--records {folder}: there are no records; run `-m benchmarks.speed`")
    return {file.stem: read_json_object(file, "--records", "record of speed") for file in files}


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
