"""`python -m benchmarks TABLE ...`: compute tables and show them."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from benchmarks.compute import Workers, compute, say_costs
from benchmarks.declare.tables import PRESETS, Table, find_table, load_table, table_files
from benchmarks.run.cells import ROOT, in_order
from benchmarks.run.committed import Committed
from benchmarks.run.costs import NONE, seconds_of
from benchmarks.run.grid import Status
from benchmarks.run.stages import STAGES
from benchmarks.run.store import Store
from benchmarks.show.leaderboard import FOLDER, load_entry, show
from benchmarks.show.output import write_outputs
from benchmarks.show.render import to_terminal, to_text_table
from benchmarks.show.results import DEFAULT_STORE, TableResult, collect
from core.errors import InputError, exit_status
from core.escaping import in_one_line, printable
from core.launch_arguments import CommandParser

if TYPE_CHECKING:
    from benchmarks.submission import Defended, Desk, Measurement

# Some cells failed; the table shows which.
INCOMPLETE = 1


def build_parser() -> CommandParser:
    """The command line of `python -m benchmarks`."""
    parser = CommandParser(
        prog="python -m benchmarks",
        description="Compute tables of results and render them; finished cells are reused.",
        epilog="Further commands: python -m benchmarks leaderboard, submit, fidelity and "
        "vendor_defaults.",
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
    parser.add_argument(
        "--jobs", type=int, help="cells at a time (default: one per GPU, else per core)"
    )
    parser.add_argument(
        "--targets-at-once",
        type=int,
        default=1,
        metavar="N",
        help="targets of one model that a process attacks at once; small networks gain by it",
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="begin no cell after 30m, 2h, ...; the next run goes on (default: the table's; none)",
    )
    parser.add_argument(
        "--cell-timeout",
        metavar="TIME",
        help="end a cell that takes longer than 10m, 2h, ...; the others go on",
    )
    parser.add_argument(
        "--from",
        dest="committed",
        type=Path,
        metavar="TABLE.json",
        help="take finished cells from a committed table, and compute the others",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="AXIS=VALUE",
        help="compute these rows only, and show all that is there",
    )
    parser.add_argument("--fresh", action="store_true", help="start a new interpreter per cell")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--quiet", action="store_true", help="only errors and the table")
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    parser.add_argument("--address", help="Ray cluster: auto, HOST:PORT; default: start one here")
    parser.add_argument("--gpus-per-cell", type=float, help="Ray: may be a fraction")
    parser.add_argument(
        "--shared-data", action="store_true", help="Ray: every node sees --data at the same path"
    )
    return parser


def build_leaderboard_parser() -> CommandParser:
    """The two commands of the leaderboard."""
    parser = CommandParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    ranks = commands.add_parser("leaderboard", help="render the entries to Markdown and HTML")
    ranks.add_argument("--entries", type=Path, default=FOLDER, help="folder of JSON files")
    ranks.add_argument("--output", type=Path, help="default: the folder of the entries")
    ranks.add_argument("--min-utility", type=float, help="only defenses of this accuracy (percent)")
    _add_submit(
        commands.add_parser("submit", help="measure a defense by the protocol; write its entry")
    )
    return parser


def _add_submit(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("table", nargs="?", help="a computed table: an unranked entry of its rows")
    submit.add_argument(
        "--apply",
        metavar="NAME:PARAM,...",
        help="measure this defense by the protocol (none: without)",
    )
    submit.add_argument("--sigma", type=float, help="with --apply: DP-SGD's noise multiplier")
    submit.add_argument(
        "--all", action="store_true", help="measure the project's own entries that are missing"
    )
    submit.add_argument("--defense", help="its name on the leaderboard")
    submit.add_argument("--description", default="", help="one sentence")
    submit.add_argument("--reference", help="paper or address")
    submit.add_argument("--threat", help="with --apply: the threat model, by name or letter")
    submit.add_argument("--plugin", metavar="MODULE", help="with --apply: registers the defense")
    submit.add_argument(
        "--jobs", type=int, help="with --apply: cells at a time (default: one per core)"
    )
    submit.add_argument("--quiet", action="store_true", help="with --apply: no progress")
    submit.add_argument("--store", type=Path, default=DEFAULT_STORE)
    submit.add_argument("--entries", type=Path, default=FOLDER)
    _add_unranked(submit.add_argument_group("entries without a rank"))


def _add_unranked(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--unranked",
        action="store_true",
        help="with --apply: all attacks on the defense, by the table ensemble",
    )
    group.add_argument("--budget", type=int, help="with --unranked: gradient evaluations per run")
    group.add_argument(
        "--utility", type=float, help="accuracy in percent of a model trained under the defense"
    )
    group.add_argument("--preset", default="embedded")
    group.add_argument("--data", help="as the table was computed with")
    group.add_argument(
        "--where", action="append", default=[], metavar="AXIS=VALUE", help="the rows that count"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 when cells failed, 2 on bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["leaderboard"], ["submit"]):
        args = build_leaderboard_parser().parse_args(words)
        return exit_status(lambda: (_rank if args.command == "leaderboard" else _submit)(args))
    if words[:1] == ["vendor_defaults"]:
        from benchmarks.vendor_defaults import main as vendor_defaults

        return exit_status(lambda: vendor_defaults(words[1:]))
    if words[:1] == ["detection"]:
        from benchmarks.detection import main as detection

        return exit_status(lambda: detection(words[1:]))
    if words[:1] == ["fidelity"]:
        from benchmarks.fidelity.command import main as compare

        return exit_status(lambda: compare(words[1:]))
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
    committed = Committed() if args.committed is None else Committed.read(args.committed)
    store = Store(args.store.resolve(), committed)
    # All that was asked for is checked before the first is computed.
    chosen = [table.only(args.where) for table in tables]
    if args.dry_run:
        _say_commands(chosen, store)
        return False
    pairs = zip(tables, chosen, strict=True)
    failed = [_run_table(*pair, store, args, several=len(tables) > 1) for pair in pairs]
    return any(failed)


def _run_table(
    table: Table, chosen: Table, store: Store, args: argparse.Namespace, several: bool
) -> bool:
    """Compute the chosen rows and render all."""
    workers = Workers(
        ray=args.executor == "ray",
        jobs=args.jobs,
        address=args.address,
        gpus_per_cell=args.gpus_per_cell,
        shared_data=args.shared_data,
        fresh=args.fresh,
        targets_at_once=args.targets_at_once,
        cell_seconds=seconds_of(args.cell_timeout or NONE, "--cell-timeout"),
    )
    seconds = seconds_of(args.budget or table.budget or NONE)
    if not args.quiet:
        print(say_costs(chosen, store, workers, seconds), file=sys.stderr)
    statuses = compute(
        chosen, store, workers, quiet=args.quiet, retry_failed=args.retry_failed, seconds=seconds
    )
    for sentence in store.trained_otherwise(chosen.cells()):
        print(f"warning: {sentence}", file=sys.stderr)
    result = collect(table, store)
    name = _folder_name(table)
    folder = ROOT / "results" / name
    if args.output is not None:
        folder = args.output / name if several else args.output
    write_outputs(result, store, folder)
    _print_table(result, statuses, folder, args.quiet)
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
        label = in_one_line(labels.get(cell.key, cell.stage))
        print(f"# {label} ({state})\n{printable(shlex.join(command))}")


def _check(args: argparse.Namespace) -> None:
    if args.jobs is not None and args.jobs < 1:
        raise InputError("--jobs must be at least 1")
    if args.targets_at_once < 1:
        raise InputError("--targets-at-once must be at least 1")
    seconds_of(args.budget or NONE)
    seconds_of(args.cell_timeout or NONE, "--cell-timeout")
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
    from core.data.records import TABLES
    from core.data.text import PYDOC_TOPICS

    known = [*BUILT_IN, *TABLES, PYDOC_TOPICS]
    if data not in known and not Path(data).exists():
        raise InputError(f"--data: there is no {data} (built-in names: {', '.join(known)})")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _list_tables() -> None:
    for name, path in table_files().items():
        table = load_table(path)
        cells = len(in_order(table.cells()))
        print(
            f"{name:24} {in_one_line(table.title)} ({len(table.rows)} rows, {cells} cells embedded)"
        )


def _folder_name(table: Table) -> str:
    return table.name if table.preset == PRESETS[0] else f"{table.name}-{table.preset}"


def _rank(args: argparse.Namespace) -> None:
    print(show(args.entries, args.output or args.entries, args.min_utility))


def _submit(args: argparse.Namespace) -> None:
    from benchmarks.submission import submit_measured, submit_own

    if args.jobs is not None and args.jobs < 1:
        raise InputError("--jobs must be at least 1")
    signal.signal(signal.SIGTERM, _interrupt)
    if args.all:
        written = submit_own(_desk(args))
        print("\n".join(map(str, written)) or "nothing is missing")
    elif args.apply is not None and not args.unranked:
        path = submit_measured(_measurement(args), _desk(args))
        print(f"{path}\nwhere it stands: python -m benchmarks leaderboard")
    else:
        _submit_unranked(args)


def _desk(args: argparse.Namespace) -> Desk:
    from benchmarks.submission import Desk

    return Desk(args.store, args.entries, args.jobs, args.quiet)


def _measurement(args: argparse.Namespace) -> Measurement:
    """What is to be measured; refuses what would change the protocol."""
    from benchmarks.leaderboard.measure import About
    from benchmarks.submission import Measurement

    fixed = {
        "--budget": args.budget,
        "--utility": args.utility,
        "--data": args.data,
        "--where": args.where,
        "--preset": args.preset != "embedded",
    }
    for flag in (flag for flag, value in fixed.items() if value):
        raise InputError(
            f"{flag}: the protocol decides that; for an entry without rank: --unranked"
        )
    about = About(_named(args), args.description, args.reference)
    return Measurement(about, args.apply, args.threat, args.plugin, args.sigma)


def _named(args: argparse.Namespace) -> str:
    if not args.defense:
        raise InputError("submit: give --defense, its name on the leaderboard")
    return str(args.defense)


def _submit_unranked(args: argparse.Namespace) -> None:
    from benchmarks.submission import Submission, submit

    path = submit(
        Submission(
            defense=_named(args),
            source=_source(args),
            where=tuple(args.where),
            description=args.description,
            reference=args.reference,
            utility=args.utility,
            preset=args.preset,
            data=args.data,
            store=args.store,
            entries=args.entries,
        )
    )
    entry = load_entry(path)
    assert isinstance(entry, Mapping)
    print(f"{path}: worst SSIM {entry['leakage']['ssim']['worst']:.3f}, {entry['threat_model']}")


def _source(args: argparse.Namespace) -> Defended | str:
    """Where the numbers of an unranked entry come from."""
    from benchmarks.submission import Defended

    if args.apply is not None:
        threat = args.threat or "honest-server"
        return Defended(args.apply, threat, args.plugin, args.budget, args.jobs, args.quiet)
    if args.table is not None:
        return str(args.table)
    raise InputError("submit: give --apply NAME:PARAM, --all, or a computed table")


def _print_table(
    result: TableResult, statuses: dict[str, Status], folder: Path, quiet: bool
) -> None:
    print(to_terminal(to_text_table(result)))
    if not quiet:
        counts = Counter(status.value for status in statuses.values())
        print(", ".join(f"{count} cells {status}" for status, count in counts.items()))
        print(f"tables, pictures and report: {os.path.relpath(folder)}/report.html")
    if any(status is Status.FAILED for status in statuses.values()):
        print("some cells failed; run again with --retry-failed to retry them", file=sys.stderr)
