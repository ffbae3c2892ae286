"""What the documents show: their links, commands and Python examples."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
PROGRAMS = ("python", "torchrun", "gradinvbench", "make", "./start_fl_sim.sh")
INLINE = re.compile(rf"`((?:{'|'.join(map(re.escape, PROGRAMS))}) [^`]+)`")
# The commands of the console script, by the published commands that they are.
VERBS = {
    "train": "python training/main_pytorch.py",
    "extract": "python training/get_gradients.py",
    "attack": "python main_run.py",
    "audit": "gradinvbench audit",
    "table": "python -m benchmarks",
    "leaderboard": "python -m benchmarks leaderboard",
}


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def prose(text: str) -> str:
    """A document without its fenced examples."""
    return FENCE.sub("", text)


def headings(document: Path) -> set[str]:
    """What links to a document's headings end with, as code hosts and mkdocs spell them."""
    lines = [line for line in prose(document.read_text()).splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-") for line in lines}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command that a document shows, indented or in its sentences."""
    joined = re.sub(r" *\\\n *", " ", prose(text))
    for line in joined.splitlines():
        if line.startswith("    ") and line.split()[:1] and line.split()[0] in PROGRAMS:
            yield shlex.split(line, comments=True)
    for inline in INLINE.findall(re.sub(r"\n(?! *\n)", " ", joined)):
        # A synopsis puts what may be left out in brackets.
        yield shlex.split(inline.replace("[", "").replace("]", ""))


def all_commands() -> list[tuple[str, list[str]]]:
    """Every command of every document, with the document's name."""
    found = {
        (name_of(document), tuple(words)): words
        for document in DOCUMENTS
        for words in commands(document.read_text())
    }
    return [(name, words) for (name, _), words in found.items()]


def python_blocks(document: Path) -> list[str]:
    """The Python examples of a document, in order."""
    return [code for kind, code in FENCE.findall(document.read_text()) if kind == "python"]


def generator() -> ModuleType:
    """`docs/generate.py`, which is a script and in no package."""
    place = ROOT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks up the module that it is in.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def published(words: list[str]) -> list[str]:
    """The published command that a command runs: without torchrun, the script's own name."""
    if words[0] == "torchrun":
        return ["python", *words[words.index("main_run.py") :]]
    if words[0] == "gradinvbench":
        return [*VERBS[words[1]].split(), *words[2:]]
    return words


def parser_and_arguments(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Who reads a command, and the words that it reads.

    Raises:
        KeyError: It is no published command.
    """
    generate = generator()
    words = published(words)
    for length in (4, 3, 2, 1):
        command = " ".join(words[:length])
        if command in generate.COMMANDS:
            # An example's three dots stand for what the reader adds.
            return generate.parser_of(command), [w for w in words[length:] if w != "..."]
    raise KeyError(" ".join(words))
