"""One row of the tables `tabular` and `tabular_defenses`: batches of records, shared and inverted.

All batches of a row are computed in one process, since an attack on a small network takes a
second and the start of a process several. Every batch has an untrained network of its own, or
all have the one that stage 1 trained on the same records.

    python -m benchmarks.tabular --data fair --attack tableak -b 32 --results results/row
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attack.attacks.optimisation import make_attack
from attack.knowledge.labels import recover_most_exactly
from attack.knowledge.requirements import Knowledge
from attack.metrics import evaluate
from attack.metrics.records import comparison, confidence_bins
from attack.recovered import SHOWN, recovered_records
from core.data.records import Table, load_table
from core.errors import InputError, exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser
from core.models.architecture import GivenModel
from core.processes.distributed import Process
from core.records import provenance
from core.storage import write_record
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.defenses import parse_defenses
from gradients.private_gradient import PrivacySettings
from gradients.received_model import build_received_model, read_pretrained
from gradients.servers.trap import set_traps

METRICS = ("record_accuracy", "record_exact")


@dataclass(frozen=True)
class Row:
    """What a row is, by the names of the flags.

    Attributes:
        data: A table's name, or a CSV file.
        attack: Its registered name.
        batch_size: Records of the client.
        batches: How many.
        width: Neurons of both hidden layers; None: 100, or as trained.
        pretrained: Checkpoint of stage 1; None: untrained networks.
        traps: Records per trap of a malicious server; None: an honest one.
        defense: Words of defenses.
        sigma: DP-SGD's noise multiplier; None: no DP-SGD.
        local: Words of the local training; empty: one step.
        iterations: Of the attack; None: as published.
        restarts: Likewise.
        time_budget: Likewise, in seconds.
        seed: Of the first batch.
    """

    data: str
    attack: str
    batch_size: int
    batches: int
    width: int | None
    pretrained: Path | None
    traps: int | None
    defense: str
    sigma: float | None
    local: str
    iterations: int | None
    restarts: int | None
    time_budget: float | None
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the attack is told beside its published setting."""
        told = {n: getattr(self, n) for n in ("iterations", "restarts", "time_budget")}
        # There are no neighbours whose variation could be penalised.
        plain = {"tv": 0.0} if self.attack == "inverting-gradients" else {}
        return {name: value for name, value in told.items() if value is not None} | plain


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.tabular",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="fair", help="a table's name, or a CSV file")
    parser.add_argument("--attack", default="tableak")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="records of the client")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument(
        "--width", type=int, help="neurons of both hidden layers; default: 100, or as trained"
    )
    parser.add_argument(
        "--pretrained", type=Path, metavar="PATH", help="checkpoint of stage 1; default: untrained"
    )
    parser.add_argument("--traps", type=int, help="a malicious server: records per trap")
    parser.add_argument("--defense", default="", metavar="NAME:PARAM,...")
    parser.add_argument("--sigma", type=float, help="DP-SGD's noise multiplier; clips at norm 1")
    parser.add_argument("--local", default="", metavar="WORDS", help="default: one step")
    parser.add_argument("--iterations", type=int, help="of the attack; default: as published")
    parser.add_argument("--restarts", type=int)
    parser.add_argument("--time-budget", type=float, help="seconds of a search without end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Share, invert and measure every batch; write the record."""
    args = build_parser().parse_args(argv)
    if args.batches < 1 or (args.width is not None and args.width < 1):
        raise InputError("--batches and --width must be at least 1")
    torch.set_num_threads(1)
    began = time.perf_counter()
    train, public = load_table(args.data).split()
    row = Row(**{name: value for name, value in vars(args).items() if name != "results"})
    trained = None if row.pretrained is None else _trained(row, train)
    rows = [_measured(row, trained, train, public, number) for number in range(row.batches)]
    # Of every batch; a report shows those of the first.
    recovered = [row.pop("recovered") for row in rows]
    shown = [row.pop("comparison") for row in rows]
    record = {
        "status": "finished",
        "batches": rows,
        "columns": {c.name: c.kind for c in train.columns.columns},
        "recovered": recovered[0],
        "seconds": time.perf_counter() - began,
        "provenance": provenance(torch.device("cpu"), args.seed),
        "arguments": {k: str(v) for k, v in vars(args).items()},
    }
    write_record(args.results / "record.json", record)
    print(printable(shown[0]))


def _trained(row: Row, table: Table) -> nn.Module:
    """The network that stage 1 trained on a table.

    Raises:
        InputError: It is none of ours, or for other records.
    """
    assert row.pretrained is not None
    read = read_pretrained(row.pretrained)
    if read.model is None or read.data is None or read.data.columns != table.columns:
        raise InputError(f"--pretrained: {row.pretrained} is not of stage 1 on --data {row.data}")
    if row.width not in (None, read.model.width):
        raise InputError(f"--width {row.width}: the model in {row.pretrained} has another")
    return build_received_model(read.model, read)


def _measured(
    row: Row, trained: nn.Module | None, train: Table, public: Table, number: int
) -> dict[str, Any]:
    """One batch, see `records.PATHS`."""
    seed = row.seed + number
    batch = train.batch(row.batch_size, number, row.seed)
    target, truth = _shared(row, trained, batch, public, seed)
    attack = make_attack(row.attack, row.settings, Knowledge())
    labels = recover_most_exactly(target)
    found = attack.reconstruct(target, labels=labels, device=torch.device("cpu"), seed=seed)
    measured = evaluate(
        found.images, found.labels, truth, metrics=METRICS, confidence=found.confidence
    )
    mean = {name: values["mean"] for name, values in measured.summary().items()}
    guess = {name: v["record_accuracy"]["mean"] for name, v in measured.baselines.items()}
    ordered = found.images[measured.order]
    shown = comparison(batch.columns, ordered[:SHOWN], truth.images[:SHOWN])
    recovered = recovered_records(batch.columns, truth.images, ordered, measured)
    bins = []
    if found.confidence is not None:
        sure = found.confidence[measured.order]
        bins = confidence_bins(batch.columns, ordered, truth.images, sure)
    return {
        "accuracy": mean["record_accuracy"],
        "exact": mean["record_exact"],
        "marginal_guess": guess["marginal guess"],
        "likeliest_record": guess["likeliest record"],
        "surer_when_right": measured.whole.get("right cells surer than wrong ones"),
        "confidence": bins,
        "columns": measured.columns,
        "seconds": found.seconds,
        "recovered": recovered.to_record(),
        "comparison": shown.to_string(index=False),
    }


def _shared(
    row: Row, trained: nn.Module | None, batch: Table, public: Table, seed: int
) -> tuple[Target, Truth]:
    """What the client shares of a batch, and the batch."""
    torch.manual_seed(seed)
    if trained is None:
        model: nn.Module = network(batch.columns.width, row.width or 100, len(batch.class_names))
    else:
        model = copy.deepcopy(trained)
    if row.traps is not None:
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
        set_traps(first, public.inputs, row.traps, row.batch_size, seed)
    local = LocalTraining.parse(row.local, len(batch)) if row.local else LocalTraining()
    privacy = None if row.sigma is None else PrivacySettings(noise_multiplier=row.sigma)
    client = ClientSettings(
        local=local,
        train_mode=False,
        defenses=parse_defenses(row.defense),
        privacy=privacy,
        seed=seed,
    )
    process = Process(device=torch.device("cpu"))
    inputs, targets = batch.inputs, batch.targets
    architecture = GivenModel(model)
    target = share_update(model, architecture, batch.spec, inputs, targets, client, process)
    assert target is not None
    return target, Truth(inputs, targets, columns=batch.columns)


def network(features: int, width: int, n_classes: int) -> nn.Sequential:
    """TabLeak's fully connected network: two hidden ReLU layers of one width."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, n_classes),
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
