"""Data flows one way, and so do imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each room may import from the others: those before it.
ORDER = ["core", "training", "gradients", "attack", "audit", "federated", "benchmarks"]
MAY_IMPORT = {room: set(ORDER[:number]) for number, room in enumerate(ORDER)}
# The published path of the federation's components.
MAY_IMPORT["nvflare_gradinv"] = MAY_IMPORT["benchmarks"]
# The front door. It finds `benchmarks`, which is not installed, by name.
MAY_IMPORT["gradinvbench"] = MAY_IMPORT["benchmarks"]
# Evidence is measured as a user measures: through the front door.
MAY_IMPORT["benchmarks"] = MAY_IMPORT["benchmarks"] | {"gradinvbench"}
# What each part of a room may import from its other parts.
PARTS = {
    "benchmarks": {
        "run": set(),
        "declare": {"run"},
        "show": {"run", "declare", "leaderboard"},
        "speed": {"compute", "declare", "run", "show"},
    },
}
# The published path of stage 2's command.
LOOKS_FORWARD = {"training/get_gradients.py": {"gradients"}}
ROOMS = set(MAY_IMPORT)

CORE_LIBRARIES = {
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "PIL",
    "matplotlib",
    "pandas",
    "prettytable",
    "tqdm",
}
# Rooms whose library is a condition of using them at all.
OWN_LIBRARIES = {"federated": {"nvflare", "flwr"}, "nvflare_gradinv": {"nvflare"}}


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


def all_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node, in functions too, but not what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for statement in child.orelse:
                yield statement
                yield from all_statements(statement)
        else:
            yield child
            yield from all_statements(child)


def imported_files(tree: ast.Module, known: Collection[str]) -> set[str]:
    """Modules among `known` that a file imports, at its start or in a function."""
    found = set()
    for node in all_statements(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # What is no module of its own is in the package's file.
            found |= names if names <= set(known) else names | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """What every file of every room imports."""
    files = {dotted(path): path for path in modules()}
    return {module: imported_files(parse(path), files) - {module} for module, path in files.items()}


def circles(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Circles of a graph, as the way around; one for each edge that leads back."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> None:
        if node in way:
            found.append([*way[way.index(node) :], node])
        elif node not in done:
            for other in sorted(graph[node]):
                visit(other, [*way, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    assert [" -> ".join(circle) for circle in circles(import_graph())] == []


@pytest.mark.parametrize("room", PARTS)
def test_imports_inside_a_room_follow_its_direction(room: str) -> None:
    for module, imported in import_graph().items():
        part = module.split(".")[1] if module.startswith(f"{room}.") else ""
        inside = {other.split(".")[1] for other in imported if other.startswith(f"{room}.")}
        if part in PARTS[room]:
            assert inside - {part} <= PARTS[room][part], module


def test_the_check_of_circles_sees_imports_in_functions() -> None:
    known = {"a", "b", "p", "p.c"}
    deferred = ast.parse("def f():\n    import b\n    from p import c\n    from p import name\n")
    assert imported_files(deferred, known) == {"b", "p.c", "p"}
    typed = ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b\n")
    assert imported_files(typed, known) == {"b"}
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c", "b"]]


def test_the_graph_check_sees_a_backward_import(tmp_path: Path) -> None:
    tree = ast.parse("def f():\n    import benchmarks.store\n")
    assert "benchmarks" in set(imports(ast.walk(tree)))
    assert "benchmarks" not in set(imports(when_imported(tree)))


def test_every_room_is_looked_at() -> None:
    seen = {room_of(path) for path in modules()}
    assert {"core", "training", "gradients", "attack", "benchmarks", "main_run.py"} <= seen
