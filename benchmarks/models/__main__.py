"""Hold models of every kind against plain double backward and write a record and a page.

python -m benchmarks.models                   all that the record does not hold yet
python -m benchmarks.models --only own        the modules of `benchmarks.models.own_modules`
python -m benchmarks.models --models swin_t   these again, whatever the record holds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

from benchmarks.models.record import GROUPS, Record
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser


class _Case(NamedTuple):
    """A model to be measured, see `benchmarks.models.measure.agreements`."""

    group: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_classes: int


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
    parser.add_argument("--output", default="results/models", metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure one model after the other; the record is renewed after each."""
    args = build_parser().parse_args(argv)
    groups = args.only.split(",") if args.only else list(GROUPS)
    names = args.models.split(",") if args.models else []
    _check(groups, args.threads)
    import torch

    from benchmarks.models.measure import agreements

    torch.set_num_threads(args.threads)
    record = Record.read(Path(args.output))
    cases = [case for case in _cases() if case.group in groups]
    unknown = set(names) - {case.name for case in cases}
    if unknown:
        raise InputError(f"--models {min(unknown)}: there is no such model in {', '.join(groups)}")
    for group, *case in cases:
        if case[0] in names if names else not record.holds(group, str(case[0])):
            found = list(agreements(*case))  # type: ignore[arg-type]
            record.add(group, found)
            record.write()
            print(*map(str, found), sep="\n", flush=True)


def _check(groups: list[str], threads: int) -> None:
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: unknown; known are {', '.join(GROUPS)}")
    if threads < 1:
        raise InputError(f"--threads {threads}: must be at least 1")


def _cases() -> Iterator[_Case]:
    from benchmarks.models import own_modules, published

    shape = (own_modules.CHANNELS, own_modules.SIDE, own_modules.SIDE)
    for name, build in own_modules.OWN_MODULES.items():
        yield _Case("own", name, build, shape, own_modules.N_CLASSES)
    libraries = {
        "torchvision": published.torchvision_classifiers(),
        "timm": published.timm_classifiers(),
    }
    for group, models in libraries.items():
        for model in models:
            shape = (3, model.side, model.side)
            yield _Case(group, model.name, model.build, shape, published.N_CLASSES)


if __name__ == "__main__":
    sys.exit(exit_status(main))
