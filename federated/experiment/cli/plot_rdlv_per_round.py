"""Command: draw the relative data leakage values of a run over its rounds.

python -m federated.plot_rdlv_per_round --workspace runs/exp1 --output rdlv_per_round.png
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
        prog="python -m federated.plot_rdlv_per_round",
        description="Draw RDLV per federated round, a line per site, from a run's workspace.",
    )
    parser.add_argument("--workspace", required=True, help="folder of one run")
    parser.add_argument("--output", help="PNG to write; default: rdlv_per_round.png in the folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from audit.leakage import read_leakage
    from federated.experiment.figures import rdlv_per_round

    records = read_leakage(args.workspace)
    output = Path(args.output or Path(args.workspace) / "rdlv_per_round.png")
    rdlv_per_round(records, output)
    print(printable(f"{output}: {len(records)} results"))
