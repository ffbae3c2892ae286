"""Command: run a job folder in NVFlare's simulator and say whether all of it worked.

python -m federated.simulate 1 jobs/cxr_1client exp1

The run's folder is 1clients_exp1, as published: the same name for another number of clients is
another folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError, exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser
from federated.experiment.run_results import missing_results, print_results, write_run
from federated.experiment.simulator import WORKSPACES, read_job, require_nvflare, simulate


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m federated.simulate",
        description="Run a job folder in NVFlare's simulator, every client in its own process.",
    )
    parser.add_argument("n_clients", type=int, help="number of clients in the job")
    parser.add_argument("job", type=Path, help="job folder, see federated.create_job_config")
    parser.add_argument("exp_name", help="the run's folder is N_CLIENTSclients_EXP_NAME")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove a former run of that name first"
    )
    parser.add_argument(
        "--workspaces", type=Path, default=WORKSPACES, help="folder for runs (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if the run left something out."""
    args = build_parser().parse_args(arguments)
    missing: list[str] = []
    status = exit_status(lambda: missing.extend(_run(args)))
    for what in missing:
        print(f"error: {printable(what)}", file=sys.stderr)
    return status or int(bool(missing))


def _run(args: argparse.Namespace) -> list[str]:
    job = read_job(args.job)
    if args.n_clients != len(job.sites):
        raise InputError(
            f"{args.n_clients} clients: the job {args.job} is for {len(job.sites)} "
            f"({', '.join(job.sites)})"
        )
    if Path(args.exp_name).name != args.exp_name:
        raise InputError(f"{args.exp_name!r}: must be the name of a folder, not a path")
    require_nvflare()
    name = f"{args.n_clients}clients_{args.exp_name}"
    workspace = (args.workspaces / name).resolve()
    print(printable(f"{len(job.sites)} clients, workspace {workspace}"), flush=True)
    _make_room(workspace, args.overwrite)
    simulate(job, workspace)
    missing = missing_results(job, workspace)
    if not missing:
        write_run(job, workspace)
    print_results(workspace)
    return missing


def _make_room(workspace: Path, overwrite: bool) -> None:
    """Remove a former run only where that was asked for, and say so."""
    if not workspace.exists():
        return
    if not overwrite:
        raise InputError(
            f"{workspace} holds a former run: give another EXP_NAME, or --overwrite to remove it"
        )
    print(printable(f"removing the former run in {workspace}"), flush=True)
    shutil.rmtree(workspace)
