"""What to say of a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def unknown(kind: str, name: str, known: Collection[str], otherwise: str = "") -> str:
    """One sentence that names the nearest known names.

    Args:
        kind: What it should have been the name of.
        name: What was given.
        known: All that would be right.
        otherwise: What to say where none is near; a list of all if empty.
    """
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    near = near or difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown {kind} {name}; did you mean {' or '.join(near)}?"
    listed = f"known are {', '.join(map(str, known))}"
    return f"unknown {kind} {name}; {otherwise or listed}"
