"""The flags common to the three commands; without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import re


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
