"""What a run leaves to look at: `metrics.csv`, curves, TensorBoard scalars.

python -m training.reports results/training/* --output comparison.png
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from core.errors import exit_status
from core.figures import blank_figure, save_figure
from core.launch_arguments import CommandParser
from core.storage import write_text
from training.record import EpochResult, TrainRecord, read_record

DOTS_PER_INCH = 120


def write_metrics_csv(history: Sequence[EpochResult], path: Path) -> None:
    """Write one line per epoch.

    Args:
        history: One result per epoch.
        path: File to write.
    """
    if not history:
        return
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=[f.name for f in fields(EpochResult)], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(map(asdict, history))
    write_text(path, text.getvalue())


def plot_curves(record: TrainRecord, path: Path) -> None:
    """Draw loss and accuracy over epochs of one run.

    Args:
        record: Its record.
        path: Picture to write.
    """
    history = record.history
    epochs = [entry.epoch for entry in history]
    figure = blank_figure(8, 3)
    loss, accuracy = figure.subplots(1, 2)
    for part, label in (("train", "training"), ("val", "validation")):
        loss.plot(epochs, [getattr(entry, f"{part}_loss") for entry in history], label=label)
        shares = [getattr(entry, f"{part}_acc1") for entry in history]
        if None not in shares:
            accuracy.plot(epochs, shares, label=label)
    loss.set(xlabel="epoch", ylabel=record.loss)
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    loss.legend()
    figure.suptitle(f"{record.scheme} on {record.data.name}")
    save_figure(figure, path, dpi=DOTS_PER_INCH)


def plot_comparison(records: Sequence[TrainRecord], path: Path) -> None:
    """Draw the validation accuracy of several runs in one picture.

    Args:
        records: Their records.
        path: Picture to write.
    """
    figure = blank_figure(6, 4)
    axes = figure.subplots()
    for record in records:
        history = record.history
        accuracies = [math.nan if e.val_acc1 is None else e.val_acc1 for e in history]
        axes.plot([entry.epoch for entry in history], accuracies, label=_label(record))
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=DOTS_PER_INCH)


def _label(record: TrainRecord) -> str:
    if record.privacy is None:
        return record.scheme
    epsilon = record.privacy.epsilon
    guarantee = "no guarantee" if epsilon is None else f"epsilon {epsilon:.3g}"
    return f"{record.scheme} ({guarantee})"


class ScalarLog:
    """TensorBoard scalars, where TensorBoard is installed.

    Args:
        folder: Folder that receives the event files.
        enabled: False for a log that does nothing.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self._writer: Any = None

    def write(self, result: Mapping[str, Any]) -> None:
        """Add every number of one epoch."""
        if not self.enabled or not self._opened(int(result["epoch"])):
            return
        for name, value in result.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._writer.add_scalar(name, value, result["epoch"])
        self._writer.flush()

    def _opened(self, epoch: int) -> bool:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.enabled = False
                return False
            # A resumed run replaces what an interrupted epoch may have written.
            self._writer = SummaryWriter(str(self.folder), purge_step=epoch)
        return True

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()


def build_parser() -> CommandParser:
    """The command line of the comparison picture."""
    parser = CommandParser(
        prog="python -m training.reports", description="Compare the curves of training runs."
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="result folders of training runs")
    parser.add_argument("--output", default="comparison.png", metavar="PNG")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Draw the comparison."""
    args = build_parser().parse_args(argv)
    plot_comparison([read_record(Path(folder)) for folder in args.runs], Path(args.output))


if __name__ == "__main__":
    sys.exit(exit_status(run))
