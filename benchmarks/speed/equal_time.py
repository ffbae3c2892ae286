"""Attacks compared at equal processor time on the same gradient checkpoints.

python -m benchmarks.equal_time CHECKPOINT ... --seconds 20     checkpoints of stage 2
python -m benchmarks.equal_time --data photo-patches,DIR --models convnet:32,FILE --batches 1,8
python -m benchmarks.equal_time --cases all --folder cifar10=DIR --images 0,1,2,3 --seconds 8,60

Every attack gets the same seconds of processor time on one thread: a few iterations are
timed first, and the attack then runs as many as fit, its schedules stretched over just
those. Image number n of a grid or case has seed --seed + n. What is recorded already is not
run again. Labels are known to all. Attacks of the package `breaching` (`pip install breaching`)
run beside ours as `breaching:NAME`, with their published settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attack.metrics import evaluate
from benchmarks.speed.equal_time_cases import (
    FOLDERS,
    WEIGHTS,
    Source,
    extract,
    find_cases,
    make_cases,
)
from benchmarks.speed.equal_time_report import draw, reconstruction_file, render, render_summary
from benchmarks.speed.equal_time_runs import CPU, Course, affordable, inverter
from core.errors import InputError
from core.launch_arguments import CommandParser, named_values
from core.records import provenance, read_record
from core.storage import save_checkpoint, write_json, write_text
from core.target import Target, Truth
from gradients.checkpoint import load_target
from gradients.record import describe

DEFAULT_ATTACKS = "spectral,inverting-gradients"
RECORD = "record.json"


@dataclasses.dataclass(frozen=True)
class TargetGrid:
    """Targets to be made: every combination of data, model, batch size and batch.

    Attributes:
        data: Names of built-in data sets, or folders; empty for no targets.
        models: "ARCHITECTURE:WIDTH", or checkpoints of stage 1.
        batches: Batch sizes of the targets.
        images: Which batches of the data, counted from 0.
        train_mode: Whether BatchNorm takes the statistics of the batch.
    """

    data: tuple[str, ...]
    models: tuple[str, ...] = ("convnet:32", "resnet18:16")
    batches: tuple[str, ...] = ("1",)
    images: tuple[int, ...] = (0,)
    train_mode: bool = False


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.equal_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--attacks", default=DEFAULT_ATTACKS, help="comma-separated names")
    parser.add_argument(
        "--seconds", default="20", metavar="S,...", help="processor time per attack, or several"
    )
    parser.add_argument("--seed", type=int, default=0, help="of image 0; the next has the next")
    parser.add_argument("--output", default="results/equal_time", metavar="DIR")
    grid = parser.add_argument_group("grid of targets")
    grid.add_argument("--data", default="", metavar="NAME_OR_DIR,...", help="data sets")
    grid.add_argument(
        "--models",
        default="convnet:32,resnet18:16",
        metavar="ARCH:WIDTH|FILE,...",
        help="initial models, and trained ones of stage 1",
    )
    grid.add_argument("--batches", default="1", metavar="N,...", help="batch sizes")
    grid.add_argument("--images", default="0", metavar="N,...", help="which batches of the data")
    grid.add_argument("--train-mode", action="store_true", help="batch statistics in BatchNorm")
    cases = parser.add_argument_group("cases of the documents, beside or instead of a grid")
    cases.add_argument(
        "--cases", default="", metavar="NAME;...", help="all: those whose data is there"
    )
    cases.add_argument(
        "--folder", action="append", default=[], metavar="KIND=DIR",
        help=f"images of {', '.join(FOLDERS)}",
    )  # fmt: skip
    cases.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE",
        help=f"trained {', '.join(WEIGHTS)}",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run every attack on every checkpoint and write a record, a table and pictures."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(args.output)
    budgets, numbers = _budgets(args.seconds), _numbers(args.images)
    grid = TargetGrid(
        data=_words(args.data),
        models=_words(args.models),
        batches=_words(args.batches),
        images=tuple(numbers),
        train_mode=args.train_mode,
    )
    source = Source(
        _paths("--folder", args.folder, FOLDERS), _paths("--weights", args.weights, WEIGHTS)
    )
    cases = find_cases(args.cases, source) if args.cases else []
    given = [(Path(path), 0) for path in args.checkpoints]
    made = [*make_targets(grid, folder), *make_cases(cases, numbers, source, folder)]
    if not given and not made:
        raise InputError("CHECKPOINT: give gradient checkpoints, --data for a grid, or --cases")
    # Every image has a seed of its own.
    targets = [(path, args.seed + number) for path, number in [*given, *made]]
    for path, _ in targets:
        if load_target(path)[1] is None:
            raise InputError(f"CHECKPOINT: {path} holds no true images to compare with")
    jobs = list(itertools.product(budgets, targets, args.attacks.split(",")))
    rows = recorded_rows(folder)
    done = {_key(row) for row in rows}
    try:
        for budget, (path, seed), attack in tqdm(jobs, desc="attacks at equal time"):
            if (path.name, attack, budget, seed) in done:
                continue
            target, truth = load_target(path)
            assert truth is not None
            rows.append(compare(path, attack, target, truth, budget, seed, folder))
            write_json(folder / RECORD, {"rows": rows, "provenance": provenance(CPU, args.seed)})
    finally:
        # Once: the intervals of all rows take a second. Also of what an interrupted run has.
        write_text(folder / "table.md", render(rows))
        write_text(folder / "summary.md", render_summary(rows))
    draw(rows, folder)
    print(render_summary(rows))


def _budgets(text: str) -> list[float]:
    try:
        budgets = [float(word) for word in _words(text)]
    except ValueError:
        budgets = []
    if not budgets or not all(budget > 0 for budget in budgets):
        raise InputError(f"--seconds {text}: expected seconds above 0, joined by commas")
    return budgets


def _numbers(text: str) -> list[int]:
    images = _words(text)
    if not images or not all(word.isdecimal() for word in images):
        raise InputError(f"--images {text}: expected numbers from 0, joined by commas")
    return [int(word) for word in images]


def _paths(flag: str, given: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    pairs = named_values(flag, given, known)
    for name, path in pairs.items():
        if not Path(path).exists():
            raise InputError(f"{flag} {name}={path}: there is no such path")
    return pairs


def recorded_rows(folder: Path) -> list[dict[str, Any]]:
    """What an earlier run has finished."""
    path = folder / RECORD
    if not path.exists():
        return []
    rows = read_record(path, "attacks of equal time", lambda values: list(values["rows"]))
    if any(not isinstance(row, dict) or any(key not in row for key in _KEYS) for row in rows):
        raise InputError(f"{path}: a row lacks one of {', '.join(_KEYS)}")
    return rows


# What tells the rows apart.
_KEYS = ("checkpoint", "attack", "budget_seconds", "seed")


def _key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    checkpoint, attack, budget, seed = (row[key] for key in _KEYS)
    return checkpoint, attack, budget, seed


def make_targets(grid: TargetGrid, folder: Path) -> list[tuple[Path, int]]:
    """Run stage 2 for every target of the grid that has no checkpoint yet.

    The images vary slowest, so that a run cut short has seen every kind of target.

    Args:
        grid: Which targets.
        folder: Their checkpoints go to its folder `targets`.

    Returns:
        Per target its checkpoint and which batch it is.
    """
    cells = itertools.product(grid.images, grid.data, grid.batches, grid.models)
    made = folder / "targets"
    return [(_make_target(*cell, grid.train_mode, made), cell[0]) for cell in cells]


def _make_target(
    image: int, data: str, batch: str, model: str, train_mode: bool, folder: Path
) -> Path:
    name = f"{Path(data).name}_{_model_name(model)}_b{batch}_i{image}"
    path = folder / f"{name}{'_train' if train_mode else ''}.tar"
    if not path.exists():
        words = ["--data", data, "-b", batch, *_model_flags(model)]
        words += [] if train_mode else ["--model-eval"]
        extract(words, image, path, folder / "stage2" / path.stem)
    return path


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _model_name(model: str) -> str:
    """The architecture, or of a stage 1 checkpoint its folder's name."""
    path = Path(model)
    return f"{path.parent.name}-trained" if path.is_file() else model.replace(":", "-")


def _model_flags(model: str) -> list[str]:
    if Path(model).is_file():
        return ["--pretrained", model]
    arch, _, width = model.partition(":")
    return ["-a", arch, *(["--width", width] if width else [])]


def compare(
    path: Path,
    name: str,
    target: Target,
    truth: Truth,
    seconds: float,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """One attack on one checkpoint.

    Args:
        path: Of the checkpoint, for the record.
        name: Of the attack.
        target: What it sees.
        truth: What it is measured by.
        seconds: Processor time it may use.
        seed: Of its start.
        folder: Where its picture goes.

    Returns:
        One row: attack, target, iterations, seconds used, metrics per image and their means, and
        the means on the way.
    """
    run = inverter(name, target, truth.labels, seed)
    iterations = affordable(run, seconds)
    course = Course(truth)
    begun = time.process_time()
    images = run(iterations, course)
    used = time.process_time() - begun - course.looking
    evaluation = evaluate(images, truth.labels, truth, metrics=("mse", "psnr", "ssim"))
    tensors = {"images": images[evaluation.order], "originals": truth.images}
    save_checkpoint(tensors, reconstruction_file(folder, path.name, name, seed, seconds))
    return {
        "attack": name,
        "checkpoint": path.name,
        "target": describe(target).setting(),
        "iterations": iterations,
        "budget_seconds": seconds,
        "seed": seed,
        "cpu_seconds": used,
        "course": course.moments,
        "evaluation": evaluation.to_record(),
    }
