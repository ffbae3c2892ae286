"""Compare our attacks with what was published of them; write the record and its page.

python -m benchmarks fidelity                     the rows that a processor can compute, cheap first
python -m benchmarks fidelity --list              all rows: published, ours, verdict
python -m benchmarks fidelity --only r-gap,april  these rows
python -m benchmarks fidelity --device cuda       also those that need a GPU

What the record holds already is not computed again. Without `--data cifar10=DIR` embedded
photographs stand in for CIFAR-10, and the row says "other data".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import InputError
from core.launch_arguments import CommandParser, named_values

if TYPE_CHECKING:
    from benchmarks.fidelity.declare import Row
    from benchmarks.fidelity.record import Record
    from benchmarks.fidelity.run import Job

FOLDER = Path("results/fidelity")


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="ROW,...", help="these rows")
    parser.add_argument("--list", action="store_true", help="show all rows and end")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KIND=DIR",
        help="folder of class folders for cifar10 or imagenet; may be given twice",
    )  # fmt: skip
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE",
        help="trained weights of ImageNet for resnet18 or resnet50, the records for adult.data",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, help="at most so many of each row")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin no trial later")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--no-second", dest="second", action="store_false", help="leave other packages out"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing and print the table."""
    args = build_parser().parse_args(argv)
    _check(args)
    from benchmarks.fidelity.page import to_text
    from benchmarks.fidelity.record import Record
    from benchmarks.fidelity.rows import ROWS, find_row

    chosen = [find_row(name) for name in args.only.split(",")] if args.only else list(ROWS)
    record = Record.read(args.output)
    if not args.list:
        jobs = _jobs(args, chosen, record)
        _compute(jobs, record, None if args.budget is None else 60 * args.budget)
    print(to_text(chosen, record))


def _check(args: argparse.Namespace) -> None:
    if args.trials is not None and args.trials < 1:
        raise InputError("--trials must be at least 1")
    if args.budget is not None and not args.budget > 0:
        raise InputError("--budget must be above 0 minutes")
    for given in args.weights:
        if not Path(given.partition("=")[2]).is_file():
            raise InputError(f"--weights {given}: there is no such file")


def _jobs(args: argparse.Namespace, chosen: Sequence[Row], record: Record) -> list[Job]:
    import torch

    from benchmarks.fidelity.run import Request, jobs
    from benchmarks.fidelity.samples import KINDS, Samples

    if args.device not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    request = Request(
        rows=tuple(chosen),
        named=bool(args.only),
        samples=Samples(named_values("--data", args.data, KINDS)),
        weights={n: Path(f) for n, f in named_values("--weights", args.weights).items()},
        device=torch.device(args.device),
        trials=args.trials,
        second=args.second,
    )
    return jobs(request, record)


def _compute(jobs: Sequence[Job], record: Record, budget: float | None) -> None:
    from tqdm import tqdm

    from benchmarks.fidelity.run import run

    expected = sum(job.row.seconds for job in jobs) / 60
    print(f"{len(jobs)} trials to compute, about {expected:.0f} minutes of one core", flush=True)
    began = time.monotonic()
    for job in (bar := tqdm(jobs, desc="fidelity")):
        if budget is not None and time.monotonic() - began > budget:
            break
        bar.set_postfix_str(job.row.name)
        entry = run(job, record)
        tqdm.write(f"{entry.row} {entry.trial} {entry.implementation}: {entry.value:.3f}")
