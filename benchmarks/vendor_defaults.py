"""What the privacy classes of NVFlare, Flower and Opacus leave of a client's image.

Writes `results/vendor_defaults/vendor_defaults.json` after every row, and continues one that is
there. The frameworks' own classes (`federated.vendors`) work on the update of an untrained
network for one photograph, after one and after several local steps; labels are known to the
attacker, who does not know the class in front of the update, or is told of it. Accuracy is that
of four clients after 20 rounds (`benchmarks.utility`). Flower needs an environment of its own
beside older frameworks (`.venv-flower`); rows whose framework is not installed are said and left
for another run.

    python -m benchmarks vendor_defaults
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prettytable import PrettyTable, TableStyle

import gradinvbench as gib
from benchmarks.declare.measured_utility import Entry, Row, summary
from benchmarks.show.statistics import bootstrap_interval
from benchmarks.utility import Protocol, measure
from core.data.data_sets import DataSets, load_data, take_samples
from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.models.building import ModelSpec
from core.reading import read_json_object
from core.storage import write_record, write_text
from federated.vendors import LocalDp, SparseVector
from gradients.defenses import ClientView, parse_defenses
from training.client_shards import ClientBatches, split_images
from training.settings import Federation

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "vendor_defaults"
RECORD = "vendor_defaults.json"
DELTA = 1e-5
# Local steps of the client that is attacked.
STEPS = (1, 4)
UTILITY = Protocol(rounds=20, local_steps=8)
# Distribution, by the first part of a defense's name.
PACKAGES = {"nvflare": "nvflare", "flower": "flwr", "opacus": "opacus"}


@dataclass(frozen=True)
class Case:
    """One class of a framework in one setting.

    Attributes:
        defense: Words as `--defense` takes them; empty for none.
        setting: Where its values are from.
        target_epsilon: That Opacus' noise is made for, over the rounds of `UTILITY`; None: no
            DP-SGD.
        norm: Normalisation layers of the network.
    """

    defense: str = ""
    setting: str = ""
    target_epsilon: float | None = None
    norm: str = "batch"

    @property
    def name(self) -> str:
        """For people."""
        if self.target_epsilon is not None:
            return f"Opacus, ε = {self.target_epsilon:g}"
        name = self.defense or "none"
        return name if self.norm == "batch" else f"{name} (GroupNorm)"

    @property
    def missing(self) -> str | None:
        """The package that is not installed here."""
        package = "opacus" if self.target_epsilon else PACKAGES.get(self.defense.split("-")[0])
        if package is None or importlib.util.find_spec(package) is not None:
            return None
        return package


CASES = (
    Case(),
    Case("nvflare-percentile:10:0.01", "defaults, as in production jobs"),
    Case("nvflare-percentile:95:0.01", "percentile 95"),
    Case("nvflare-svt", "defaults"),
    Case("nvflare-exclude:bn", "normalisation layers stay"),
    Case("nvflare-exclude:fc", "the last layer stays"),
    Case("flower-local-dp:1:1:1:1e-05", "no defaults; sensitivity and norm 1"),
    Case("flower-local-dp:1:0.00011:10:0.0001", "noise of 4.8e-5, as an app of FLIP has it"),
    Case("flower-fixed-clipping:10", "its example fl-dp-sa"),
    Case("flower-adaptive-clipping:0.1", "initial norm"),
    Case(norm="group"),
    Case(setting="20 rounds, delta 1e-5", target_epsilon=8.0, norm="group"),
    Case(setting="20 rounds, delta 1e-5", target_epsilon=3.0, norm="group"),
    Case(setting="20 rounds, delta 1e-5", target_epsilon=1.0, norm="group"),
)


@dataclass
class Result:
    """What a case gave away and what it cost.

    Attributes:
        case: See `Case`.
        defense: Words of the defense that was attacked.
        unaware: PSNR in dB of every image, by local steps as a word.
        told: Likewise, for an attacker who is told.
        flat: PSNR in dB of the best flat colour for every image.
        notes: What the told attacker did, by local steps.
        accuracy: Of every seed, in percent.
        epsilon: Of 20 rounds by the class' own accountant or statement; None: nothing is said.
        real_epsilon: Of 20 rounds for all that a client holds, by the exact formula, where the
            mechanism allows one; of Opacus for one image by its accountant.
        delta: Of both.
    """

    case: Case
    defense: str
    unaware: dict[str, list[float]] = field(default_factory=dict)
    told: dict[str, list[float]] = field(default_factory=dict)
    flat: list[float] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    accuracy: list[float] = field(default_factory=list)
    epsilon: float | None = None
    real_epsilon: float | None = None
    delta: float = DELTA


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        images: That are attacked.
        attack: Its name.
        iterations: Of it.
        seeds: Trainings of every case.
        width: Of the network's first stage.
        protocol: Of the trainings.
    """

    images: int = 16
    attack: str = "spectral"
    iterations: int = 150
    seeds: int = 3
    width: int = 8
    protocol: Protocol = UTILITY


def noise_multiplier(epsilon: float, protocol: Protocol, n: int) -> float:
    """Opacus' own answer to how much noise an epsilon takes.

    Args:
        epsilon: For one image, after all rounds.
        protocol: Of the training.
        n: Training images.
    """
    from opacus.accountants.utils import get_noise_multiplier

    federation = Federation(protocol.clients, protocol.local_steps)
    shards = split_images(n, federation, [], 0)
    rate = ClientBatches(shards, protocol.batch, federation, [], 0, poisson=True).rate
    steps = protocol.rounds * protocol.local_steps
    return float(
        get_noise_multiplier(
            target_epsilon=epsilon, target_delta=DELTA, sample_rate=rate, steps=steps
        )
    )


def leak(result: Result, data: DataSets, steps: int, plan: Plan) -> None:
    """Attack every image of a case after so many local steps, unaware and told."""
    word = str(steps)
    unaware, told = [], []
    for number in range(plan.images):
        image = number * (len(data.train_plain) // plan.images)
        found = _attacked(result, data, image, steps, False, plan)
        unaware.append(found[0])
        if steps == STEPS[0]:
            result.flat.append(found[1])
        if result.defense:
            psnr, _, notes = _attacked(result, data, image, steps, True, plan)
            told.append(psnr)
            result.notes[word] = notes
    result.unaware[word] = unaware
    result.told[word] = told or unaware


def _attacked(
    result: Result, data: DataSets, image: int, steps: int, told: bool, plan: Plan
) -> tuple[float, float, list[str]]:
    """PSNR of the reconstruction and of a flat colour, and what a told attacker did."""
    inputs, labels = take_samples(data.train_plain, [image], data.spec)
    spec = ModelSpec(
        "cnn", data.spec.n_classes, data.spec.shape[1], width=plan.width, norm=result.case.norm
    )
    target, truth = gib.share(
        spec,
        inputs,
        labels,
        defense=result.defense,
        local=f"sgd lr=0.1 epochs={steps}",
        train_mode=True,
        mean=data.spec.mean,
        std=data.spec.std,
        seed=image,
    )
    found = gib.invert(
        target,
        attack=plan.attack,
        labels=labels,
        iterations=plan.iterations,
        adaptive=told,
        seed=image,
        progress=False,
    )
    measured = gib.evaluate(found, truth)
    psnr = measured.summary()["psnr"]["mean"]
    flat = measured.baselines["flat colour"]["psnr"]["mean"]
    assert psnr is not None
    assert flat is not None
    notes = found.details.get("adaptations", [])
    return psnr, flat, list(notes)


def train(result: Result, plan: Plan) -> None:
    """The accuracies of a case, and what it says of its privacy."""
    case = result.case
    sigma = None if case.target_epsilon is None else parse_defenses(result.defense)[0]
    entry = Entry(
        "" if sigma is not None else result.defense,
        sigma=None if sigma is None else sigma.noise_multiplier,  # type: ignore[attr-defined]
        norm=case.norm,
    )
    row = Row(entry)
    for row in measure(Row(entry), range(plan.seeds), plan.protocol):
        result.accuracy = list(row.accuracy)
    result.real_epsilon, result.delta = row.epsilon, row.delta
    result.epsilon = _stated(result, plan)


def _stated(result: Result, plan: Plan) -> float | None:
    """The epsilon of all rounds as the class itself states or accounts it."""
    defenses = parse_defenses(result.defense)
    if result.case.target_epsilon is not None:
        return result.real_epsilon
    if defenses and isinstance(defenses[0], SparseVector):
        return plan.protocol.rounds * _spent_by_svt(defenses[0], plan)
    if defenses and isinstance(defenses[0], LocalDp):
        return plan.protocol.rounds * defenses[0].target_epsilon
    return None


def _spent_by_svt(defense: SparseVector, plan: Plan) -> float:
    """In one round, by the filter's own accountant; it depends on the parameters' number."""
    model = ModelSpec("cnn", 10, 32, width=plan.width).build()
    update = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    none = torch.empty(0)
    return defense.accounted(update, ClientView(model, none, none, torch.Generator()))


def compute(cases: Sequence[Case], folder: Path, plan: Plan) -> list[Result]:
    """Measure the cases that a record lacks, write it after each part, and the table.

    Args:
        cases: What is measured.
        folder: Of the record and the table.
        plan: How much.

    Raises:
        InputError: The folder holds a record of another plan, of which nothing can be kept.
    """
    results = _results_so_far(folder / RECORD, plan)
    data = load_data(plan.protocol.data)
    wanted = []
    for case in cases:
        if case.missing is None:
            wanted.append(_result_of(case, results, plan, len(data.train)))
        else:
            print(
                f"{case.name}: left out, {case.missing} is not installed in this environment; run "
                "the command again where it is",
                flush=True,
            )
    for done in _parts(wanted, data, plan):
        _write(results, folder, plan)
        print(done, flush=True)
    order = {case: number for number, case in enumerate(CASES)}
    results.sort(key=lambda result: order.get(result.case, len(order)))
    if results:
        write_text(folder / "vendor_defaults.md", to_markdown(results, plan))
    return results


def _result_of(case: Case, results: list[Result], plan: Plan, n: int) -> Result:
    """The case's result so far, which `results` holds."""
    for result in results:
        if result.case == case:
            return result
    defense = case.defense
    if case.target_epsilon is not None:
        defense = f"opacus:{noise_multiplier(case.target_epsilon, plan.protocol, n):.5g}:1"
    results.append(Result(case, defense))
    return results[-1]


def _parts(results: Sequence[Result], data: DataSets, plan: Plan) -> Iterator[str]:
    """Compute what results lack, one part of all before the next; says each that is done."""
    first, *longer = STEPS
    yield from _leaks(results, data, first, plan)
    # Soon done, beside attacks on several steps.
    for result in results:
        if not result.accuracy:
            train(result, plan)
            yield f"{result.case.name}: accuracy"
    for steps in longer:
        yield from _leaks(results, data, steps, plan)


def _leaks(results: Sequence[Result], data: DataSets, steps: int, plan: Plan) -> Iterator[str]:
    for result in results:
        if str(steps) not in result.unaware:
            leak(result, data, steps, plan)
            yield f"{result.case.name}: {steps} local step(s)"


def _results_so_far(path: Path, plan: Plan) -> list[Result]:
    if not path.exists():
        return []
    record = read_json_object(path, what="record of vendor_defaults")
    before, now = record.get("plan"), asdict(plan)
    results = [_result(values) for values in record["rows"]]
    if before == now:
        return results
    trained = ("protocol", "seeds", "width")
    if not isinstance(before, dict) or any(before.get(key) != now[key] for key in trained):
        raise InputError(f"{path} was measured under another plan; give another --output")
    # Under another attack trainings are what they were.
    return [replace(result, unaware={}, told={}, flat=[], notes={}) for result in results]


def _result(values: Mapping[str, Any]) -> Result:
    return Result(**{**values, "case": Case(**values["case"])})


def _write(results: Sequence[Result], folder: Path, plan: Plan) -> None:
    write_record(
        folder / RECORD,
        {
            "command": "python -m benchmarks vendor_defaults",
            "plan": asdict(plan),
            "rows": [asdict(result) for result in results],
        },
    )


def to_markdown(results: Sequence[Result], plan: Plan) -> str:
    """The table: PSNR with intervals, accuracy and epsilon of every case."""
    steps = [str(step) for step in STEPS]
    header = ["class", "values"]
    header += [f"PSNR, {s} step(s), {who}" for s in steps for who in ("unaware", "told")]
    table = PrettyTable([*header, "accuracy %", "ε stated", "ε real"])
    table.set_style(TableStyle.MARKDOWN)
    table.align = "l"
    for result in results:
        leaks = [by.get(s, []) for s in steps for by in (result.unaware, result.told)]
        table.add_row(
            [
                result.case.name,
                result.case.setting,
                *map(_interval, leaks),
                _accuracy(result),
                # Training tells what is spent: before it there is nothing to say.
                *(
                    (_budget(e) for e in (result.epsilon, result.real_epsilon))
                    if result.accuracy
                    else "––"
                ),
            ]
        )
    flat = [value for result in results[:1] for value in result.flat]
    caption = (
        f"{plan.images} photographs, one at a time, by `{plan.attack}`; mean PSNR in dB with its "
        "95 % interval by bootstrap over images. The best flat colour has "
        f"{_interval(flat)}. Accuracy after {plan.protocol.rounds} rounds of "
        f"{plan.protocol.local_steps} local steps of {plan.protocol.clients} clients, "
        f"mean over {plan.seeds} seeds with its 95 % interval. "
        f"ε at δ = {DELTA:g} for these rounds: as the class states it, and as it is for all that a "
        "client holds (of Opacus for one image, by its accountant)."
    )
    return f"{caption}\n\n{table}\n"


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "–"
    low, high = bootstrap_interval(np.asarray(values))
    return f"{np.mean(values):.1f} ({low:.1f} to {high:.1f})"


def _accuracy(result: Result) -> str:
    if not result.accuracy:
        return "–"
    found = summary(Row(Entry(), accuracy=result.accuracy))
    if found.n == 1:
        return f"{found.mean:.1f} (one seed)"
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})"


def _budget(epsilon: float | None) -> str:
    if epsilon is None:
        return "none"
    return "∞" if math.isinf(epsilon) else f"{epsilon:,.3g}" if epsilon < 1e4 else f"{epsilon:,.0f}"


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks vendor_defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="NAME", help="cases whose defense begins so")
    parser.add_argument("--images", type=int, default=Plan.images)
    parser.add_argument("--iterations", type=int, default=Plan.iterations)
    parser.add_argument("--seeds", type=int, default=Plan.seeds)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the record and print the table."""
    args = build_parser().parse_args(argv)
    for flag in ("images", "iterations", "seeds"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} must be at least 1")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("training").setLevel(logging.WARNING)
    plan = Plan(images=args.images, iterations=args.iterations, seeds=args.seeds)
    only = args.only or ""
    cases = [case for case in CASES if case.name.lower().startswith(only.lower())]
    if not cases:
        raise InputError(f"--only {only}: no case begins so")
    print(to_markdown(compute(cases, args.output, plan), plan))


if __name__ == "__main__":
    sys.exit(exit_status(main))
