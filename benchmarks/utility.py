"""What every defense costs: the validation accuracy of a model that clients trained under it.

Writes `results/utility/utility.json` after every training, and continues one that is there. All
defenses train the same small network on the embedded photographs in the same federation
(`PROTOCOL`), with the learning rate that suits training without a defense; the accuracy is that
of the last round, in percent. The mean over seeds stands with its 95 % interval by Student's t.

    python -m benchmarks.utility
    python -m benchmarks.utility --defense prune:0.95 --error-feedback dgc

The leaderboard trains under the same protocol, with the same random numbers, so that its entries'
accuracies need not be computed again:

    python -m benchmarks.utility --entries results/leaderboard
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prettytable import PrettyTable, TableStyle

from benchmarks.declare.measured_utility import (
    RECORD,
    RESULTS,
    STUDENT_T,
    Entry,
    Row,
    read_rows,
    summary,
    utility_of,
)
from benchmarks.leaderboard.entry import check_against, read_entry
from benchmarks.leaderboard.protocol import read_protocol
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.plugins import import_plugin
from core.processes.distributed import Process
from core.reading import read_json_object
from core.storage import write_record, write_text
from gradients.defenses import parse_defenses
from training.record import TrainRecord, read_record
from training.run import run_training
from training.settings import (
    DataSettings,
    Federation,
    ModelSettings,
    RunSettings,
    TrainingConfig,
)

__all__ = ["compute", "measure", "train", "utility_of"]

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Protocol:
    """How every defense is trained.

    Attributes:
        data: Name of the images.
        arch: Architecture.
        width: Of its first stage.
        clients: How many; their images are alike.
        batch: Images of all clients in a local step.
        local_steps: Between two rounds.
        rounds: Of the whole training.
        lr: Learning rate, falling to zero as a cosine; momentum 0.9 at the server.
    """

    data: str = "photo-patches"
    arch: str = "cnn"
    width: int = 8
    clients: int = 4
    batch: int = 32
    local_steps: int = 1
    rounds: int = 140
    lr: float = 0.02


PROTOCOL = Protocol()
# So many parts of the rounds stand as epochs in a training's record.
EPOCHS = 10


# One strength each, a second where it tells something.
ENTRIES = (
    Entry(),
    Entry("prune:0.1"),
    Entry("prune:0.5"),
    Entry("prune:0.9"),
    Entry("prune:0.99"),
    Entry("prune:0.99", "dgc"),
    Entry("sign"),
    Entry("sign", "ef-sgd"),
    Entry("gaussian:0.0001"),
    Entry("gaussian:0.01"),
    Entry("gaussian:0.1"),
    Entry("quantize:4"),
    Entry("percentile-noise:1"),
    Entry("clip:4"),
    Entry("clip:1"),
    Entry("clip:1,gaussian:0.01"),
    Entry(norm="group"),
    Entry(sigma=1.0, norm="group"),
    Entry(sigma=0.01, norm="group"),
    Entry("topk:0.01"),
    Entry("topk:0.01", "ef-sgd"),
    Entry("freeze:1"),
    Entry("laplace:0.01"),
    Entry("gaussian:0.001"),
    Entry("percentile-noise:0.1"),
    Entry("soteria:0.8"),
    Entry("ats"),
    Entry("instahide"),
    Entry("mixup"),
    Entry("precode"),
    Entry("svdefense:0.9"),
    Entry("svdefense:0.5"),
    Entry("censor:20"),
    Entry("censor:20:123"),
    Entry("censor:20:-1:code"),
    Entry("graddefense:10:5:0.1"),
    Entry("graddefense:10:5:0.01"),
    Entry("outpost"),
    Entry("layerdrop:0.5"),
    Entry("enclave:1"),
    Entry("enclave:2"),
    # The published 1000 iterations, in every round of every client, take hours.
    Entry("dcs2:50"),
    Entry("refiner"),
    Entry("shadow"),
)


def train(entry: Entry, seed: int, protocol: Protocol = PROTOCOL) -> TrainRecord:
    """Train once.

    Args:
        entry: What is trained under.
        seed: Of the parameters, the clients' images and every random number.
        protocol: The federation.

    Returns:
        The training's record.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_training(Process(), _settings(entry, seed, protocol, Path(folder) / "run"))
        return read_record(Path(folder) / "run")


def _settings(entry: Entry, seed: int, protocol: Protocol, root: Path) -> RunSettings:
    epochs = min(EPOCHS, protocol.rounds)
    federation = Federation(
        clients=protocol.clients,
        local_steps=protocol.local_steps,
        rounds_per_epoch=protocol.rounds // epochs,
        defense=entry.defense,
        error_feedback=entry.error_feedback,
    )
    training = TrainingConfig(
        scheme=entry.defense or "pure",
        epochs=epochs,
        batch_size=protocol.batch,
        lr=protocol.lr,
        lr_schedule="cosine",
        workers=0,
        seed=seed,
        dp=entry.sigma is not None,
        noise_multiplier=entry.sigma or 0.0,
        synchronized=False,
        save_every=1000,
        tensorboard=False,
        federation=federation,
    )
    model = ModelSettings(arch=protocol.arch, width=protocol.width, norm=entry.norm)
    return RunSettings(root, DataSettings(protocol.data), model, training)


def measure(row: Row, seeds: Sequence[int], protocol: Protocol = PROTOCOL) -> Iterator[Row]:
    """Train under the seeds that a row lacks; the row after each."""
    for seed in seeds:
        if seed in row.seeds:
            continue
        record = train(row.entry, seed, protocol)
        assert record.final_val_acc1 is not None
        assert record.federation is not None
        promised = record.privacy or record.federation
        row.seeds.append(seed)
        row.accuracy.append(record.final_val_acc1)
        row.epsilon, row.delta = promised.epsilon, promised.delta
        row.seconds += record.seconds
        yield row


def _rows_so_far(path: Path, protocol: Protocol) -> list[Row]:
    """What an earlier run of the same protocol left."""
    if not path.exists():
        return []
    stated = read_json_object(path, what="record of utility").get("protocol")
    if stated != asdict(protocol):
        raise InputError(f"{path} was measured under another protocol; give another --output")
    return read_rows(path)


def of_leaderboard(folder: Path, protocol: Protocol = PROTOCOL) -> list[Row]:
    """Rows from the leaderboard's entries in a folder, without those of DP-SGD.

    Args:
        folder: Of entries as `python -m benchmarks submit` writes them.
        protocol: By which the leaderboard's networks must have been trained.

    Raises:
        InputError: The leaderboard trains otherwise, or an entry is damaged.
    """
    board = read_protocol()
    rules = board.utility
    theirs = (board.data, rules.arch, rules.width, rules.clients, rules.batch_size)
    ours = (protocol.data, protocol.arch, protocol.width, protocol.clients, protocol.batch)
    rounds = rules.epochs * rules.rounds
    if (*theirs, rounds, rules.lr) != (*ours, protocol.rounds, protocol.lr):
        raise InputError(f"{board.name} trains by another protocol than this table")
    rows = []
    for file in sorted(folder.glob("*.json")):
        entry = read_entry(file)
        # Normalisation differs under DP-SGD; a plugin's defense is nobody else's.
        if entry.sigma is None and entry.plugin is None:
            check_against(entry, board, file.name)
            words = Entry(entry.apply)
            rows.append(Row(words, list(rules.seeds), list(entry.accuracies), entry.epsilon))
    return rows


def compute(
    entries: Sequence[Entry],
    seeds: Sequence[int],
    folder: Path,
    protocol: Protocol = PROTOCOL,
    known: Sequence[Row] = (),
) -> list[Row]:
    """Measure entries, write the record after every training, and the table at the end.

    Args:
        entries: What is trained under.
        seeds: Of each.
        folder: Of the record and the table.
        protocol: The federation.
        known: Rows that were measured elsewhere; the folder's own come first.

    Raises:
        InputError: The folder holds a record of another protocol.
    """
    rows = _rows_so_far(folder / RECORD, protocol)
    there = {row.entry for row in rows if len(row.seeds) >= len(seeds)}
    taken = [row for row in known if row.entry not in there]
    rows = [row for row in rows if row.entry not in {new.entry for new in taken}] + taken
    if taken:
        _write(rows, folder, protocol)
    for entry in entries:
        row = next((row for row in rows if row.entry == entry), None)
        if row is None:
            row = Row(entry)
            rows.append(row)
        for changed in measure(row, seeds, protocol):
            _write(rows, folder, protocol)
            print(f"{_name(entry)}: {changed.accuracy[-1]:.1f} %", flush=True)
    write_text(folder / "utility.md", to_markdown(rows, protocol))
    return rows


def _write(rows: Sequence[Row], folder: Path, protocol: Protocol) -> None:
    finished = [asdict(row) for row in rows if row.accuracy]
    write_record(
        folder / RECORD,
        {
            "command": "python -m benchmarks.utility",
            "protocol": asdict(protocol),
            "rows": finished,
        },
    )


def _name(entry: Entry) -> str:
    """For people."""
    parts = [entry.defense] if entry.defense else []
    if entry.sigma is not None:
        parts.append(f"DP-SGD, noise {entry.sigma:g}")
    if entry.error_feedback:
        parts.append(f"error feedback {entry.error_feedback}")
    name = ", ".join(parts) or "none"
    return name if entry.norm == "batch" else f"{name} (GroupNorm)"


def to_markdown(rows: Sequence[Row], protocol: Protocol) -> str:
    """The table: accuracy, interval and epsilon of every entry."""
    table = PrettyTable(["defense", "accuracy %", "95 % interval", "seeds", "ε told"])
    table.set_style(TableStyle.MARKDOWN)
    table.align = "l"
    for row in rows:
        found = summary(row)
        interval = f"{found.low:.1f} to {found.high:.1f}" if found.n > 1 else "–"
        epsilon = "none" if row.epsilon is None else f"{row.epsilon:.3g}"
        table.add_row([_name(row.entry), f"{found.mean:.1f}", interval, found.n, epsilon])
    caption = (
        f"{protocol.clients} clients of `{protocol.arch}` (width {protocol.width}) on "
        f"{protocol.data}, {protocol.rounds} rounds of {protocol.local_steps} local step(s), "
        f"{protocol.batch} images in a step of all; ε at δ = {rows[0].delta:g} for all that a "
        "client holds, under DP-SGD for one image."
    )
    return f"{caption}\n\n{table}\n"


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.utility",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--defense", metavar="NAME:PARAM[,...]", help="default: every entry of the table"
    )
    parser.add_argument("--error-feedback", choices=["ef-sgd", "dgc"])
    parser.add_argument("--plugin", metavar="MODULE", help="imported first; registers a defense")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="trainings of each")
    parser.add_argument(
        "--entries", type=Path, metavar="DIR", help="take accuracies over from the leaderboard's"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the record and print the table."""
    args = build_parser().parse_args(argv)
    if not 1 <= args.seeds < len(STUDENT_T):
        raise InputError(f"--seeds must lie between 1 and {len(STUDENT_T) - 1}")
    import_plugin(args.plugin)
    logging.getLogger("training").setLevel(logging.WARNING)
    entries: Sequence[Entry] = ENTRIES
    if args.defense is not None:
        parse_defenses(args.defense)
        entries = [Entry(args.defense, args.error_feedback)]
    known = of_leaderboard(args.entries) if args.entries else ()
    rows = compute(entries, range(args.seeds), args.output, known=known)
    print(to_markdown(rows, PROTOCOL))


if __name__ == "__main__":
    sys.exit(exit_status(main))
