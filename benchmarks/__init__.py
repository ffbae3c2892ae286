"""Grids of cells turned into tables, figures and a report.

Imports inside this room go `run -> declare -> show`, each importing only from those before it:
`run` computes cells and knows no tables, `declare` says of which cells a table consists, `show`
turns their records into what people read. `speed` times the parts of an attack and stands
beside them (it imports `run` alone); `command` is the command line over all of them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_results"]


def __getattr__(name: str) -> Any:
    """Import `load_results` when it is asked for: `--help` shall not wait for torch."""
    if name == "load_results":
        from benchmarks.show.results import load_results

        return load_results
    raise AttributeError(f"module {__name__} has no attribute {name}")
