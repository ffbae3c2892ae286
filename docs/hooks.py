"""Lets the site show what the documents link to outside of `docs/`.

The same Markdown is read on a code host, where a link such as
`../results/reference/schemes/schemes.md` leads to the file, and in the site, where mkdocs
knows only what lies in `docs/`. These hooks take the linked files of the checkout into the
site, below `repository/`, and turn the links to them. Nothing is copied inside the checkout.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FOREIGN = "repository/"


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of `docs/` that a page links to, and what that links to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in linked(page, (ROOT / page).read_text(encoding="utf-8")):
            if target.startswith("docs/") or files.get_file_from_path(site_place(target)):
                continue
            place = str(ROOT / target)
            files.append(File.generated(config, site_place(target), abs_src_path=place))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page to where the files are in the site."""
    here = page.file.src_uri
    origin = repository_place(here)

    def turned(link: re.Match[str]) -> str:
        target = resolved(origin, link[2])
        if target is None:
            return link[0]
        there = posixpath.relpath(site_place(target), posixpath.dirname(here) or ".")
        return f"{link[1]}{there}{link[3]}"

    return LINK.sub(turned, markdown)


def linked(page: str, text: str) -> list[str]:
    """Files of the checkout that a page links to, as paths from its root."""
    found = (resolved(page, link[2]) for link in LINK.finditer(text))
    return [target for target in found if target is not None]


def resolved(page: str, link: str) -> str | None:
    """The path from the root of what a page links to; None if that is no file."""
    if "://" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return target if (ROOT / target).is_file() else None


def site_place(path: str) -> str:
    """Where a file of the checkout is in the site."""
    return path[len("docs/") :] if path.startswith("docs/") else FOREIGN + path


def repository_place(place: str) -> str:
    """Where a file of the site is in the checkout."""
    return place[len(FOREIGN) :] if place.startswith(FOREIGN) else f"docs/{place}"
