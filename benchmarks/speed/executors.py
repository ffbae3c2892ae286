"""The same cells by the two executors on one machine: processes of its own, and a Ray cluster.

python -m benchmarks.speed.executors --executor ray
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import in_subprocess, medians, paired_ratio
from core.errors import exit_status
from core.launch_arguments import CommandParser

EXECUTORS = ("local", "ray")
# Eight gradients, and as many attacks of a few seconds.
_TABLE = "restarts"
_AXES = {
    "attack": {"spectral": {"attack": {"attack": "spectral", "n-seed": 1}}},
    "images": {
        "one": {"extract": {"batch-size": 1}},
        "two": {"extract": {"batch-size": 2}},
    },
}


def measure_executors(quick: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per executor, and how much longer Ray takes.

    Args:
        quick: One round of two cells.
        repeats: Rounds, in which the two take turns.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in EXECUTORS}
    for turn in range(1 if quick else repeats):
        for name in EXECUTORS[:: 1 if turn % 2 == 0 else -1]:
            words = ["--executor", name, *(["--quick"] if quick else [])]
            text = in_subprocess("benchmarks.speed.executors", *words)
            found[name].append(json.loads(text.splitlines()[-1]))
    times = {name: [run["cells_seconds"] for run in runs] for name, runs in found.items()}
    starts = medians({name: [run["start_seconds"] for run in runs] for name, runs in found.items()})
    middle = medians(times)
    for name in EXECUTORS:
        yield {
            "executor": name,
            "cells": int(found[name][0]["cells"]),
            "rounds": len(times[name]),
            "start_seconds": starts[name],
            "cells_seconds": middle[name],
            "over_local": paired_ratio(times[name], times["local"]),
        }


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.speed.executors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--executor", choices=EXECUTORS, default="local")
    parser.add_argument("--quick", action="store_true", help="two cells")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Compute the cells once, and print the seconds as JSON."""
    args = build_parser().parse_args(argv)
    print(json.dumps(_computed(args.executor, args.quick)))


def _computed(name: str, quick: bool) -> dict[str, float]:
    from benchmarks.compute import Workers
    from benchmarks.declare.tables import find_table, load_table
    from benchmarks.run.grid import Grid, Status
    from benchmarks.run.progress import Progress
    from benchmarks.run.stages import STAGES
    from benchmarks.run.store import Store

    table = load_table(find_table(_TABLE), axes=_AXES)
    chains = [list(run.values()) for row in table.rows for run in row.repeats]
    cells = [cell for chain in chains[: 1 if quick else None] for cell in chain]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        executor = Workers(ray=name == "ray").executor({STAGES[cell.stage] for cell in cells})
        started = time.perf_counter()
        grid = Grid(cells, Store(Path(folder)), executor, STAGES, Progress(table.labels(), True))
        statuses = grid.run()
        ended = time.perf_counter()
    failed = [status.value for status in statuses.values() if status is not Status.FINISHED]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(statuses)} cells: {failed[0]}")
    return {
        "cells": len(statuses),
        "start_seconds": started - begun,
        "cells_seconds": ended - started,
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
