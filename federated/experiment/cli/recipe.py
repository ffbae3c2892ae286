"""Command: the experiment in Python, for people who do not want JSON.

python -m federated.recipe --n_clients 9 --num_rounds 3 --sigma0 0 0.3 1 3 --workspace DIR

Every noise level is a run of its own, DIR/sigma0_LEVEL, with a `run.json` that the figures
read. The sites run `federated.flare.client` on NVFlare's Client API under FedAvg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser
from federated.experiment.cli.job_flags import add_job_flags, federation_settings
from federated.experiment.recipe import run_experiments
from federated.experiment.simulator import WORKSPACES


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m federated.recipe",
        description="Run a federation for every noise level and record what it leaks.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workspace", type=Path, default=WORKSPACES / "recipe", help="folder for runs")
    add("--sigma0", type=float, nargs="+", default=[0.0], help="noise levels of GaussianPrivacy")
    add_job_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if a run left something out."""
    args = build_parser().parse_args(arguments)
    missing: list[str] = []
    status = exit_status(lambda: missing.extend(_run(args)))
    for what in missing:
        print(f"error: {printable(what)}", file=sys.stderr)
    return status or int(bool(missing))


def _run(args: argparse.Namespace) -> list[str]:
    return run_experiments(federation_settings(args), args.sigma0, args.workspace)
