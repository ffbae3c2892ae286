"""Attacks compared at equal processor time on the same gradient checkpoints.

`python -m benchmarks.equal_time CHECKPOINT ... --seconds 20`, or a grid of targets made for it:
`python -m benchmarks.equal_time --data photo-patches,DIR --models convnet:32,FILE --batches 1,8`

Every attack gets the same seconds of processor time on one thread: a few iterations are
timed first, and the attack then runs as many as fit, its schedules stretched over just
those. What is recorded already is not run again. Labels are known to all. Attacks of the
package `breaching` (`pip install breaching`) run beside ours as `breaching:NAME`, with
their published settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attack.attacks import OptimizationAttack, get_attack
from attack.metrics import evaluate
from benchmarks.speed.equal_time_report import draw, reconstruction_file, render, render_summary
from benchmarks.speed.references import as_breaching
from core.errors import InputError
from core.launch_arguments import CommandParser
from core.records import provenance, read_record
from core.storage import save_checkpoint, write_json, write_text
from core.target import Target, Truth
from gradients.checkpoint import load_target
from gradients.record import describe

CPU = torch.device("cpu")
DEFAULT_ATTACKS = "spectral,inverting-gradients"
RECORD = "record.json"
# How often the sample of timed iterations may double.
DOUBLINGS = 4
# Inverts with so many iterations; returns N x C x H x W in [0, 1].
Run = Callable[[int], torch.Tensor]


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
    images: tuple[str, ...] = ("0",)
    train_mode: bool = False


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="python -m benchmarks.equal_time", description=__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--attacks", default=DEFAULT_ATTACKS, help="comma-separated names")
    parser.add_argument("--seconds", type=float, default=20.0, help="processor time per attack")
    parser.add_argument("--seed", type=int, default=0)
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
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run every attack on every checkpoint and write a record, a table and pictures."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(args.output)
    grid = TargetGrid(
        data=_words(args.data),
        models=_words(args.models),
        batches=_words(args.batches),
        images=_words(args.images),
        train_mode=args.train_mode,
    )
    checkpoints = [*args.checkpoints, *make_targets(grid, folder)]
    if not checkpoints:
        raise InputError("CHECKPOINT: give gradient checkpoints, or --data for a grid of them")
    for path in checkpoints:
        if load_target(path)[1] is None:
            raise InputError(f"CHECKPOINT: {path} holds no true images to compare with")
    jobs = [(path, attack) for path in checkpoints for attack in args.attacks.split(",")]
    rows = recorded_rows(folder)
    done = {_key(row) for row in rows}
    for path, attack in tqdm(jobs, desc="attacks at equal time"):
        if (Path(path).name, attack, args.seconds, args.seed) in done:
            continue
        target, truth = load_target(path)
        assert truth is not None
        rows.append(compare(path, attack, target, truth, args.seconds, args.seed, folder))
        write_json(folder / RECORD, {"rows": rows, "provenance": provenance(CPU, args.seed)})
        write_text(folder / "table.md", render(rows))
        write_text(folder / "summary.md", render_summary(rows))
    draw(rows, folder)
    print(render_summary(rows))


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


def make_targets(grid: TargetGrid, folder: Path) -> list[str]:
    """Run stage 2 for every target of the grid that has no checkpoint yet.

    The images vary slowest, so that a run cut short has seen every kind of target.

    Args:
        grid: Which targets.
        folder: Their checkpoints go to its folder `targets`.

    Returns:
        The checkpoints' paths.
    """
    cells = itertools.product(grid.images, grid.data, grid.batches, grid.models)
    return [str(_make_target(*cell, grid.train_mode, folder / "targets")) for cell in cells]


def _make_target(
    image: str, data: str, batch: str, model: str, train_mode: bool, folder: Path
) -> Path:
    from gradients.command import run

    name = f"{Path(data).name}_{_model_name(model)}_b{batch}_i{image}"
    path = folder / f"{name}{'_train' if train_mode else ''}.tar"
    if not path.exists():
        words = ["--data", data, "-b", batch, "--target-idx", image, "-j", "1"]
        words += [*_model_flags(model), *([] if train_mode else ["--model-eval"])]
        made = folder / "stage2" / path.stem
        run([*words, "--cpu", "--results", str(made)])
        next(made.glob("*-checkpoint.pth.tar")).replace(path)
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
    path: str,
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
        One row: attack, target, iterations, seconds used, metrics per image and their means.
    """
    runner = _breaching if name.startswith("breaching:") else _ours
    iterations = _affordable(runner(name, target, truth.labels, seed), seconds)
    run = runner(name, target, truth.labels, seed)
    begun = time.process_time()
    images = run(iterations)
    used = time.process_time() - begun
    evaluation = evaluate(images, truth.labels, truth, metrics=("mse", "psnr", "ssim"))
    tensors = {"images": images[evaluation.order], "originals": truth.images}
    save_checkpoint(tensors, reconstruction_file(folder, Path(path).name, name, seed))
    return {
        "attack": name,
        "checkpoint": Path(path).name,
        "target": describe(target).setting(),
        "iterations": iterations,
        "budget_seconds": seconds,
        "seed": seed,
        "cpu_seconds": used,
        "evaluation": evaluation.to_record(),
    }


def _affordable(run: Run, seconds: float, sample: int = 6) -> int:
    """Iterations that fit the time, by what twice as many of them take longer.

    On a busy machine a few iterations more may take no longer: the sample is doubled until
    the difference stands out.
    """
    run(2)  # Warm-up: allocations and kernel selection.
    short = _seconds(run, sample)
    long = _seconds(run, 2 * sample)
    for _ in range(DOUBLINGS):
        if long - short > short / 4 or long > seconds / 4:
            break
        sample *= 2
        short, long = long, _seconds(run, 2 * sample)
    # However the clock erred, an iteration costs a share of what all of them took.
    per_iteration = max((long - short) / sample, long / (8 * sample))
    overhead = max(0.0, short - per_iteration * sample)
    return max(1, int((seconds - overhead) / per_iteration))


def _seconds(run: Run, iterations: int) -> float:
    begun = time.process_time()
    run(iterations)
    return time.process_time() - begun


def _ours(name: str, target: Target, labels: torch.Tensor, seed: int) -> Run:
    attack = get_attack(name)
    if not issubclass(attack, OptimizationAttack):
        raise InputError(f"--attacks {name}: does not iterate")

    def run(iterations: int) -> torch.Tensor:
        config = attack.published.changed(iterations=iterations)
        result = attack(config).reconstruct(target, labels=labels, device=CPU, seed=seed)
        return result.images

    return run


def _breaching(name: str, target: Target, labels: torch.Tensor, seed: int) -> Run:
    """An attack of the package `breaching` (MIT), https://github.com/JonasGeiping/breaching."""
    try:
        import breaching
    except ImportError:
        raise InputError(f"--attacks {name}: needs `pip install breaching`") from None
    model = target.build_model()
    payload, shared = as_breaching(target, model, labels.sort().values)
    config = breaching.get_attack_config(name.partition(":")[2])

    def run(iterations: int) -> torch.Tensor:
        torch.manual_seed(seed)
        config.optim.max_iterations = iterations
        config.optim.callback = iterations + 1
        setup = {"device": CPU, "dtype": torch.float}
        attacker = breaching.attacks.prepare_attack(
            model, torch.nn.CrossEntropyLoss(), config, setup
        )
        found, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
        return target.data.denormalize(found["data"].detach()).clamp(0, 1)

    return run
