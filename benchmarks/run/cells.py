"""Cells: the units of work of a grid, each known by what it computes."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Input:
    """A file of another cell that a cell reads.

    Attributes:
        cell: Who makes it.
        pattern: File name in that cell's folder, may hold wildcards.
    """

    cell: Cell
    pattern: str


@dataclass(frozen=True, eq=False)
class Cell:
    """One command with one configuration.

    Attributes:
        stage: "train", "extract", "attack" or "federated".
        config: The command's flags (long names without dashes) and their values;
            `True` is a flag without a value.
        inputs: Files of other cells, by the flag that takes them.
        code: Version of the code that the stage runs (`code_version`).
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    code: str = ""

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        return {
            "stage": self.stage,
            "config": dict(self.config),
            "inputs": {
                flag: {"cell": i.cell.key, "stage": i.cell.stage, "pattern": i.pattern}
                for flag, i in self.inputs.items()
            },
            "code": self.code,
        }

    @functools.cached_property
    def key(self) -> str:
        """Hash of the canonical JSON of `describe`."""
        return hash_json(self.describe())

    @functools.cached_property
    def setting(self) -> str:
        """Hash of what was asked for, whatever version of the code computes it."""
        inputs = {
            flag: {"cell": i.cell.setting, "stage": i.cell.stage, "pattern": i.pattern}
            for flag, i in self.inputs.items()
        }
        return hash_json({"stage": self.stage, "config": dict(self.config), "inputs": inputs})

    @property
    def needs(self) -> list[Cell]:
        """The cells that must be finished first."""
        return [i.cell for i in self.inputs.values()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def hash_json(value: Any, length: int = 16) -> str:
    """Hash of a plain value that does not depend on the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and all they need, each once, needs first."""
    done: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        if cell.key not in done:
            for need in cell.needs:
                visit(need)
            done[cell.key] = cell

    for cell in cells:
        visit(cell)
    return list(done.values())


@functools.cache
def code_version(paths: tuple[str, ...], root: Path = ROOT) -> str:
    """Hash of what the Python files under `paths` do.

    Comments, docstrings and layout do not count: a reworded sentence must not
    throw away hours of results.

    Args:
        paths: Files or folders relative to `root`.
        root: Folder of the checkout.
    """
    digest = hashlib.sha256()
    for path in _python_files(paths, root):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(_meaning(path.read_text(encoding="utf-8")))
    return digest.hexdigest()[:12]


def _python_files(paths: Sequence[str], root: Path) -> Iterator[Path]:
    for name in paths:
        path = root / name
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


@functools.cache
def _meaning(source: str) -> bytes:
    """Hash of what one file does; most stages share most files."""
    return hashlib.sha256(_without_docstrings(source).encode()).digest()


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_bare_string(s)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_bare_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
