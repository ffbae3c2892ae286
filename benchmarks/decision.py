"""Compare the statistics that may decide whether reconstructions leak, on real images.

Writes `results/decision/decision.json`. Similarity is normalised cross-correlation at 32 px.
Images are blocks of ten photographs and chest phantoms of two classes. A trial draws members,
non-members and as many others of the same classes. Reconstructions of no leak are others, which
are in neither set; a leaking one is quality x its member + (1 - quality) x another image.
Membership is permuted within classes, as the reconstructions know them.

The weights are an attack's objective as it may be: what they say of a leak is as large as their
spread without one.

    python -m benchmarks.decision
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from audit.membership_statistics import STATISTICS
from audit.permutations import permutation_p_value
from core.errors import exit_status
from core.launch_arguments import CommandParser
from core.storage import write_record

ALPHA = 0.05
SIZE = 32
PHANTOMS = 360
SETS = ("photos", "phantoms")


@dataclass(frozen=True)
class Setting:
    """What a trial is.

    Attributes:
        images: "photos" or "phantoms".
        members: How many, each with a reconstruction.
        non_members: How many.
        leaking: How many of the members' reconstructions show them.
        quality: The member's share of such a reconstruction.
    """

    images: str
    members: int
    non_members: int
    leaking: int = 0
    quality: float = 0.0


@dataclass(frozen=True)
class Row:
    """How often each statistic says "leaks" in a setting.

    Attributes:
        setting: See `Setting`.
        trials: How many.
        found: Trials with a p-value of at most 5 %, by statistic.
    """

    setting: Setting
    trials: int
    found: dict[str, int]


def settings() -> Iterator[tuple[Setting, str]]:
    """Every setting, and what it is for."""
    for images in SETS:
        for members, non_members in ((1, 19), (4, 40), (8, 40), (8, 160)):
            yield Setting(images, members, non_members), "false alarms"
        yield Setting(images, 1, 19, 1, 0.6), "one planted image"
        for quality in (0.1, 0.2, 0.3, 0.4, 0.6):
            yield Setting(images, 8, 40, 8, quality), "quality"
        for leaking in (1, 2, 4):
            yield Setting(images, 8, 40, leaking, 0.7), "leaking images"
        for non_members in (16, 80, 160):
            yield Setting(images, 8, non_members, 2, 0.7), "non-members"
        for members in (2, 4, 16, 32):
            yield Setting(images, members, 96, 2, 0.7), "members"


@functools.cache
def pool(images: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N x values, each standardised) and their classes."""
    values, labels = _photos() if images == "photos" else _phantoms()
    flat = values.reshape(len(values), -1).astype(np.float64)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True), labels


def _photos() -> tuple[np.ndarray, np.ndarray]:
    from core.data.embedded import photo_patches

    found = photo_patches("photo-patches")
    sides = np.array([patch.side for patch in found.patches])
    # Whole blocks contain their quarters.
    kept = sides == sides.min()
    return found.images[kept], found.labels[kept]


def _phantoms() -> tuple[np.ndarray, np.ndarray]:
    from federated.phantoms.anatomy import chest_radiograph

    labels = np.arange(PHANTOMS) % 2
    pictures = [
        chest_radiograph(SIZE, bool(label), np.random.default_rng((7, number)))
        for number, label in enumerate(labels)
    ]
    return np.stack(pictures), labels


@dataclass(frozen=True)
class Trial:
    """Similarities (reconstructions x images), members and classes per image, weights."""

    similarity: np.ndarray
    members: np.ndarray
    classes: np.ndarray
    weights: np.ndarray


def trial(
    images: np.ndarray, labels: np.ndarray, setting: Setting, rng: np.random.Generator
) -> Trial:
    """Draw one trial; weights are what an attack's objective may say, near the quality."""
    m = setting.members
    chosen, shown = _drawn(labels, setting, rng)
    found = images[shown].copy()
    leaking = np.arange(m) < setting.leaking
    mixed = setting.quality * images[chosen[:m]] + (1 - setting.quality) * images[shown]
    found[leaking] = mixed[leaking]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    # Uninformed weights differ by as much as the best leak adds to them.
    weights = rng.uniform(0.4, 1.0, m) + 0.6 * setting.quality * leaking
    members = np.arange(len(chosen)) < m
    return Trial(found @ images[chosen].T, members, labels[chosen], weights / weights.max())


def _drawn(
    labels: np.ndarray, setting: Setting, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Members first, then non-members, as many per member of its class; and others, likewise."""
    each = setting.non_members // setting.members
    left = {c: list(rng.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)}
    members, non_members, others = [], [], []
    for _ in range(setting.members):
        enough = [c for c, places in left.items() if len(places) >= each + 2]
        places = left[rng.choice(enough)]
        members.append(places.pop())
        others.append(places.pop())
        non_members += [places.pop() for _ in range(each)]
    return np.array([*members, *non_members]), np.array(others)


def measure(setting: Setting, trials: int, permutations: int, seed: int) -> Row:
    """Run the trials of one setting."""
    images, labels = pool(setting.images)
    found = dict.fromkeys(STATISTICS, 0)
    for number in range(trials):
        drawn = trial(images, labels, setting, np.random.default_rng((seed, number)))
        for name, statistic in STATISTICS.items():
            function = statistic.of(drawn.similarity, drawn.weights)
            p, _ = permutation_p_value(function, drawn.members, drawn.classes, permutations, number)
            found[name] += p <= ALPHA
    return Row(setting, trials, found)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.decision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=int, default=500, help="per setting without a leak")
    parser.add_argument("--leaks", type=int, default=100, help="trials per setting with a leak")
    parser.add_argument("--permutations", type=int, default=399)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/decision", metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every setting and write the record."""
    args = build_parser().parse_args(argv)
    rows = []
    for setting, purpose in settings():
        trials = args.leaks if setting.leaking else args.trials
        row = measure(setting, trials, args.permutations, args.seed)
        rows.append({"purpose": purpose, **asdict(row)})
        print(f"{purpose}: {setting}: {row.found} of {trials}", flush=True)
    write_record(
        Path(args.output) / "decision.json",
        {
            "command": "python -m benchmarks.decision",
            "level": ALPHA,
            "permutations": args.permutations,
            "seed": args.seed,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
