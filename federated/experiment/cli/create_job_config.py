"""Command: a job folder for NVFlare from the template app.

python -m federated.create_job_config --n_clients 1 --num_rounds 3 --output jobs/cxr_1client
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from core.errors import exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser, given_flags
from federated.experiment.cli.job_flags import add_job_flags, federation_settings
from federated.experiment.job_folder import TEMPLATE, create_job

# Measured with the phantoms: one image per step, 32 px, no noise.
WITHHOLDING = (
    "note: updates above --rdlv_threshold 1 stay at their site. Those of one image per step leak "
    "more than that (RDLV 1.14), so that the quick job withholds every update and its model does "
    "not learn; --rdlv_threshold 100 lets them pass, still measured, which gives curves"
)


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
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
    parser = build_parser()
    args = parser.parse_args(arguments)
    given = given_flags(parser, arguments)
    return exit_status(lambda: _run(args, given))


def _run(args: argparse.Namespace, given: Collection[str]) -> None:
    if (args.output / "meta.json").is_file():
        print(printable(f"{args.output}: the job folder that is there is replaced"))
    clients = create_job(
        federation_settings(args),
        args.output,
        sigma0=args.sigma0,
        template=args.app_folder,
        given=given,
    )
    inverted = [client.name for client in clients if client.invert]
    sentence = (
        f"{args.output}: {len(clients)} clients ({', '.join(c.name for c in clients)}), "
        f"{args.num_rounds} rounds, sigma0 {args.sigma0:g}; "
        f"leakage is measured at {', '.join(inverted) or 'no client'}"
    )
    print(printable(sentence))
    if inverted and "rdlv_threshold" not in given:
        print(WITHHOLDING)
