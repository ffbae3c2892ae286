"""From a plan to an entry: every cell computed or found, and put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attack.metrics.pixels import psnr
from attack.metrics.similarity import ssim
from benchmarks.compute import Workers
from benchmarks.leaderboard.entry import GUESSES, BoardEntry, Leak, check_against, entry_from
from benchmarks.leaderboard.piece import attacked, data_sets
from benchmarks.leaderboard.plan import ALL_STAGES, Plan
from benchmarks.leaderboard.protocol import Protocol
from benchmarks.run.cells import Cell, in_order
from benchmarks.run.grid import Grid, Status
from benchmarks.run.progress import Progress
from benchmarks.run.store import Store
from core.data.data_sets import take_samples
from core.errors import InputError
from gradients.client_batch import validation_guesses

DIGITS = 4


@dataclass(frozen=True)
class About:
    """What an entry says of its defense in words.

    Attributes:
        defense: Its name on the leaderboard.
        description: The defense in one sentence.
        reference: Paper or address.
    """

    defense: str
    description: str = ""
    reference: str | None = None


def unfinished(plan: Plan, store: Store) -> list[Cell]:
    """The cells that are still to be computed, the victims' trainings included."""
    return [cell for cell in in_order(plan.cells()) if not store.is_finished(cell)]


def compute(plan: Plan, store: Store, workers: Workers, *, quiet: bool = False) -> None:
    """Compute what is missing.

    Args:
        plan: What is computed.
        store: Keeps the results; what is in it is not computed again.
        workers: Who computes.
        quiet: Whether only errors are said.

    Raises:
        InputError: A cell failed; with its name and its last words.
    """
    cells = plan.cells()
    if not unfinished(plan, store):
        return
    executor = workers.executor({ALL_STAGES[cell.stage] for cell in in_order(cells)})
    progress = Progress(plan.labels(), quiet)
    grid = Grid(cells, store, executor, ALL_STAGES, progress, retry_failed=True)
    statuses = grid.run()
    for cell in in_order(cells):
        if statuses[cell.key] is Status.FAILED:
            failure = store.failure(cell) or {"error": "no reason is known"}
            raise InputError(f"{plan.labels()[cell.key]} failed: {failure['error']}")


def make_entry(plan: Plan, store: Store, about: About) -> BoardEntry:
    """The entry of a plan that was computed.

    Args:
        plan: What was measured.
        store: Has the results.
        about: The defense in words.

    Raises:
        InputError: A result is missing, or cannot be true.
    """
    protocol, candidate = plan.protocol, plan.candidate
    pieces = {s.name: [_result(store, c) for c in cells] for s, cells in plan.pieces.items()}
    trainings = [_result(store, cell) for cell in plan.trainings]
    every = [*trainings, *(piece for found in pieces.values() for piece in found)]
    entry = BoardEntry(
        protocol=protocol.name,
        fingerprint=protocol.fingerprint,
        defense=about.defense,
        apply=candidate.defense,
        threat=candidate.threat,
        accuracies=tuple(training["final_val_acc1"] for training in trainings),
        leaks={name: _leak(found) for name, found in pieces.items()},
        guesses=guesses(protocol),
        description=about.description,
        reference=about.reference,
        plugin=candidate.plugin,
        sigma=candidate.sigma,
        epsilon=_epsilon(trainings[0]),
        seconds=round(sum(record["seconds"] for record in every), 1),
        provenance=every[-1]["provenance"],
    )
    check_against(entry, protocol, about.defense)
    return entry


def write_entry(entry: BoardEntry, path: Path) -> None:
    """Write an entry that everybody can read again.

    Raises:
        InputError: It does not make sense.
    """
    entry_from(dataclasses.asdict(entry), str(path))
    entry.write(path)


def _result(store: Store, cell: Cell) -> dict[str, Any]:
    found = store.result(cell)
    if found is None:
        raise InputError(f"{cell.stage} {cell.key} is not finished; run the same command again")
    return found


def _leak(pieces: Sequence[Mapping[str, Any]]) -> Leak:
    images = [image for piece in pieces for image in piece["images"]]
    return Leak(
        psnr=tuple(round(image["psnr"], DIGITS) for image in images),
        ssim=tuple(round(image["ssim"], DIGITS) for image in images),
        identified=tuple(image["identified"] for image in images),
        labels=tuple(image["label"] for image in images),
        strongest=tuple(image["strongest"] for image in images),
    )


def _epsilon(training: Mapping[str, Any]) -> float | None:
    """The budget that the training has spent, by DP-SGD or by the clients' defense."""
    for part in ("privacy", "federation"):
        promised = training.get(part) or {}
        if promised.get("epsilon") is not None:
            return float(promised["epsilon"])
    return None


def guesses(protocol: Protocol) -> dict[str, dict[str, tuple[float, ...]]]:
    """What guesses without a gradient get of every image, by guess and metric."""
    data = data_sets(protocol.data)
    chosen = attacked(protocol.data, protocol.images, protocol.seed)
    images, _ = take_samples(data.train_plain, chosen, data.spec)
    mean, nearest = validation_guesses(data, images)
    assert mean is not None
    assert nearest is not None
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    shown = dict(zip(GUESSES, (flat, mean.expand_as(images), nearest), strict=True))
    metrics = {"psnr": psnr, "ssim": ssim}
    return {
        guess: {name: _rounded(metric(guessed, images)) for name, metric in metrics.items()}
        for guess, guessed in shown.items()
    }


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(value, DIGITS) for value in values.double().tolist())
