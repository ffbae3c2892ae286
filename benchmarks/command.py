"""`python -m benchmarks TABLE ...`: compute tables and show them."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.declare.tables import PRESETS, Table, find_table, load_table, table_files
from benchmarks.run.cells import ROOT, in_order
from benchmarks.run.executor import Executor, LocalExecutor, visible_gpus
from benchmarks.run.grid import Grid, Status
from benchmarks.run.progress import Progress
from benchmarks.run.stages import STAGES
from benchmarks.run.store import Store
from benchmarks.show.results import DEFAULT_STORE, TableResult, collect
from core.errors import InputError, exit_status
from core.storage import write_json, write_text

# Some cells failed; the table shows which.
INCOMPLETE = 1


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m benchmarks`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compute tables of results and render them; finished cells are reused.",
        epilog="Further commands: python -m benchmarks leaderboard, python -m benchmarks submit.",
    )
    parser.add_argument("table", nargs="*", help="name of a table, a YAML file of your own, or all")
    parser.add_argument("--list", action="store_true", help="list the tables and end")
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument("--data", help="folder or built-in data set instead of the preset's")
    parser.add_argument(
        "--output", type=Path, help="default: results/TABLE; several tables: OUTPUT/TABLE"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and end")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="where cells are kept")
    parser.add_argument("--jobs", type=int, help="cells at a time (default: one per GPU, else 1)")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--quiet", action="store_true", help="only errors and the table")
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    parser.add_argument("--address", help="Ray cluster: auto, HOST:PORT; default: start one here")
    parser.add_argument("--gpus-per-cell", type=float, help="Ray: may be a fraction")
    parser.add_argument(
        "--shared-data", action="store_true", help="Ray: every node sees --data at the same path"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 when cells failed, 2 on bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["leaderboard"], ["submit"]):
        from benchmarks.show import leaderboard

        return leaderboard.main(words)
    args = build_parser().parse_args(words)
    failed: list[bool] = []
    status = exit_status(lambda: failed.append(_run(args)))
    return status or (INCOMPLETE if any(failed) else 0)


def _run(args: argparse.Namespace) -> bool:
    """Compute and render; whether cells failed."""
    if args.list:
        _list_tables()
        return False
    tables = _tables(args)
    _check(args)
    signal.signal(signal.SIGTERM, _interrupt)
    store = Store(args.store.resolve())
    if args.dry_run:
        _say_commands(tables, store)
        return False
    failed = [_run_table(table, store, args, several=len(tables) > 1) for table in tables]
    return any(failed)


def _run_table(table: Table, store: Store, args: argparse.Namespace, several: bool) -> bool:
    statuses = _compute(table, store, args)
    result = collect(table, store)
    name = _folder_name(table)
    folder = ROOT / "results" / name
    if args.output is not None:
        folder = args.output / name if several else args.output
    write_outputs(result, store, folder)
    _show(result, statuses, folder, args.quiet)
    return any(s in (Status.FAILED, Status.BLOCKED) for s in statuses.values())


def _tables(args: argparse.Namespace) -> list[Table]:
    """Every table that was asked for, checked before the first is computed."""
    if not args.table:
        raise InputError(f"which table? Known are {', '.join(table_files())}; see --list")
    names = [*table_files()] if args.table == ["all"] else args.table
    return [load_table(find_table(name), args.preset, args.data) for name in names]


def _say_commands(tables: Sequence[Table], store: Store) -> None:
    """Print the commands of all cells that are not finished, each once."""
    labels = {key: label for table in tables for key, label in table.labels().items()}
    cells = in_order(cell for table in tables for cell in table.cells())
    folders = {name: path for table in tables for name, path in table.folders.items()}
    for cell in cells:
        state = "finished" if store.is_finished(cell) else "to do"
        inputs = {f: store.files(i.cell) / i.pattern for f, i in cell.inputs.items()}
        command = STAGES[cell.stage].command(cell.config, inputs, store.files(cell), folders)
        print(f"# {labels.get(cell.key, cell.stage)} ({state})\n{shlex.join(command)}")


def _check(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise InputError("--jobs must be at least 1")
    for flag, folder in (("--store", args.store), ("--output", args.output)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise InputError(f"{flag}: {folder} is a file, not a folder")
    if args.data is not None:
        _check_data(args.data)
    if args.executor == "local" and (args.address or args.gpus_per_cell):
        raise InputError("--address and --gpus-per-cell need --executor ray")


def _check_data(data: str) -> None:
    """Or every cell would fail, one after the other."""
    from core.data.data_sets import BUILT_IN

    if data not in BUILT_IN and not Path(data).exists():
        raise InputError(f"--data: there is no {data} (built-in names: {', '.join(BUILT_IN)})")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _list_tables() -> None:
    for name, path in table_files().items():
        table = load_table(path)
        cells = len(in_order(table.cells()))
        print(f"{name:24} {table.title} ({len(table.rows)} rows, {cells} cells embedded)")


def _folder_name(table: Table) -> str:
    return table.name if table.preset == PRESETS[0] else f"{table.name}-{table.preset}"


def _compute(table: Table, store: Store, args: argparse.Namespace) -> dict[str, Status]:
    progress = Progress(table.labels(), args.quiet)
    if all(store.is_finished(cell) for cell in table.cells()):
        # Looking for GPUs takes seconds that a finished table does not need.
        executor: Executor = LocalExecutor()
    else:
        executor = _executor(args)
    return Grid(
        table.cells(), store, executor, STAGES, progress, table.folders, args.retry_failed
    ).run()


def _executor(args: argparse.Namespace) -> Executor:
    if args.executor == "ray":
        from benchmarks.run.ray_executor import RayExecutor

        return RayExecutor(args.address, args.gpus_per_cell, args.jobs, args.shared_data)
    gpus = visible_gpus()
    return LocalExecutor(args.jobs or max(1, len(gpus)), gpus, os.cpu_count())


def write_outputs(result: TableResult, store: Store, folder: Path) -> None:
    """Write a table in every format, its figures and its report.

    Args:
        result: What to show.
        store: Where its cells are.
        folder: Where to; made if missing.
    """
    from benchmarks.show import figures, render, report

    text = render.to_text_table(result)
    name = result.table.name
    write_text(folder / f"{name}.txt", render.to_terminal(text) + "\n")
    write_text(folder / f"{name}.md", render.to_markdown(text))
    write_text(folder / f"{name}.tex", render.to_latex(text))
    write_text(folder / f"{name}.csv", render.to_csv(result))
    write_json(folder / f"{name}.json", render.to_json(result))
    pictures = figures.draw_figures(result, store, folder)
    write_text(folder / "report.html", report.to_html(result, pictures, store))


def _show(result: TableResult, statuses: dict[str, Status], folder: Path, quiet: bool) -> None:
    from benchmarks.show import render

    print(render.to_terminal(render.to_text_table(result)))
    if not quiet:
        counts = Counter(status.value for status in statuses.values())
        print(", ".join(f"{count} cells {status}" for status, count in counts.items()))
        print(f"tables, pictures and report: {os.path.relpath(folder)}/report.html")
    if any(status is Status.FAILED for status in statuses.values()):
        print("some cells failed; run again with --retry-failed to retry them", file=sys.stderr)
