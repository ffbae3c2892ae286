"""Command: a job folder for NVFlare from the template app.

python -m federated.create_job_config --n_clients 1 --num_rounds 3 --output jobs/cxr_1client
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.errors import exit_status
from federated.experiment.cli.job_flags import add_job_flags, federation_settings
from federated.experiment.job_folder import TEMPLATE, create_job


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m federated.create_job_config",
        description="Fill the template app in for a number of clients.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--app_folder", type=Path, default=TEMPLATE, help="folder with the template app")
    add("--output", type=Path, required=True, help="job folder to write; replaced if it is one")
    add("--sigma0", type=float, default=0.0, help="noise of GaussianPrivacy")
    add_job_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    clients = create_job(
        federation_settings(args), args.output, sigma0=args.sigma0, template=args.app_folder
    )
    inverted = [client.name for client in clients if client.invert]
    print(
        f"{args.output}: {len(clients)} clients ({', '.join(c.name for c in clients)}), "
        f"{args.num_rounds} rounds, sigma0 {args.sigma0:g}; "
        f"leakage is measured at {', '.join(inverted) or 'no client'}"
    )
