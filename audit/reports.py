"""What an audit leaves behind: numbers, no image."""

from __future__ import annotations

from pathlib import Path

from audit.record import AuditRecord
from audit.show.html import to_html
from audit.show.ms6 import to_ms6
from audit.show.store import without_names, write_audit
from core.storage import write_text

HTML, MS6 = "audit.html", "ms6.md"


def write_reports(record: AuditRecord, folder: Path, protocol: str | None = None) -> None:
    """Write `audit.json` and `audit.html` into a folder.

    Args:
        record: The audit.
        folder: Where to; made if missing.
        protocol: Name of a protocol whose report is written, too: "ms6" writes `ms6.md`.

    Raises:
        InputError: The record holds what has no place in it; names the field.
    """
    shown = without_names(record)
    write_audit(shown, folder)
    write_text(folder / HTML, to_html(shown))
    if protocol is not None:
        write_text(folder / MS6, to_ms6(shown))
