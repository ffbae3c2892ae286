"""The store: what cells have computed, one folder per cell, safe to share.

    STORE/STAGE/KEY/cell.json      what was asked for
                    record.json    the result; the cell is finished when it exists
                    failure.json   the error of the last attempt, if it failed
                    log.txt        everything the command said
                    files/         what the command wrote

A cell runs under an exclusive file lock that its command inherits. When the
harness is killed, the lock stays with the orphaned command until that ends, so
two commands never write into one folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.run.cells import Cell
from benchmarks.run.committed import Committed
from core.errors import InputError
from core.reading import read_json_object
from core.storage import write_json, write_record

# Of a trained model, in the record of stage 1, in %.
ACCURACY = "best_val_acc1"


@dataclass(frozen=True)
class Store:
    """Results by cell.

    Attributes:
        root: Folder of the store; made when something is written.
        committed: Finished cells of a committed table, whose results count as well.
    """

    root: Path
    committed: Committed = field(default_factory=Committed)

    def folder(self, cell: Cell) -> Path:
        """Where a cell keeps everything."""
        return self.root / cell.stage / cell.key

    def files(self, cell: Cell) -> Path:
        """Where a cell's command writes."""
        return self.folder(cell) / "files"

    def log(self, cell: Cell) -> Path:
        """What a cell's command said."""
        return self.folder(cell) / "log.txt"

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell: what was asked for, and under `result` what came of it; else None."""
        return _read(self.folder(cell) / "record.json")

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell's command recorded, here or where it was committed; else None."""
        record = self.record(cell)
        if record is None:
            return self.committed.result(cell)
        return _result(record, self.folder(cell))

    def still_wanted(self, chains: Iterable[Sequence[Cell]]) -> list[Cell]:
        """The cells of all chains but those whose last cell's result is committed.

        Args:
            chains: Cells, each of which needs those before it.
        """
        return [
            cell
            for chain in chains
            if self.is_finished(chain[-1]) or self.committed.result(chain[-1]) is None
            for cell in chain
        ]

    def trained_otherwise(self, cells: Iterable[Cell]) -> list[str]:
        """Of models that were trained here and in a committed table, those that are not the same.

        Rounding differs between processors, and training makes another model of it. What attacks
        the one must not be compared with what attacks the other.

        Returns:
            A sentence for each.
        """
        sentences = []
        for cell in dict.fromkeys(cell for cell in cells if cell.stage == "train"):
            record, before = self.record(cell), self.committed.result(cell)
            if record is None or before is None:
                continue
            here, there = (each.get(ACCURACY) for each in (record["result"], before))
            if _differ(here, there):
                sentences.append(
                    f"train {cell.config.get('scheme', '')}: this processor's model has "
                    f"{here:.1f} % accuracy, that of the committed table {there:.1f} %; do not "
                    "compare rows that attack the one with rows that attack the other"
                )
        return sentences

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """The error of a failed cell, else None."""
        failure = None if self.is_finished(cell) else _read(self.folder(cell) / "failure.json")
        if failure is not None and not isinstance(failure.get("error"), str):
            raise InputError(f"{self.folder(cell)}/failure.json names no error; remove it")
        return failure

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell's result is there."""
        return (self.folder(cell) / "record.json").exists()

    def input_file(self, cell: Cell, pattern: str) -> Path:
        """The file of a finished cell that another one reads.

        Raises:
            FileNotFoundError: The cell left no such file.
        """
        found = sorted(self.files(cell).rglob(pattern))
        if not found:
            raise FileNotFoundError(f"{cell.stage} {cell.key} left no file {pattern}")
        return found[-1]

    def begin(self, cell: Cell) -> None:
        """Write down what is about to be computed."""
        self.files(cell).mkdir(parents=True, exist_ok=True)
        (self.folder(cell) / "failure.json").unlink(missing_ok=True)
        write_json(self.folder(cell) / "cell.json", cell.describe())

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """Make the cell finished; the last thing that is written."""
        write_record(self.folder(cell) / "record.json", {**cell.describe(), "result": record})

    def fail(self, cell: Cell, error: str, goes_on: bool = False) -> None:
        """Record that the cell's command failed.

        Args:
            cell: The cell.
            error: Why.
            goes_on: Whether its next run goes on from what it saved.
        """
        told = {"error": error, "goes_on": goes_on}
        write_record(self.folder(cell) / "failure.json", {**cell.describe(), **told})

    def discard(self, cell: Cell) -> None:
        """Forget a cell's files (not its log)."""
        shutil.rmtree(self.files(cell), ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, cell: Cell) -> Iterator[int | None]:
        """Hold a cell for this process.

        Yields:
            The lock's file descriptor (to hand to the command), or None when
            somebody else holds the cell.
        """
        descriptor = self.try_lock(cell)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def try_lock(self, cell: Cell) -> int | None:
        """Take the cell's lock: a descriptor that frees it when closed, or None."""
        self.folder(cell).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder(cell) / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def records(self) -> Iterator[dict[str, Any]]:
        """Every finished cell's record, in a stable order."""
        for path in sorted(self.root.glob("*/*/record.json")):
            record = _read(path)
            if record is not None:
                _result(record, path.parent)
                yield {"key": path.parent.name, "folder": str(path.parent), **record}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_json_object(path, what="record")
    except InputError as error:
        raise InputError(f"{error}; remove its folder to redo it") from None


def _result(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    result = record.get("result")
    if not isinstance(result, dict):
        raise InputError(f"{folder}/record.json holds no result; remove its folder to redo it")
    return result


def _differ(a: object, b: object) -> bool:
    """Whether both are numbers, and differ in more than rounding."""
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) > 1e-3
