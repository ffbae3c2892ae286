"""An entry that was measured by a protocol: one JSON file, checked before anybody believes it.

The file holds every image's numbers, so that intervals and ranks are computed from it anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.protocol import Protocol, Setting
from core.errors import InputError
from core.reading import read_json_object
from core.records import BROKEN, check_types
from core.storage import write_json

SCHEMA_VERSION = 2
METRICS = ("psnr", "ssim")
# Guesses that need no gradient: a flat image of the image's own mean colour, the mean of images
# that are no client's, and the nearest of those.
GUESSES = ("flat colour", "mean image", "best non-member")
# PSNR is capped where a reconstruction is exact; a negative one is further away than black from
# white. The SSIM of images that have nothing in common scatters around 0.
LIMITS = {"psnr": (-1.0, 200.0), "ssim": (-0.5, 1.0)}
# A longer text would be no name.
MAX_TEXT = 2000
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Leak:
    """What every image gave away in one setting; lists in the order of the protocol's images.

    Attributes:
        psnr: In dB, of the attack that came nearest.
        ssim: Of the attack that came nearest.
        identified: Whether a reconstruction was nearer to the image than to any other.
        labels: Whether the label was recovered.
        strongest: Name of the attack of that SSIM.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    identified: tuple[bool, ...]
    labels: tuple[bool, ...]
    strongest: tuple[str, ...]


@dataclass(frozen=True)
class BoardEntry:
    """A defense as it was measured.

    Attributes:
        schema: Version of the file's form.
        protocol: Name of the protocol.
        fingerprint: Of the protocol's values.
        defense: Its name on the leaderboard.
        apply: Words as `--defense` takes them; empty for none.
        description: The defense in one sentence.
        reference: Paper or address.
        plugin: Module that registers it; None for the project's own.
        sigma: Noise multiplier of DP-SGD; None without.
        threat: Name of the attacker.
        epsilon: Of the training under the defense; None where nothing is promised.
        accuracies: Of validation, in percent, of one training per seed.
        leaks: By the setting's name.
        guesses: By guess and metric, what it gets of every image.
        provenance: Versions and processor.
        seconds: Of one core, over all cells.
    """

    protocol: str
    fingerprint: str
    defense: str
    apply: str
    threat: str
    accuracies: tuple[float, ...]
    leaks: Mapping[str, Leak]
    guesses: Mapping[str, Mapping[str, tuple[float, ...]]]
    description: str = ""
    reference: str | None = None
    plugin: str | None = None
    sigma: float | None = None
    epsilon: float | None = None
    seconds: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write the entry's file, whole or not at all."""
        write_json(path, dataclasses.asdict(self))


def read_entry(path: Path) -> BoardEntry:
    """An entry from its file, checked for sense; `check_against` compares it with a protocol.

    Raises:
        InputError: Names the file and the field.
    """
    values = read_json_object(path, what="leaderboard entry")
    return entry_from(values, str(path))


def entry_from(values: Mapping[str, Any], name: str) -> BoardEntry:
    """An entry from plain values.

    Args:
        values: As `BoardEntry.write` writes them.
        name: Of the file, for messages.

    Raises:
        InputError: With the field that is missing, of another type, or impossible.
    """
    fields = {f.name for f in dataclasses.fields(BoardEntry)}
    unknown = sorted(values.keys() - fields)
    if unknown:
        raise InputError(f"{name}: unknown field {unknown[0]}")
    try:
        given = {key: value for key, value in values.items() if key in fields}
        leaks = {str(setting): Leak(**leak) for setting, leak in values["leaks"].items()}
        entry = BoardEntry(**{**given, "leaks": leaks})
        check_types(entry)
        for leak in leaks.values():
            check_types(leak)
        _check_sense(entry)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except BROKEN as error:
        raise InputError(f"{name}: is no leaderboard entry ({error})") from None
    return entry


def _check_sense(entry: BoardEntry) -> None:
    """Refuse what no measurement can give."""
    if entry.schema != SCHEMA_VERSION:
        raise InputError(f"schema {entry.schema} instead of {SCHEMA_VERSION}")
    for name in ("defense", "description", "reference", "apply", "plugin"):
        if len(getattr(entry, name) or "") > MAX_TEXT:
            raise InputError(f"{name} has more than {MAX_TEXT} characters")
    if not entry.defense.strip():
        raise InputError("defense is empty")
    for accuracy in entry.accuracies:
        if not 0 <= accuracy <= 100:
            raise InputError(f"accuracies: {accuracy} is not a percentage")
    if entry.epsilon is not None and not 0 <= entry.epsilon < math.inf:
        raise InputError(f"epsilon {entry.epsilon} is not a finite number from 0 on")
    for setting, leak in entry.leaks.items():
        for metric in METRICS:
            _check_values(f"leaks.{setting}.{metric}", getattr(leak, metric), metric)
    for guess, values in entry.guesses.items():
        for metric in METRICS:
            _check_values(f"guesses.{guess}.{metric}", values[metric], metric)


def _check_values(name: str, values: Sequence[float], metric: str) -> None:
    low, high = LIMITS[metric]
    for value in values:
        # Written so that NaN is refused as well.
        if not low <= value <= high + _ROUNDING:
            raise InputError(f"{name} has {value}: must lie between {low:g} and {high:g}")


def check_against(entry: BoardEntry, protocol: Protocol, name: str) -> None:
    """Refuse an entry that was not measured by the protocol that it names.

    Args:
        entry: Checked for sense already.
        protocol: The protocol of the entry's name.
        name: Of the file, for messages.

    Raises:
        InputError: With what differs.
    """
    if entry.fingerprint != protocol.fingerprint:
        raise InputError(
            f"{name}: was measured by other values than those of {protocol.name} "
            f"(fingerprint {entry.fingerprint:.20}, not {protocol.fingerprint})"
        )
    if entry.threat not in protocol.threats:
        raise InputError(f"{name}: {protocol.name} has no attacker {entry.threat!r:.60}")
    if len(entry.accuracies) != len(protocol.utility.seeds):
        raise InputError(f"{name}: accuracies of {len(entry.accuracies)} trainings")
    expected = [setting.name for setting in protocol.settings]
    for kind, found, wanted in (
        ("leaks", entry.leaks, expected),
        ("guesses", entry.guesses, GUESSES),
    ):
        if set(found) != set(wanted):
            other = sorted(set(found) ^ set(wanted))[0]
            raise InputError(f"{name}: {kind}: {other} is missing, or is none of the protocol's")
    for setting in protocol.settings:
        _check_images(entry.leaks[setting.name], setting, protocol, name)
    for guess in GUESSES:
        if any(len(entry.guesses[guess][metric]) != protocol.images for metric in METRICS):
            raise InputError(f"{name}: guesses.{guess}: not of {protocol.images} images")


def _check_images(leak: Leak, setting: Setting, protocol: Protocol, name: str) -> None:
    for part in dataclasses.fields(leak):
        found = len(getattr(leak, part.name))
        if found != protocol.images:
            raise InputError(
                f"{name}: leaks.{setting.name}.{part.name} is of {found} images, not "
                f"{protocol.images}"
            )
