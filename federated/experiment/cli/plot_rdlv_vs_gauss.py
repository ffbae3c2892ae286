"""Command: draw the relative data leakage values of several runs over their noise.

python -m federated.plot_rdlv_vs_gauss --workspaces runs --output rdlv_vs_gauss.png
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
        prog="python -m federated.plot_rdlv_vs_gauss",
        description="Draw RDLV per site and the test accuracy over the noise level sigma0.",
    )
    parser.add_argument("--workspaces", default="workspaces", help="folder with one run per noise")
    parser.add_argument("--output", help="PNG to write; default: rdlv_vs_gauss.png in the folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from federated.experiment.figures import rdlv_vs_gauss
    from federated.experiment.runs import read_runs

    runs = read_runs(args.workspaces)
    output = Path(args.output or Path(args.workspaces) / "rdlv_vs_gauss.png")
    rdlv_vs_gauss(runs, output)
    levels = ", ".join(f"{run.sigma0:g}" for run in runs)
    print(printable(f"{output}: {len(runs)} runs, sigma0 {levels}"))
