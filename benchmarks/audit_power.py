"""How often an audit says "leaks": where nothing can leak, and where something does.

Writes `results/audit/audit_power.json`. A site has chest phantoms of two classes at 16 px, a small
convolutional network with GroupNorm as it was initialised, and one epoch of SGD, its images mixed;
48 phantoms are held out. In the runs without a leak, the update is of other phantoms of the same
classes than those that the audit is told are members. Phantoms are drawn from 400; parameters and
random numbers differ between runs. An interrupted command goes on where it was.

    python -m benchmarks.audit_power
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from audit.attacked import attack_update
from audit.data import SiteData, chosen
from audit.decision import Verdict
from audit.planning import plan_for
from audit.request import AuditRequest, AuditSettings, make_request
from core.data.specs import DataSpec
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.reading import CHECKSUM, read_json_object
from core.storage import write_record
from core.target import Truth

SIZE, WIDTH, RATE = 16, 8, 0.01
PHANTOMS, HELD_OUT = 400, 48
BATCHES, STEPS = (1, 2, 4, 8), (1, 2, 4)
NO_LEAK, PLANTED, POWER = "no leak", "planted", "power"


@dataclass(frozen=True)
class Setting:
    """What a run is.

    Attributes:
        purpose: "no leak", "planted" or "power".
        batch: Images per local step.
        steps: Local steps, each of other images.
    """

    purpose: str
    batch: int
    steps: int = 1

    @property
    def images(self) -> int:
        """Behind the update."""
        return self.batch * self.steps


def settings(runs: int, planted: int, power: int) -> Iterator[tuple[Setting, int]]:
    """Every setting, and how many runs there are of it."""
    for batch in BATCHES:
        yield Setting(NO_LEAK, batch), runs // len(BATCHES)
    yield Setting(PLANTED, 1), planted
    grid = [Setting(POWER, batch, steps) for batch in BATCHES for steps in STEPS]
    # The quickest first, for a command that is interrupted.
    yield from ((setting, power) for setting in sorted(grid, key=lambda each: each.images))


def network(seed: int) -> nn.Module:
    """The model that a site receives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.GroupNorm(2, WIDTH), nn.ReLU(),
            nn.Flatten(), nn.Linear(WIDTH * (SIZE // 2) ** 2, 32), nn.ReLU(), nn.Linear(32, 2),
        )  # fmt: skip


@functools.cache
def pool() -> Truth:
    """Chest phantoms of two classes in equal numbers."""
    from federated.phantoms.anatomy import chest_radiograph

    labels = np.arange(PHANTOMS) % 2
    pictures = [
        chest_radiograph(SIZE, bool(label), np.random.default_rng((11, number)))
        for number, label in enumerate(labels)
    ]
    return Truth(torch.from_numpy(np.stack(pictures))[:, None].float() / 255, torch.tensor(labels))


def trained(model: nn.Module, samples: Truth, batch: int) -> nn.Module:
    """The model after an epoch of SGD."""
    after = copy.deepcopy(model)
    optimiser = torch.optim.SGD(after.parameters(), lr=RATE)
    for images, labels in zip(
        samples.images.split(batch), samples.labels.split(batch), strict=True
    ):
        optimiser.zero_grad()
        nn.functional.cross_entropy(after(images), labels).backward()
        optimiser.step()
    return after


def request_of(setting: Setting, number: int, iterations: int, seed: int) -> AuditRequest:
    """The audit of one run."""
    drawn = (seed, setting.batch, setting.steps, setting.purpose == NO_LEAK, number)
    members, others, held_out = _drawn(setting.images, np.random.default_rng(drawn))
    model = network(number)
    behind = others if setting.purpose == NO_LEAK else members
    after = trained(model, behind, setting.batch)
    data = SiteData(members, held_out, DataSpec("phantoms", (1, SIZE, SIZE), (0.0,), (1.0,), 2))
    return make_request(
        model, after, model=model, data=data,
        local=f"sgd lr={RATE} batch-size={setting.batch}",
        settings=AuditSettings(iterations=iterations, seed=number),
    )  # fmt: skip


def _drawn(n: int, rng: np.random.Generator) -> tuple[Truth, Truth, Truth]:
    """Members, as many others of their classes, and as many held-out ones of each class."""
    images = pool()
    left = {c: rng.permutation(np.flatnonzero(images.labels == c)).tolist() for c in (0, 1)}
    classes = rng.permutation(np.arange(n) + rng.integers(2)) % 2
    members, others = ([left[c].pop() for c in classes] for _ in range(2))
    held_out = [left[c].pop() for c in (0, 1) for _ in range(HELD_OUT // 2)]
    return chosen(images, members), chosen(images, others), chosen(images, held_out)


def run(setting: Setting, number: int, iterations: int, seed: int) -> dict[str, float]:
    """One audit without plants: its p-value, and the similarity of the best match."""
    request = request_of(setting, number, iterations, seed)
    found = attack_update(request, plan_for(request))
    decision = found.decided(request, ())
    assert decision is not None
    best = float(np.array(found.similarity)[:, request.is_member].max())
    return {"p": decision.p_value, "leaks": decision.verdict is Verdict.LEAKS, "ncc": best}


def table(record: Mapping[str, Any]) -> list[str]:
    """How often a leak is found by batch size and local steps, with exact 95 % intervals."""
    from scipy.stats import binomtest

    cells = {}
    for row in record["rows"]:
        found = Setting(**row["setting"])
        if found.purpose == POWER and row["leaks"]:
            leaks, of = sum(row["leaks"]), len(row["leaks"])
            low, high = binomtest(leaks, of).proportion_ci()
            cells[found.batch, found.steps] = f"{leaks} of {of} ({low:.0%} to {high:.0%})"
    steps = [f"{n} step{'s' if n > 1 else ''}" for n in STEPS]
    rows = [
        [str(batch), *(cells.get((batch, n), "not run") for n in STEPS)] for batch in BATCHES
    ]  # fmt: skip
    lines = [["batch size", *steps], ["---"] * (1 + len(STEPS)), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.audit_power",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=200, help="without a leak, in all")
    parser.add_argument("--planted", type=int, default=20, help="batch 1, one step")
    parser.add_argument("--power", type=int, default=20, help="per batch size and steps")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/audit", metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the record after every run."""
    args = build_parser().parse_args(argv)
    path = Path(args.output) / "audit_power.json"
    record = _record(path, args.iterations, args.seed)
    for setting, count in settings(args.runs, args.planted, args.power):
        row = _row(record, setting)
        while len(row["p"]) < count:
            found = run(setting, len(row["p"]), args.iterations, args.seed)
            for key, value in found.items():
                row[key].append(value if key == "leaks" else round(value, 4))
            write_record(path, record)
        print(f"{setting}: leaks in {sum(row['leaks'][:count])} of {count}", flush=True)
    print("\n".join(table(record)))


def _record(path: Path, iterations: int, seed: int) -> dict[str, Any]:
    """What an interrupted command wrote, if it was the same; else an empty record."""
    head = {
        "command": "python -m benchmarks.audit_power",
        "level": 0.05,
        "iterations": iterations,
        "seed": seed,
    }
    if path.exists():
        found = read_json_object(path)
        if not all(map(_is_row, found.get("rows") or ())):
            raise InputError(f"{path}: a row is not the runs of a setting")
        if {key: found.get(key) for key in head} == head:
            return {key: value for key, value in found.items() if key != CHECKSUM}
    return {**head, "rows": []}


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or "setting" not in row:
        return False
    return all(isinstance(row.get(key), list) for key in ("p", "leaks", "ncc"))


def _row(record: dict[str, Any], setting: Setting) -> dict[str, list[Any]]:
    """The runs of a setting."""
    plain = dataclasses.asdict(setting)
    for row in record["rows"]:
        if row["setting"] == plain:
            found: dict[str, list[Any]] = row
            return found
    record["rows"].append({"setting": plain, "p": [], "leaks": [], "ncc": []})
    return _row(record, setting)


if __name__ == "__main__":
    sys.exit(exit_status(main))
