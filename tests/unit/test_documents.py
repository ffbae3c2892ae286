"""What the documents say is there, in a fresh clone too, and is what the code says."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from core.errors import InputError
from core.losses import MeanSquaredError
from core.models.building import ModelSpec
from gradients.checkpoint import load_target, save_target
from tests.documents import (
    DOCUMENTS,
    LINK,
    ROOT,
    all_commands,
    generator,
    headings,
    name_of,
    parser_and_arguments,
    prose,
)
from tests.targets import make_target

SOURCE_FILE = re.compile(r"`((?:\w+/)+\w+\.(?:py|yaml|json|md))`")
# What runs in the tests without a parser of its own.
WITHOUT_PARSER = (["python", "docs/generate.py"],)


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = set(listing.stdout.split("\n"))
    return files | {str(parent) for file in files for parent in Path(file).parents}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_of_the_repository(document: Path, tracked: set[str]) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(prose(document.read_text()))]
    local = [link for link in links if link and "://" not in link]
    broken = [
        link
        for link in local
        if str((document.parent / link).resolve().relative_to(ROOT)) not in tracked
    ]
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_headings_that_are_linked_exist(document: Path) -> None:
    links = [link.partition("#") for link in LINK.findall(prose(document.read_text()))]
    wrong = [
        f"{file}#{heading}"
        for file, _, heading in links
        if heading and "://" not in file
        and heading not in headings((document.parent / file) if file else document)
    ]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(document: Path) -> None:
    named = SOURCE_FILE.findall(document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    pages: dict[str, str] = generator().pages()
    return pages


def test_generated_pages_say_what_the_code_says(generated: dict[str, str]) -> None:
    """After a change of a docstring, a flag or a table: python docs/generate.py."""
    folder = ROOT / "docs" / "generated"
    committed = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.md")}
    assert committed.keys() == generated.keys()
    stale = [name for name, text in generated.items() if committed[name] != text]
    assert stale == [], "run python docs/generate.py"


def test_the_record_of_an_audit_is_described_field_by_field() -> None:
    """After a change of `audit/record.py`: python docs/generate.py."""
    page = (ROOT / "docs" / "audit-record.md").read_text()
    assert page == generator().audit_record_page(), "run python docs/generate.py"
    for kind in vars(importlib.import_module("audit.record")).values():
        if dataclasses.is_dataclass(kind):
            section = page.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
            rows = re.findall(r"^\| `(\w+)` \| `.+` \| .+ \|$", section, re.MULTILINE)
            assert rows == [field.name for field in dataclasses.fields(kind)]


def test_every_card_is_linked(generated: dict[str, str]) -> None:
    for room in ("attacks", "defenses"):
        links = set(LINK.findall((ROOT / "docs" / f"{room}.md").read_text()))
        cards = {f"generated/{name}" for name in generated if name.startswith(f"{room}/")}
        assert cards <= links


@pytest.mark.parametrize(
    ("docstring", "section", "text"),
    [
        ("One.\n\n    Source: A,\n    B.\n\n    More.\n", "Source", "A,\nB."),
        ("One.\n\n    Source: A.\n\n    More.\n", "", "One.\n\nMore."),
        ("One.\n\n    Args:\n        a: B\n            c.\n\n        d: E.\n", "Args",
         "a: B\n    c.\n\nd: E."),
        ("One.", "", "One."),
    ],
)  # fmt: skip
def test_sections_of_docstrings(docstring: str, section: str, text: str) -> None:
    assert generator().sections(docstring)[section] == text


def test_entries_of_a_section() -> None:
    assert generator().entries("a: B\n    c.\nd: E.") == {"a": "B c.", "d": "E."}


@pytest.mark.parametrize(
    ("document", "words"), all_commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v)
)
def test_commands_are_understood(document: str, words: list[str]) -> None:
    """Those that need hours, data or a cluster cannot run here; their parsers know them."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words not in WITHOUT_PARSER:
        parser, arguments = parser_and_arguments(words)
        parser.parse_args(arguments)


def test_keys_of_the_checkpoint_are_described(tmp_path: Path) -> None:
    target, truth = make_target(ModelSpec("mlp", 3, 8), 1)
    save_target(tmp_path / "1", target, truth)
    save_target(tmp_path / "2", dataclasses.replace(target, loss=MeanSquaredError()), truth)
    base = dataclasses.replace(target, batch_size=2, shards=(2,), clients=(0, 1))
    save_target(tmp_path / "sum", base)
    files = ("1", "2", "sum")
    written = {key for name in files for key in torch.load(tmp_path / name, weights_only=False)}
    page = (ROOT / "docs" / "file-format.md").read_text()
    section = page.partition("## The keys")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (\**`.*?) \|", section, re.MULTILINE)
    described = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert described == written
    # Those in bold are the ones that a reader needs.
    needed = {name for cell in first_cells for name in re.findall(r"\*\*`(\w+)`\*\*", cell)}
    for name in written:
        content = torch.load(tmp_path / "1", weights_only=False)
        content.pop(name, None)
        torch.save(content, tmp_path / "3")
        if name in needed:
            with pytest.raises(InputError, match=f"no {name}"):
                load_target(tmp_path / "3")
        else:
            load_target(tmp_path / "3")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs needs the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    text = (tmp_path / "index.html").read_text()
    picture = re.search(r'src="([^"]+reconstructions-pure\.png)"', text)
    assert picture is not None
    assert (tmp_path / picture[1]).is_file()
    for page in tmp_path.rglob("*.html"):
        if "repository" not in page.parts:
            assert not re.search(r'(?:src|stylesheet" href)="https?://', page.read_text()), page


def rows_of(page: str) -> set[str]:
    """The rows of a page's tables."""
    return {line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")}


@pytest.mark.parametrize(
    ("page", "record", "rows"),
    [
        ("docs/defenses.md", "schemes/schemes.md", 15),
        ("docs/how-strong.md", "equal_time/summary.md", 22),
    ],
)
def test_tables_are_those_of_the_results(page: str, record: str, rows: int) -> None:
    shared = rows_of(page) & rows_of(f"results/reference/{record}")
    # The ruler of a table is no number.
    assert len([row for row in shared if ":---" not in row and "---:" not in row]) >= rows


def test_restarts_are_those_of_the_results() -> None:
    written = rows_of("results/reference/restarts/restarts.md")
    kept = [[cell for n, cell in enumerate(row.split(" | ")) if n in (0, 1, 3, 5)]
            for row in written]  # fmt: skip
    shown = [row.split(" | ")[:4] for row in rows_of("docs/how-strong.md") if "±" in row]
    assert len(shown) == 6
    assert all(row in kept for row in shown)


def test_the_readmes_table_is_that_of_the_results() -> None:
    file = ROOT / "results" / "reference" / "schemes" / "schemes.json"
    result = json.loads(file.read_text())
    found = {(r["labels"]["scheme"], r["labels"]["model"]): r["values"] for r in result["rows"]}
    shown = [row.strip("| ").split(" | ") for row in rows_of("README.md") if "| scheme" not in row]
    names = ("DP-SGD, noise 1", "DP-SGD", "pure", "RA", "GH")
    numbers = [row for row in shown if len(row) == 4 and row[0].startswith(names)]
    assert len(numbers) == len(names)
    for label, *cells in numbers:
        name = next(name for name in names if label.startswith(name))
        initial, trained = found[name, "initial"], found[name, "trained"]
        values = (
            f"{trained['validation accuracy']['mean']:.1f}",
            f"{initial['psnr']['mean']:.2f}",
            f"{trained['psnr']['mean']:.2f}",
        )
        assert tuple(cells) == values


def test_the_readme_counts_right(generated: dict[str, str]) -> None:
    text = (ROOT / "README.md").read_text()
    for word, room in (("attacks", "attacks"), ("transformations", "defenses")):
        count = re.search(rf"\[(\d+) {word}", text)
        assert count is not None
        assert int(count[1]) == sum(name.startswith(f"{room}/") for name in generated)


def test_the_tutorial_says_how_often_an_audit_is_wrong() -> None:
    rows = json.loads((ROOT / "results" / "audit" / "audit_power.json").read_text())["rows"]

    def said(purpose: str) -> tuple[int, int]:
        runs = [leaks for r in rows if r["setting"]["purpose"] == purpose for leaks in r["leaks"]]
        return sum(runs), len(runs)

    (alarms, without), (found, planted) = said("no leak"), said("planted")
    text = " ".join((ROOT / "docs" / "audit-my-update.md").read_text().split())
    assert f"In {without} audits of updates that hold none" in text
    assert f"it says `leaks` in {alarms} (" in text
    assert f"it says so in {found} of {planted}." in text
    power = {
        (r["setting"]["batch"], r["setting"]["steps"]): f"{sum(r['leaks'])} of {len(r['leaks'])}"
        for r in rows if r["setting"]["purpose"] == "power"
    }  # fmt: skip
    for batch in {batch for batch, _ in power}:
        cells = [power[batch, steps] for steps in (1, 2, 4) if (batch, steps) in power]
        # Each with its interval behind it.
        row = r"\| ".join(rf"{cell} \([^|]*\) " for cell in cells)
        assert re.search(rf"\| {batch} \| {row}\|", text)


def test_the_readme_says_how_fast() -> None:
    record = json.loads((ROOT / "results" / "speed" / "iterations.json").read_text())
    gains = sorted(row["speedup_over_R1"] for row in record["rows"])
    assert f"{gains[0]:.1f} to {gains[-1]:.1f} times as fast" in (ROOT / "README.md").read_text()
