"""The console script `gradinvbench`: all commands under one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from core.errors import InputError, exit_status
from core.version import __version__

# What each command does, and the module whose `main` takes its arguments.
COMMANDS = {
    "train": ("stage 1: train a client's model under a defense", "training.main_pytorch"),
    "extract": ("stage 2: compute what a client shares for a batch", "gradients.command"),
    "attack": ("stage 3: invert it and measure what was recovered", "attack.cli.command"),
    "audit": ("measure what a site's own update gives away", "audit.command"),
    "table": ("compute tables of results (from a checkout)", "benchmarks.command"),
    "leaderboard": ("show the leaderboard (from a checkout)", "benchmarks.command"),
}
CHECKOUT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with the arguments behind its name; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    status: list[int] = []
    failed = exit_status(lambda: status.append(_run(words[0], words[1:])))
    return failed or status[0]


def usage() -> str:
    """What `--help` prints."""
    lines = [f"  {name:12} {about}" for name, (about, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gradinvbench COMMAND [ARGUMENTS]   (gradinvbench COMMAND --help says which)",
            "",
            *lines,
        ]
    )


def _run(command: str, words: list[str]) -> int:
    if command not in COMMANDS:
        raise InputError(f"there is no command {command}; choose one of {', '.join(COMMANDS)}")
    module = COMMANDS[command][1]
    if module.startswith("benchmarks"):
        _find_checkout(command)
    run: Callable[[list[str]], int | None] = importlib.import_module(module).main
    return run(["leaderboard", *words] if command == "leaderboard" else words) or 0


def _find_checkout(command: str) -> None:
    """Make `benchmarks` importable, which is not installed with the other packages."""
    if not (CHECKOUT / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            f"gradinvbench {command} is run from a checkout of the repository: "
            "pip install -e . there"
        )
    # In front: Opacus installs a package of the same name.
    sys.path.insert(0, str(CHECKOUT))
