"""What docstrings say, section by section, for pages of the documents."""

from __future__ import annotations

import inspect
import re

SECTION = re.compile(
    r"^(Source|Published|Reproduced|Args|Attributes|Shape|Example|Returns|Raises):[ \n]*",
    re.MULTILINE,
)
ADDRESS = re.compile(r"https?://[^\s<>]+[^\s<>.,;:)]")


def sections(docstring: str) -> dict[str, str]:
    """A docstring's sections by name; the text outside all sections is `""`.

    A section ends at an empty line that nothing indented follows.
    """
    found: dict[str, list[str]] = {"": []}
    name = ""
    lines = inspect.cleandoc(docstring).splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        header = SECTION.match(line + "\n")
        if header:
            name = header[1]
            line = line[len(name) + 1 :].strip()
        found.setdefault(name, []).append(line)
        if not line and after and not after.startswith(" "):
            name = ""
    return {name: inspect.cleandoc("\n".join(lines)).strip() for name, lines in found.items()}


def linked(text: str) -> str:
    """The text with its addresses as links."""
    return ADDRESS.sub(lambda address: f"<{address[0]}>", text)
