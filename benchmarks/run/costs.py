"""What cells will cost, from what finished ones have."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.run.cells import Cell
from benchmarks.run.committed import Committed
from benchmarks.run.store import Store
from core.errors import InputError

_UNITS = {"s": 1, "m": 60, "h": 3600}
NONE = "none"


def seconds_of(budget: str, flag: str = "--budget") -> float | None:
    """Seconds of "90s", "30m" or "2h"; None of "none".

    Args:
        budget: The word.
        flag: Whose it is, for a message.

    Raises:
        InputError: It is neither.
    """
    if budget == NONE:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if found is None:
        raise InputError(f"{flag} {budget}: give a time such as 90s, 30m or 2h, or none")
    return float(found[1]) * _UNITS[found[2]]


class Costs:
    """Seconds per cell, from records of cells like it.

    Args:
        store: Has the records, committed ones among them.
        cells: Those whose costs are known or asked for.
        reference: A committed table whose results are not taken over; what its cells cost is what
            these will, where the store does not know.
    """

    def __init__(
        self, store: Store, cells: Iterable[Cell], reference: Committed | None = None
    ) -> None:
        reference = reference or Committed()
        self._by_kind: dict[tuple[str, str], list[float]] = {}
        for cell in {cell.setting: cell for cell in cells}.values():
            seconds = _seconds(store.result(cell) or reference.result(cell))
            if seconds is not None:
                for kind in (_kind(cell), (cell.stage, "")):
                    self._by_kind.setdefault(kind, []).append(seconds)

    def of(self, cell: Cell) -> float | None:
        """Median seconds of cells of the same attack, or of the same stage; None: unknown."""
        found = self._by_kind.get(_kind(cell)) or self._by_kind.get((cell.stage, ""))
        return statistics.median(found) if found else None

    def total(self, cells: Iterable[Cell]) -> tuple[float, int]:
        """Seconds of all cells whose costs are known, and the number of the others."""
        each = [self.of(cell) for cell in cells]
        return math.fsum(s for s in each if s is not None), each.count(None)


def _seconds(result: Mapping[str, Any] | None) -> float | None:
    seconds = None if result is None else result.get("wall_seconds", result.get("seconds"))
    return float(seconds) if isinstance(seconds, (int, float)) else None


def _kind(cell: Cell) -> tuple[str, str]:
    return cell.stage, str(cell.config.get("attack", ""))


def in_words(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
