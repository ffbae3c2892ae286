"""A command whose ranks add numbers until they are told otherwise.

python -m tests.toy_ranks --folder DIR [--what KIND] and the flags of every command
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from core.errors import exit_status
from core.launch_arguments import CommandParser, LaunchSettings, add_launch_arguments
from core.processes.distributed import Process, all_reduce, barrier
from core.processes.launch import launch


def add_up(process: Process, folder: Path, what: str) -> None:
    """Say where this rank is, and sum for ever."""
    barrier()
    (folder / f"rank{process.rank}").write_text(str(os.getpid()))
    if what == "once":
        return
    while True:
        all_reduce(torch.ones(3))
        time.sleep(0.01)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--what", default="run")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--checkpoint")
    add_launch_arguments(parser)
    args = parser.parse_args(argv)
    settings = LaunchSettings.from_arguments(args)
    launch(add_up, settings, args.folder, args.what)


if __name__ == "__main__":
    sys.exit(exit_status(main))
