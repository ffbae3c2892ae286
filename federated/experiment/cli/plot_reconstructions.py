"""Command: draw a site's images beside their reconstructions at every noise level.

python -m federated.plot_reconstructions --workspaces runs --site site-9
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m federated.plot_reconstructions",
        description="Draw a site's training images and what was reconstructed over sigma0.",
    )
    parser.add_argument("--workspaces", default="workspaces", help="folder with one run per noise")
    parser.add_argument("--site", default="site-9", help="whose images")
    parser.add_argument("--round", type=int, help="of which round; default: the first recorded")
    parser.add_argument("--output", help="PNG to write; default: reconstructions.png in the folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from federated.experiment.figures import reconstruction_table
    from federated.experiment.runs import read_runs

    runs = read_runs(args.workspaces)
    output = Path(args.output or Path(args.workspaces) / "reconstructions.png")
    reconstruction_table(runs, output, site=args.site, round_number=args.round)
    print(printable(f"{output}: {args.site} in {len(runs)} runs"))
