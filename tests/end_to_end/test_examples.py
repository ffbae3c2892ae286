"""Every example runs, is short, and says nothing about what is inside."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launched import Command

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_LINES = 30
# What an example may import beside torch and the package.
ALSO_IMPORTED = {"hugging_face": {"transformers"}, "text": {"transformers"}}
# What examples print, and the least that the number must be; every one in what it prints.
NUMBERS = {
    "regression": [(r"PSNR ([\d.]+) dB", 60)],
    "one_channel": [(r"PSNR ([\d.]+) dB", 40), (r"SSIM ([\d.]+)", 0.97)],
    "findings": [(r"PSNR ([\d.]+) dB", 40)],
    "segmentation": [(r"pixel.*PSNR ([\d.]+) dB", 13), (r"dice: PSNR ([\d.]+) dB", 13)],
    "volume": [(r"NCC ([\d.]+)", 0.9), (r"PSNR ([\d.]+) dB", 22)],
    "adamw": [(r"sgd .*PSNR ([\d.]+) dB", 40), (r"adamw .*PSNR ([\d.]+) dB", 15)],
    "last_layer": [(r"PSNR ([\d.]+) dB", 40)],
    "hugging_face": [(r"PSNR ([\d.]+) dB", 18)],
    "text": [(r"(\d+)% of the sentences", 99)],
}  # fmt: skip
# What examples print of labels, and what is right.
LABELS = {
    "one_channel": "label [3]",
    "findings": "findings [0.0, 0.0, 1.0], true ones [0.0, 0.0, 1.0]",
    "audit_update": "VERDICT: LEAKS",
    "last_layer": "shared: head.weight, head.bias",
    "hugging_face": "label [2]",
}


def run(script: Path, folder: Path, *path: Path) -> tuple[int | None, str]:
    """Run a script in a folder, with further folders in front of what the tests import from.

    Returns:
        Exit status, and what it printed.
    """
    places = os.pathsep.join(map(str, [*path, ROOT, *sys.path]))
    process = Command(str(script), folder=folder, PYTHONPATH=places, MPLBACKEND="agg")
    said, _ = process.communicate(timeout=280)
    return process.returncode, said


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"own_module", "plugins", *NUMBERS}
    assert [path.stem for path in NOTEBOOKS] == ["quickstart"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    for module in ALSO_IMPORTED.get(path.stem, ()):
        pytest.importorskip(module, reason=f"this example needs {module}")
    status, said = run(path, tmp_path)
    assert status == 0, said
    assert said
    for number, least in NUMBERS.get(path.stem, []):
        found = [float(text) for text in re.findall(number, said)]
        assert found, said
        assert min(found) > least, said
    assert LABELS.get(path.stem, "") in said


def test_an_example_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError\n", encoding="utf-8")
    found = run(ROOT / "examples" / "hugging_face.py", tmp_path, tmp_path)
    assert found == (0, "This example needs transformers: pip install transformers\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_imports_nothing_from_inside(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert imported == {"torch", "gradinvbench"} | ALSO_IMPORTED.get(path.stem, set())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(cells(path, "code")), encoding="utf-8")
    status, said = run(script, tmp_path)
    assert status == 0, said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path: Path) -> None:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        assert set(cell) >= {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
