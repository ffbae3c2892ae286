"""Recover the labels of many batches by every rule, and write a record and a page.

python -m benchmarks.label_rules                     all that the record does not hold yet
python -m benchmarks.label_rules --batches 64        more batches of every setting
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.label_rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", type=int, default=16, help="of every setting (default 16)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="results/label_rules", metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure one setting after the other; the record is renewed after each."""
    args = build_parser().parse_args(argv)
    for flag, value in (("--batches", args.batches), ("--threads", args.threads)):
        if value < 1:
            raise InputError(f"{flag} {value}: must be at least 1")
    import torch

    from benchmarks.label_rules.measure import measure, settings
    from benchmarks.label_rules.record import DEFAULT, Record

    torch.set_num_threads(args.threads)
    # What a sign rule says of signed features, once per batch.
    logging.getLogger("attack.knowledge.labels").setLevel(logging.ERROR)
    record = Record.read(Path(args.output))
    for setting in settings():
        if not record.holds(setting, args.batches):
            cell = measure(setting, args.batches)
            record.add(cell)
            print(f"{setting}: {DEFAULT} {np.mean(cell.accuracy[DEFAULT]):.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
