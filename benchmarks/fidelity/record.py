"""The record of all rows: one entry for every trial of every implementation."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.locks import LOCK_NAME, locked
from core.records import check_types, check_version, read_record
from core.storage import write_record

FILE = "fidelity.json"
VERSION = 1
OURS = "ours"
COMMAND = "python -m benchmarks fidelity"


@dataclass(frozen=True)
class Entry:
    """One trial of one implementation.

    Attributes:
        row: Its name.
        trial: Its number: of the images, of the initial parameters and of the start.
        implementation: "ours", or another package with its version.
        samples: What was attacked: a kind of images, or what stands in for it.
        setting: A hash of what the row declares; another one makes the entry stale.
        value: In the published value's unit.
        details: What else was measured.
        seconds: Processor time, of a machine that may have been busy.
        device: What computed it.
        date: The day.
    """

    row: str
    trial: int
    implementation: str
    samples: str
    setting: str
    value: float
    details: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    device: str = "cpu"
    date: str = ""

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What there is one entry of, whatever the version of the other package."""
        return self.row, self.samples, self.trial, self.implementation.split()[0]


class Record:
    """What was measured.

    Args:
        path: The file that keeps it.
        entries: Of it.
        provenance: Of the run that wrote it last.
    """

    def __init__(
        self, path: Path, entries: Sequence[Entry] = (), provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.entries = {entry.key: entry for entry in entries}
        self.provenance = dict(provenance or {})

    @staticmethod
    def read(folder: Path) -> Record:
        """The record in a folder; an empty one where there is none.

        Raises:
            InputError: It is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return Record(path)

        def parse(values: Mapping[str, Any]) -> Record:
            check_version(values, VERSION, "the comparison")
            entries = [Entry(**entry) for entry in values["entries"]]
            for entry in entries:
                check_types(entry)
            return Record(path, entries, values.get("provenance"))

        return read_record(path, "the comparison with published values", parse)

    def find(self, row: str, samples: str, trial: int, implementation: str) -> Entry | None:
        """An entry, if it was computed."""
        return self.entries.get((row, samples, trial, implementation.split()[0]))

    def of(self, row: str, kind: str, implementation: str = OURS) -> list[Entry]:
        """All trials of a row, by number: on the samples that it asks for, or what stands in.

        Args:
            row: Its name.
            kind: Of the samples that it asks for.
            implementation: Whose.
        """
        name = implementation.split()[0]
        mine = [e for e in self.entries.values() if e.row == row and e.key[3] == name]
        asked = [entry for entry in mine if entry.samples == kind]
        return sorted(asked or mine, key=lambda entry: entry.trial)

    def others(self, row: str) -> list[str]:
        """Implementations beside ours that ran a row, with their versions."""
        names = {e.implementation for e in self.entries.values() if e.row == row}
        return sorted(names - {OURS})

    def keep(self, entry: Entry, provenance: Mapping[str, Any]) -> None:
        """Put an entry into the file, beside what another run may have put there meanwhile.

        Args:
            entry: It takes the place of a former one.
            provenance: Versions of this run.
        """
        with locked(self.path.with_name(LOCK_NAME), "--output", wait=60):
            self.entries |= Record.read(self.path.parent).entries
            self.entries[entry.key] = entry
            self._write(provenance)

    def _write(self, provenance: Mapping[str, Any]) -> None:
        entries = [dataclasses.asdict(self.entries[key]) for key in sorted(self.entries)]
        values = {
            "schema_version": VERSION,
            "command": COMMAND,
            "provenance": dict(provenance),
            "entries": entries,
        }
        write_record(self.path, values)


def today() -> str:
    """The day, as entries state it."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
