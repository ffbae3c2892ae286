"""Grids of cells turned into tables, figures and a report."""

from __future__ import annotations

from typing import Any

__all__ = ["load_results"]


def __getattr__(name: str) -> Any:
    """Import `load_results` when it is asked for: `--help` shall not wait for torch."""
    if name == "load_results":
        from benchmarks.show.results import load_results

        return load_results
    raise AttributeError(f"module {__name__} has no attribute {name}")
