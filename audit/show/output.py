"""Everything that is written of an audit, and nothing else: numbers in four forms."""

from __future__ import annotations

from pathlib import Path

from audit.record import AuditRecord
from audit.show import html, ms6
from audit.show.store import without_names, write_audit
from core.storage import write_text

HTML = "audit.html"


def write_outputs(record: AuditRecord, folder: Path, *, protocol: bool = False) -> list[Path]:
    """Write `audit.json` and `audit.html`, and the protocol's report where it is asked for.

    Args:
        record: The audit.
        folder: Where to; made if missing.
        protocol: Whether to write `ms6.md`.

    Returns:
        The files.

    Raises:
        InputError: The record holds what has no place in it; names the field.
    """
    shown = without_names(record)
    texts = {HTML: html.to_html(shown)} | ({ms6.FILE: ms6.to_ms6(shown)} if protocol else {})
    written = [write_audit(shown, folder)]
    for name, text in texts.items():
        write_text(folder / name, text)
        written.append(folder / name)
    return written
