"""The section `Reproduced:` in the attacks' docstrings, as the record has it.

`docs/generate.py` writes it; the text behind "Published:" is the author's.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from attack.attacks import attack_names, get_attack
from benchmarks.fidelity.page import Line, of_attack, reproduced
from benchmarks.fidelity.record import Record

WIDTH = 100
# The section with its indented lines, and the empty line behind it.
SECTION = re.compile(r"    Reproduced:\n(?: {8}.*\n)+\n?")
# Where it goes: behind these sections, whichever comes last.
BEFORE = re.compile(r"    (?:Published|Source):(?:.*\n)(?: {4,}\S.*\n)*(?:\n|(?=    \"\"\"))")


def section(lines: list[Line]) -> str:
    """The section's text for an attack's rows, indented as in a class's docstring."""
    parts = []
    for line in lines:
        sentence = f"{line.row.name}: {reproduced(line)}."
        parts.append(
            textwrap.fill(
                sentence, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10
            )
        )  # fmt: skip
    return "    Reproduced:\n" + "\n".join(parts) + "\n"


def restated(docstring: str, lines: list[Line]) -> str:
    """A docstring, as it stands in the file, with the section anew.

    Args:
        docstring: From its first quotes to its last, the class's indentation included.
        lines: The attack's rows; none: the section is left out.
    """
    bare = SECTION.sub("", docstring)
    places = list(BEFORE.finditer(bare))
    if not lines or not places:
        return bare
    head, tail = bare[: places[-1].end()].rstrip("\n"), bare[places[-1].end() :]
    gap = "" if tail.startswith('    """') else "\n"
    return f"{head}\n\n{section(lines)}{gap}{tail}"


def restate(record: Record) -> dict[Path, str]:
    """The files of all attacks that a row is about, as they should read."""
    found: dict[Path, str] = {}
    for name in attack_names():
        kind = get_attack(name)
        if not kind.__module__.startswith("attack."):
            continue
        path = Path(inspect.getfile(kind))
        text = found.get(path) or path.read_text(encoding="utf-8")
        begin = text.index('    """', text.index(f"class {kind.__name__}("))
        end = text.index('    """\n', begin + 7)
        docstring = restated(text[begin : end + 8], of_attack(record, name))
        found[path] = text[:begin] + docstring + text[end + 8 :]
    return found
