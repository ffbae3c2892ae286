"""Data flows one way, and so do imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each room may import from the others.
ORDER = ["core", "training", "gradients", "attack", "audit", "federated"]
MAY_IMPORT = {room: set(ORDER[:number]) for number, room in enumerate(ORDER)}
MAY_IMPORT["nvflare_gradinv"] = set(ORDER)
MAY_IMPORT["benchmarks"] = set(ORDER) - {"federated"}
# The front door. It finds `benchmarks`, which is not installed, by name.
MAY_IMPORT["gradinvbench"] = set(ORDER) - {"federated"}
# The published path of stage 2's command.
LOOKS_FORWARD = {"training/get_gradients.py": {"gradients"}}
ROOMS = set(MAY_IMPORT)

CORE_LIBRARIES = {
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "matplotlib",
    "pandas",
    "prettytable",
    "tqdm",
}
# Rooms whose library is a condition of using them at all.
OWN_LIBRARIES = {"federated": {"nvflare"}, "nvflare_gradinv": {"nvflare"}}


def modules() -> list[Path]:
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted([*rooms, ROOT / "main_run.py"])


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(nodes: list[ast.stmt] | Iterator[ast.AST]) -> Iterator[str]:
    """Top-level packages imported by some statements."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def when_imported(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those for type checkers only."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield node
        for name in ("body", "orelse", "finalbody"):
            pending += [c for c in getattr(node, name, []) if isinstance(c, ast.stmt)]
        pending += [c for h in getattr(node, "handlers", []) for c in h.body]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def forbidden_imports(path: Path) -> set[str]:
    room = room_of(path)
    allowed = MAY_IMPORT.get(room, ROOMS - {"benchmarks", "federated", "nvflare_gradinv"})
    allowed = allowed | {room} | LOOKS_FORWARD.get(name(path), set())
    return (set(imports(ast.walk(parse(path)))) & ROOMS) - allowed


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_follow_the_flow_of_data(path: Path) -> None:
    assert not forbidden_imports(path)


@pytest.mark.parametrize("path", modules(), ids=name)
def test_core_imports_only_the_core_libraries(path: Path) -> None:
    allowed = CORE_LIBRARIES | ROOMS | OWN_LIBRARIES.get(room_of(path), set())
    found = set(imports(when_imported(parse(path))))
    assert found - allowed - set(sys.stdlib_module_names) == set()


def test_the_graph_check_sees_a_backward_import(tmp_path: Path) -> None:
    tree = ast.parse("def f():\n    import benchmarks.store\n")
    assert "benchmarks" in set(imports(ast.walk(tree)))
    assert "benchmarks" not in set(imports(when_imported(tree)))


def test_every_room_is_looked_at() -> None:
    seen = {room_of(path) for path in modules()}
    assert {"core", "training", "gradients", "attack", "benchmarks", "main_run.py"} <= seen
