"""What the documents link to is there, in a fresh clone too."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tracked() -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = set(listing.stdout.split("\n"))
    return files | {str(parent) for file in files for parent in Path(file).parents}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_of_the_repository(document: Path) -> None:
    files = tracked()
    links = [link.partition("#")[0] for link in LINK.findall(document.read_text())]
    local = [link for link in links if link and "://" not in link]
    broken = [
        link
        for link in local
        if str((document.parent / link).resolve().relative_to(ROOT)) not in files
    ]
    assert not broken


def test_headings_that_are_linked_exist() -> None:
    text = (ROOT / "README.md").read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
