"""What every defense costs: the validation accuracy of a model that clients trained under it.

Writes `results/utility/utility.json` after every training, and continues one that is there. All
defenses train the same small network on the embedded photographs in the same federation
(`PROTOCOL`), with the learning rate that suits training without a defense; the accuracy is that
of the last round, in percent. The mean over seeds stands with its 95 % interval by Student's t.

    python -m benchmarks.utility
    python -m benchmarks.utility --defense prune:0.95 --error-feedback dgc
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prettytable import PrettyTable, TableStyle

from core.errors import InputError, exit_status
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "utility"
RECORD = "utility.json"
SEEDS = (0, 1, 2)
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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


@dataclass(frozen=True)
class Entry:
    """What is trained under.

    Attributes:
        defense: Words as `--defense` takes them; empty for no defense.
        error_feedback: As `--error-feedback`; None: none.
        sigma: Noise multiplier of the clients' DP-SGD; None: no DP-SGD.
        norm: Normalisation layers; DP-SGD cannot have those of the batch.
    """

    defense: str = ""
    error_feedback: str | None = None
    sigma: float | None = None
    norm: str = "batch"


@dataclass
class Row:
    """The accuracies of one entry.

    Attributes:
        entry: See `Entry`.
        seeds: Of the trainings so far.
        accuracy: On the validation images after the last round, in percent, per seed.
        epsilon: Told by the defense or by DP-SGD's accountant; None: nothing is promised.
        delta: Of that promise.
        seconds: Of all trainings.
    """

    entry: Entry
    seeds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    epsilon: float | None = None
    delta: float = 1e-5
    seconds: float = 0.0


@dataclass(frozen=True)
class Utility:
    """Accuracy in percent: the mean over `n` seeds and its 95 % interval; NaN of one seed."""

    mean: float
    low: float
    high: float
    n: int


# One strength each, a second where it tells something.
ENTRIES = (
    Entry(),
    Entry("clip:1"),
    Entry("gaussian:0.001"),
    Entry("gaussian:0.01"),
    Entry("gaussian:0.1"),
    Entry("laplace:0.01"),
    Entry("percentile-noise:0.1"),
    Entry("percentile-noise:1"),
    Entry("prune:0.9"),
    Entry("prune:0.99"),
    Entry("prune:0.99", "dgc"),
    Entry("topk:0.01"),
    Entry("topk:0.01", "ef-sgd"),
    Entry("sign"),
    Entry("sign", "ef-sgd"),
    Entry("quantize:4"),
    Entry("freeze:1"),
    Entry("clip:1,gaussian:0.01"),
    Entry(norm="group"),
    Entry(sigma=0.01, norm="group"),
    Entry(sigma=1.0, norm="group"),
    Entry("soteria:0.8"),
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


def utility_of(
    defense: str,
    error_feedback: str | None = None,
    sigma: float | None = None,
    folder: Path = RESULTS,
) -> Utility | None:
    """The accuracy that was measured under a defense.

    Args:
        defense: Words as `--defense` takes them, in any spelling of their parameters; empty
            for no defense.
        error_feedback: As `--error-feedback`.
        sigma: Noise multiplier of DP-SGD.
        folder: Of the record.

    Returns:
        None where it was not measured.

    Raises:
        InputError: No such defense, or no such record.
    """
    wanted = _spelling(defense), error_feedback, sigma
    for row in read_rows(folder / RECORD):
        entry = row.entry
        if (_spelling(entry.defense), entry.error_feedback, entry.sigma) == wanted:
            return summary(row)
    return None


def summary(row: Row) -> Utility:
    """A row's mean and interval."""
    values, n = np.asarray(row.accuracy), len(row.accuracy)
    spread = STUDENT_T[n - 1] * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    mean = float(values.mean())
    return Utility(mean, max(0.0, mean - spread), min(100.0, mean + spread), n)


def _spelling(words: str) -> str:
    return ",".join(defense.word for defense in parse_defenses(words))


def read_rows(path: Path) -> list[Row]:
    """The rows of a record.

    Raises:
        InputError: It is damaged, or there is none.
    """
    return [_row(values) for values in read_json_object(path, what="record of utility")["rows"]]


def _row(values: Mapping[str, Any]) -> Row:
    return Row(**{**values, "entry": Entry(**values["entry"])})


def _rows_so_far(path: Path, protocol: Protocol) -> list[Row]:
    """What an earlier run of the same protocol left."""
    if not path.exists():
        return []
    stated = read_json_object(path, what="record of utility").get("protocol")
    if stated != asdict(protocol):
        raise InputError(f"{path} was measured under another protocol; give another --output")
    return read_rows(path)


def compute(
    entries: Sequence[Entry], seeds: Sequence[int], folder: Path, protocol: Protocol = PROTOCOL
) -> list[Row]:
    """Measure entries, write the record after every training, and the table at the end.

    Args:
        entries: What is trained under.
        seeds: Of each.
        folder: Of the record and the table.
        protocol: The federation.

    Raises:
        InputError: The folder holds a record of another protocol.
    """
    rows = _rows_so_far(folder / RECORD, protocol)
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


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
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
    rows = compute(entries, range(args.seeds), args.output)
    print(to_markdown(rows, PROTOCOL))


if __name__ == "__main__":
    sys.exit(exit_status(main))
