"""What stands in a run's folder: whose it is, its log, its state, and whether it is finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attack.record import AttackRecord, LabelRecord, read_record
from core.escaping import PrintableFormatter, printable
from core.processes.distributed import broadcast_object
from core.reading import file_digest

if TYPE_CHECKING:
    from attack.attacks.base import Attack
    from attack.cli.report import Output
    from attack.cli.request import AttackRun

LOG = "log.txt"
INTERRUPTED = "interrupted"


@contextlib.contextmanager
def run_log(folder: Path | None) -> Iterator[None]:
    """Within the block, what the attack logs is written to `log.txt` as well.

    Args:
        folder: Of the run; None for no file.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    rooms = logging.getLogger("attack")
    level = rooms.level
    for shown in logging.getLogger().handlers:
        # Each iteration's losses are for the file.
        shown.setLevel(max(shown.level, logging.INFO))
    file = logging.FileHandler(folder / LOG, encoding="utf-8")
    file.setFormatter(PrintableFormatter("%(asctime)s %(name)s: %(message)s"))
    rooms.addHandler(file)
    rooms.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        rooms.setLevel(level)
        rooms.removeHandler(file)
        file.close()


def is_finished(output: Output) -> bool:
    """Whether the same run was finished before; one answer for all processes."""
    record = None
    if output.process.is_main:
        record = finished_record(output.run.folder, output.key)
    if record is not None:
        print(f"already done: {output.run.folder / 'record.json'}")
        print(printable("\n".join(record.tables)))
    return bool(broadcast_object(record is not None))


def state_file_of(folder: Path, key: str, rank: int | None = None) -> Path:
    """Where a run, or the share of a process in it, is saved."""
    return folder / (f"state-{key}.pt" if rank is None else f"state-{key}-share{rank}.pt")


def finished_record(folder: Path, key: str) -> AttackRecord | LabelRecord | None:
    """The record of the same run, if it was finished before."""
    path = folder / "record.json"
    if not path.exists():
        return None
    record = read_record(path)
    # What was interrupted has a record of the best so far, and is run on.
    done = record.key == key and record.status != INTERRUPTED
    return record if done else None


def run_key(run: AttackRun, attack: Attack) -> str:
    """Identifies a run: what decides its numbers."""
    measuring = run.measuring
    decisive = {
        "attack": attack.name,
        "config": attack.plain_settings(),
        "labels": run.knowledge.label_rule,
        "labels_only": run.labels_only,
        "threat": run.knowledge.to_record(),
        "seed": run.seed,
        "metric": [
            measuring.images,
            measuring.one_to_one,
            measuring.information,
            measuring.lpips_weights,
        ],
        "prior": None if run.prior is None else file_digest(run.prior),
        "checkpoint": file_digest(run.checkpoint),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
