"""Command: what each inversion method recovers from the same updates.

python -m federated.compare_methods --output results/methods

Written: methods.json with one entry per case, seed and method, and methods.png with
originals and reconstructions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import exit_status
from core.launch_arguments import CommandParser
from federated.experiment.method_comparison import METHODS, compare_all


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m federated.compare_methods",
        description="Compare inversion methods on the same updates of real local training.",
    )
    parser.add_argument("--output", required=True, help="folder for methods.json and methods.png")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--iterations", type=int, default=300, help="of every method")
    parser.add_argument("--seeds", type=int, default=3, help="number of networks and sites")
    parser.add_argument(
        "--images", help="folder with one folder of X-rays per class instead of the phantoms"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    compare_all(
        Path(args.output),
        images=args.images,
        size=args.size,
        iterations=args.iterations,
        seeds=args.seeds,
        methods=args.methods,
    )
