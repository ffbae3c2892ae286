"""What others wrote stays text in a terminal, a spreadsheet and Markdown."""

from __future__ import annotations

import csv
import errno
import io
import logging
from pathlib import Path

import pytest
import torch

from benchmarks.command import main
from benchmarks.show.render import TextTable, to_latex, to_markdown, to_terminal
from core.data.records import load_table
from core.errors import InputError, exit_status, write_failure
from core.escaping import PrintableFormatter, in_csv, in_markdown, in_one_line, printable
from core.storage import atomic_file
from gradients.shared_update import read_update
from tests.reader_files import ROOT

EVIL = {
    "clear the screen": "\x1b[2Jname",
    "set the title": "\x1b]0;owned\x07",
    "8-bit sequence": "\x9b31mred",
    "overwrite the line": "bad\rgood",
    "backspace": "bad\b\b\bgood",
    "right to left": "abc\u202egnp.exe",
    "line separator": "a\u2028b",
    "lone surrogate": "a\udc80b",
    "null": "a\0b",
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_a_terminal_is_shown_and_not_told(text: str) -> None:
    for shown in (printable(text), in_one_line(text), in_markdown(text)):
        assert all(c.isprintable() for c in shown), repr(shown)
        assert "".join(filter(str.isalnum, text)) in "".join(filter(str.isalnum, shown)) or (
            text != shown
        )
        shown.encode("utf-8")


def test_what_is_harmless_stays() -> None:
    text = "PSNR 21.0 ± 0.8 dB, ε ≤ 3\n\tσ₀ = 25 – Größe 图"
    assert printable(text) == text
    assert in_one_line(text) == text.replace("\n\t", " ")
    assert in_markdown("a < 0.1, b_c * d `e` [a]") == "a < 0.1, b_c * d `e` [a]"


CELLS = {
    "=1+1": "'=1+1",
    "+cmd|' /C calc'!A0": "'+cmd|' /C calc'!A0",
    "@SUM(A1)": "'@SUM(A1)",
    "-2+3": "'-2+3",
    "-": "'-",
    "\t=1": "'\t=1",
    "\r=1": "'\r=1",
    "\n=1": "'\n=1",
    "-1.5": "-1.5",
    "+2": "+2",
    "-1e-6": "-1e-6",
    "-.5": "-.5",
    "a=1": "a=1",
    "": "",
}


@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_no_cell_is_a_formula_and_numbers_stay(cell: str) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerow([in_csv(cell), in_csv(-1.5), in_csv(None)])
    (row,) = csv.reader(io.StringIO(buffer.getvalue(), newline=""))
    assert row == [CELLS[cell], "-1.5", ""]


MARKDOWN = {
    "a|b": "a\\|b",
    "a\nb": "a b",
    "<script>x</script>": "&lt;script>x&lt;/script>",
    "<!-- x": "&lt;!-- x",
    "<javascript:x>": "&lt;javascript:x>",
    "[x](javascript:alert(1))": "[x]\\(javascript:alert(1))",
    "![x](http://a/b)": "![x]\\(http://a/b)",
    "[x]: javascript:a": "[x]\\: javascript:a",
    "a\r\n\r\n# title": "a # title",
}


@pytest.mark.parametrize("text", MARKDOWN, ids=repr)
def test_markdown_gets_no_column_line_tag_or_link(text: str) -> None:
    assert in_markdown(text) == MARKDOWN[text]


def test_a_table_keeps_its_shape_whatever_its_entries_say() -> None:
    evil = "x|y\n<b>\x1b[2J[l](javascript:a)"
    table = TextTable(evil, [evil, "n"], [[evil, "1"], ["b", "2"]], [[evil, "3"]], [("a", evil)])
    markdown, terminal, latex = to_markdown(table), to_terminal(table), to_latex(table)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
    assert len(terminal.splitlines()) == 3 + 2 + 2 + 2 + 1 + 1
    assert len({len(line) for line in terminal.splitlines()[:-1]}) == 1
    for text in (markdown, terminal, latex):
        assert "\x1b" not in text
    assert "<b" not in markdown


def test_errors_are_printed_without_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise InputError("--id \x1b[2J: no")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: --id \\x1b[2J: no\n"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_file(tmp_path / "record.json", "w"):
            # As a write on an open file does: without a name.
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        fill()
    assert write_failure(caught.value) == (
        f"cannot write {tmp_path / 'record.json'}: No space left on device"
    )
    assert not list(tmp_path.iterdir())


def test_a_log_on_a_terminal_is_shown_and_not_told() -> None:
    message = logging.LogRecord("x", logging.INFO, "f", 1, "read %s", ("\x1b[2Jname",), None)
    assert PrintableFormatter("%(message)s").format(message) == "read \\x1b[2Jname"


def test_columns_and_classes_of_a_table_of_records(tmp_path: Path) -> None:
    path = tmp_path / "table\x9b.csv"
    path.write_text("a\x1b[2J,b\n\x1b]0;x\x07,x\x1b[3A\nw,y\nw,y\n")
    shown = repr(load_table(path))
    assert all(c.isprintable() or c == "\n" for c in shown), repr(shown)
    assert "\\x1b[2J" in shown
    assert "\\x1b[3A" in shown


def test_names_in_an_update() -> None:
    state = {"w\x1b[2J": torch.ones(2)}
    update = read_update(state, {**state, "more\x9b": torch.ones(1)}, kind="weights")
    assert all(c.isprintable() or c == "\n" for c in str(update)), str(update)


def test_the_commands_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "benchmarks/tables/batch_size.yaml").read_text()
    text = text.replace("    initial:", '    "initial\\e[2J":')
    (tmp_path / "table.yaml").write_text(text)
    main([str(tmp_path / "table.yaml"), "--dry-run", "--store", str(tmp_path / "store")])
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown
    assert "\x1b" not in shown
