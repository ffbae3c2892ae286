"""What an audit leaves behind: numbers, no image."""

from __future__ import annotations

from pathlib import Path

from audit.record import AuditRecord
from audit.show.store import write_audit


def write_reports(record: AuditRecord, folder: Path, protocol: str | None = None) -> None:
    """Write `audit.json` into a folder.

    Args:
        record: The audit.
        folder: Where to; made if missing.
        protocol: Name of a protocol whose report is written, too.
    """
    write_audit(record, folder)
