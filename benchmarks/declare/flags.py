"""Whether a command would take a flag's value, before hours of cells find out."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.run.stages import PROCESSES, Stage


def known_flags(stage: Stage) -> dict[str, argparse.Action]:
    """The flags of a stage's command; empty without a parser."""
    if stage.parser is None:
        return {}
    parser = stage.parser()
    processes = argparse.ArgumentParser().add_argument(f"--{PROCESSES}", type=_process_count)
    actions = [processes, *parser.actions]
    return {o[2:]: a for a in actions for o in a.option_strings if o.startswith("--")}


def _process_count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def complaint(action: argparse.Action | None, value: Any) -> str:
    """Why a command would refuse a flag's value; empty if it would not."""
    if action is None or value is None:
        return ""
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "a flag without a value: true or false"
    if action.choices is not None and value not in action.choices:
        return f"choose from {', '.join(map(str, action.choices))}"
    if isinstance(value, bool):
        return "" if action.nargs == "?" else "needs a value; null leaves the flag out"
    if isinstance(value, (list, dict)):
        return "expected a single value"
    try:
        if callable(action.type):
            action.type(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return "not a valid value"
    return ""
