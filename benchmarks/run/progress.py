"""What a person sees while a grid runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.run.cells import Cell
from benchmarks.run.executor import Job, last_words
from core.escaping import in_one_line, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

DETAIL_WIDTH = 60


class Progress:
    """One bar for the grid with its time left, one line per running and per finished cell.

    Args:
        labels: Names of cells for people, by key.
        quiet: Say nothing but errors.
    """

    def __init__(self, labels: Mapping[str, str] | None = None, quiet: bool = False) -> None:
        self._labels = labels or {}
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._lines: list[tqdm[Any]] = []
        self._total = self._done = 0

    def begin(self, total: int, found: int) -> None:
        """The grid starts with `found` of `total` cells finished before."""
        self._total, self._done = total, found
        if found:
            self._say(f"{found} of {total} cells are finished already")
        if self._live and found < total:
            self._bar = tqdm(total=total, initial=found, desc="cells", unit="cell", leave=False)

    def started(self, cell: Cell) -> None:
        """A cell's command starts; without a terminal this is the line that says so."""
        if not self._live:
            self._say(f"        {self._label(cell)} ...")

    def finished(self, cell: Cell, status: str, seconds: float, error: str) -> None:
        """A cell came to its end."""
        self._done += 1
        took = f"{seconds:7.1f} s" if seconds else " " * 9
        line = f"[{self._done}/{self._total}] {status:8} {took}  {self._label(cell)}"
        self._say(f"{line}: {error}" if error else line, important=bool(error))
        if self._bar is not None:
            self._bar.update()

    def tick(self, running: Iterable[Job]) -> None:
        """Show what the running cells say."""
        if self._live:
            self._show([f"  {self._label(j.cell)}: {_shorten(last_words(j.log))}" for j in running])
            if self._bar is not None:
                self._bar.refresh()

    def end(self) -> None:
        """The grid is over; leave the terminal clean."""
        self._show([])
        for line in self._lines:
            line.close()
        if self._bar is not None:
            self._bar.close()

    def _show(self, texts: Sequence[str]) -> None:
        while len(self._lines) < len(texts):
            position = len(self._lines) + 1
            self._lines.append(tqdm(position=position, bar_format="{desc}", leave=False))
        padded = [*texts, *[""] * (len(self._lines) - len(texts))]
        for line, text in zip(self._lines, padded, strict=True):
            line.set_description_str(in_one_line(text))

    def _label(self, cell: Cell) -> str:
        return self._labels.get(cell.key, f"{cell.stage} {cell.key}")

    def _say(self, text: str, important: bool = False) -> None:
        if important or not self._quiet:
            tqdm.write(printable(text), file=sys.stderr)


def _shorten(text: str) -> str:
    return text if len(text) <= DETAIL_WIDTH else text[: DETAIL_WIDTH - 1] + "…"
