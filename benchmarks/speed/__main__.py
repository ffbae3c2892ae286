"""Measure the speed of everything and write records and a table.

python -m benchmarks.speed            the full measurement, on an idle machine
python -m benchmarks.speed --quick    a few cases, two minutes
python -m benchmarks.speed --device cuda    iterations, restarts and levers on a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.sections import MEASUREMENTS, RESUMABLE, Request, sections_of
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.reading import read_json_object


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument(
        "--only", metavar="NAMES", help=f"sections, comma-separated: {', '.join(MEASUREMENTS)}"
    )
    parser.add_argument("--cases", metavar="NAMES", help="targets of the section iterations")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the sections gpu-..."
    )
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="per case, after three rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="keep what a record of this device holds already"
    )
    parser.add_argument("--output", default="results/speed", metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the sections; each writes its record and renews the table."""
    args = build_parser().parse_args(argv)
    sections = args.only.split(",") if args.only else sections_of(args.device)
    _check(args, sections)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    request, folder = _request(args), Path(args.output)
    for name in sections:
        _run_section(name, request, folder, args.resume)
    print((folder / "table.md").read_text(encoding="utf-8"))


def _check(args: argparse.Namespace, sections: list[str]) -> None:
    from benchmarks.speed.iterations import check_names

    unknown = [name for name in sections if name not in MEASUREMENTS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: unknown; known are {', '.join(MEASUREMENTS)}")
    if args.repeats < 1:
        raise InputError(f"--repeats {args.repeats}: must be at least 1")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads}: must be at least 1")
    check_names(args.cases.split(",") if args.cases else [])
    fixed = [name for name in sections if name not in RESUMABLE]
    if args.resume and fixed:
        raise InputError(f"--resume: the section {fixed[0]} is measured in one go")


def _request(args: argparse.Namespace) -> Request:
    return Request(
        quick=args.quick,
        cases=tuple(args.cases.split(",")) if args.cases else (),
        device=args.device,
        repeats=args.repeats,
        seconds=args.seconds,
        seed=args.seed,
    )


def _run_section(name: str, request: Request, folder: Path, resume: bool) -> None:
    from tqdm import tqdm

    from benchmarks.speed.pages import read_records
    from benchmarks.speed.render import render
    from core.storage import write_json, write_text

    made, path = _provenance(request), folder / f"{name}.json"
    rows = _rows_so_far(path, made) if resume else []
    if resume:
        request = dataclasses.replace(request, done=frozenset(row["case"] for row in rows))
    begun = len(rows)
    for row in tqdm(MEASUREMENTS[name](request), desc=name, unit="row"):
        rows.append(row)
        # What is measured stays, also where the rest is interrupted.
        write_json(path, {"rows": rows, "provenance": made, "complete": False})
    if len(rows) > begun:
        write_json(path, {"rows": rows, "provenance": made})
    write_text(folder / "table.md", render(read_records(folder)))


def _rows_so_far(path: Path, made: dict[str, Any]) -> list[dict[str, Any]]:
    """What an interrupted run of the same software on the same device left, by whole targets."""
    if not path.exists():
        return []
    record = read_json_object(path, "--output", "record of speed")
    rows: list[dict[str, Any]] = record["rows"]
    same = [record["provenance"].get(k) == made[k] for k in ("device", "versions", "quick")]
    if not all(same):
        return []
    if record.get("complete", True):
        return rows
    # The last one may lack some of its rows.
    return [row for row in rows if row["case"] != rows[-1]["case"]]


def _provenance(request: Request) -> dict[str, Any]:
    import os

    import torch

    from core.records import provenance

    return {
        **provenance(torch.device(request.device), request.seed),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "quick": request.quick,
    }


def _processor() -> str:
    """Its name as the operating system knows it."""
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(exit_status(main))
