"""Names that a user misspells, and the lists of names that there are."""

from __future__ import annotations

import difflib
import html
from collections.abc import Collection

from core.errors import InputError


def check_name(what: str, name: str, known: Collection[str]) -> None:
    """Refuse an unknown name, with the names that are near it.

    Args:
        what: What it is the name of, for the message.
        name: As the user gave it.
        known: All there are.

    Raises:
        InputError: It is not among them.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise InputError(f"{what} {name!r} is unknown; {hint}")


class Catalogue(dict[str, str]):
    """Names and what each stands for, one line each."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {line}" for name, line in self.items())

    def _repr_html_(self) -> str:
        rows = (f"<tr><td>{name}</td><td>{html.escape(self[name])}</td></tr>" for name in self)
        return f"<table>{''.join(rows)}</table>"


def first_line(kind: type) -> str:
    """The first line of a class's docstring."""
    return (kind.__doc__ or "").strip().partition("\n")[0]
