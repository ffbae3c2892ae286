"""`python -m benchmarks` with several tables, and without doing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.command import main

TABLE = """
title: {title}
axes:
  images: {{extract.batch-size: {sizes}}}
chain: [extract]
extract: {{arch: cnn, width: 4, image-size: 16, workers: 0}}
columns: [extract.gradient_norm]
presets: {{embedded: {{data: photo-patches}}}}
"""


def test_a_dry_run_names_every_command_once_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert main(["schemes", "noise", "--dry-run", "--store", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines))
    commands = [line for line in lines if not line.startswith("# ")]
    undefended = [c for c in commands if "main_pytorch.py" in c and "--scheme pure" in c]
    assert len(undefended) == 2  # BatchNorm and GroupNorm, shared by both tables
    assert all(line.endswith("(to do)") for line in lines if line.startswith("# "))
    assert not list(store.rglob("*.json"))


def test_several_tables_share_their_cells_and_get_a_folder_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for name, sizes in (("small", [1]), ("both", [1, 2])):
        names.append(str(tmp_path / f"{name}.yaml"))
        Path(names[-1]).write_text(TABLE.format(title=name, sizes=sizes))
    where = ["--output", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    assert main([*names, *where]) == 0
    said = capsys.readouterr().out
    assert "1 cells finished\n" in said
    assert "1 cells found, 1 cells finished" in said
    for name in ("small", "both"):
        assert (tmp_path / "out" / name / "report.html").exists()


def test_of_some_rows_only_their_cells_are_computed_and_all_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(TABLE.format(title="both", sizes=[1, 2]))
    words = [str(path), "--output", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    assert main([*words, "--where", "images=2"]) == 0
    assert "1 cells finished\n" in capsys.readouterr().out
    rows = (tmp_path / "out" / "both.csv").read_text().splitlines()
    assert len(rows) == 3
    assert main([*words, "--where", "images=1", "--dry-run"]) == 0
    assert "(to do)" in capsys.readouterr().out
    assert main([*words, "--where", "images=3"]) == 2
    assert "--where images=3: values of images are 1, 2" in capsys.readouterr().err
    assert main(words) == 0
    assert "1 cells found, 1 cells finished" in capsys.readouterr().out


def test_an_unknown_table_among_several_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["noise", "noize", "--store", str(tmp_path / "store")]) == 2
    assert "did you mean noise?" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
