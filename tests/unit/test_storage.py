"""How records are written: content, lines, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.storage import write_entries

CONTENT: dict[str, Any] = {
    "title": "a line\nand another",
    "rows": [{"b": [1, 2], "a": None}, {}, 3.5],
    "records": {"y": {"psnr": [0.1, 1e-300]}, "x": {"é": "é"}},
    "none": {},
    "empty": [],
}


def test_large_collections_have_one_line_per_entry(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_entries(path, CONTENT)
    text = path.read_text()
    assert json.loads(text) == CONTENT
    assert '  {"a": null, "b": [1, 2]},' in text.splitlines()
    changed = CONTENT | {"records": CONTENT["records"] | {"z": {"psnr": [2.0]}}}
    write_entries(path, changed)
    before, after = text.splitlines(), path.read_text().splitlines()
    assert len(after) == len(before) + 1
    # The line before the last one has a comma now.
    assert len(set(after) - set(before)) == 2
    assert list(json.loads(text)) == sorted(CONTENT)


def test_what_is_no_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_entries(path, CONTENT)
    before = path.read_text()
    with pytest.raises(TypeError):
        write_entries(path, {"rows": [object()]})
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]
