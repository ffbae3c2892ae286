"""Hold models of every kind against plain double backward and write a record and a page.

python -m benchmarks.models                   all that the record does not hold yet
python -m benchmarks.models --only own        the modules of `benchmarks.models.own_modules`
python -m benchmarks.models --models swin_t   these again, whatever the record holds
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.models.cases import cases
from benchmarks.models.record import GROUPS, Record
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", metavar="GROUPS", help=f"groups, comma-separated: {', '.join(GROUPS)}"
    )
    parser.add_argument("--models", metavar="NAMES", help="models, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--memory",
        type=int,
        default=8,
        metavar="GIB",
        help="what the measurement of one model may take; 0: no limit (default 8)",
    )
    parser.add_argument("--output", default="results/models", metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure one model after the other; the record is renewed after each."""
    args = build_parser().parse_args(argv)
    groups = args.only.split(",") if args.only else list(GROUPS)
    names = args.models.split(",") if args.models else []
    _check(groups, args.threads, args.memory)
    from benchmarks.models.apart import measured_apart

    record = Record.read(Path(args.output))
    known = [case for case in cases() if case.group in groups]
    unknown = set(names) - {case.name for case in known}
    if unknown:
        raise InputError(f"--models {min(unknown)}: there is no such model in {', '.join(groups)}")
    for case in known:
        if case.name in names if names else not record.holds(case.group, case.name):
            found = list(measured_apart(case, args.threads, args.memory))
            # Another run may have written meanwhile.
            record = Record.read(Path(args.output))
            record.add(case.group, found)
            record.write()
            print(*map(str, found), sep="\n", flush=True)


def _check(groups: list[str], threads: int, memory: int) -> None:
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: unknown; known are {', '.join(GROUPS)}")
    if threads < 1:
        raise InputError(f"--threads {threads}: must be at least 1")
    if memory < 0:
        raise InputError(f"--memory {memory}: must be GiB, or 0 for no limit")


if __name__ == "__main__":
    sys.exit(exit_status(main))
