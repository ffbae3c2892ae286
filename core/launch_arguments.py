"""The flags common to the three commands; without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags common to the three commands."""
    # Before Python 3.14, argparse takes a number such as -1e-6 for a flag
    # (https://github.com/python/cpython/issues/105712).
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    group = parser.add_argument_group("processes and devices")
    group.add_argument("--seed", type=int, default=0, help="seed of every random number")
    group.add_argument("-p", "--print-freq", type=int, default=10, metavar="N")
    group.add_argument("--gpu", type=int, default=None, metavar="N", help="use this one GPU")
    group.add_argument("--world-size", type=int, default=1, help="number of nodes")
    group.add_argument("--rank", type=int, default=0, help="index of this node")
    group.add_argument("--dist-url", default="tcp://127.0.0.1:10023", help="port 0: any free port")
    group.add_argument("--dist-backend", choices=["nccl", "gloo"], default=None)
    group.add_argument("--multiprocessing-distributed", action="store_true")
    group.add_argument(
        "--nproc-per-node", type=int, default=None, help="processes on this node (default: GPUs)"
    )
    group.add_argument("--cpu", action="store_true", help="do not use a GPU even if there is one")


class _NothingGiven(argparse.Namespace):
    """Claims to hold every value already, so that argparse sets no default."""

    def __getattr__(self, name: str) -> None:
        # Names of argparse's own begin with an underscore.
        if name.startswith("_"):
            raise AttributeError(name)


def given_flags(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> dict[str, Any]:
    """What was really given on the command line, without any default.

    Args:
        parser: The command's parser; none of its flags collects values in a list.
        words: Of the command line; None: those of this process.

    Returns:
        Values under the names that argparse gives them.
    """
    return dict(vars(parser.parse_args(words, _NothingGiven())))
