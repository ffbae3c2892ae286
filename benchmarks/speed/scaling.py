"""Predict iterations on many GPUs, and renew the tables of docs/scaling.md from records.

python -m benchmarks.speed.scaling
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.errors import InputError, exit_status

Row = dict[str, Any]
# A difference of first-order passes: forward 1, backward 2, forward 1, backward in x 1.
PASSES = 5
# Read g and t, then g, t and theta, and write theta + h v.
SWEEPS = 6
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Machine:
    """Assumptions about a cluster; the defaults are a modest view of current data-centre GPUs.

    Attributes:
        flops: Rate that convolutions reach, FLOP/s (TF32).
        memory: Bandwidth of a GPU's memory, bytes/s.
        per_node: GPUs of a node.
        inside: Bandwidth between the GPUs of a node, bytes/s.
        between: Bandwidth of a node to the others, bytes/s.
        latency: Of one step of a ring, seconds.
        launches: Fixed time of an iteration (kernel launches, optimizer), seconds.
    """

    flops: float = 40e12
    memory: float = 2e12
    per_node: int = 8
    inside: float = 150e9
    between: float = 20e9
    latency: float = 10e-6
    launches: float = 5e-3

    def all_reduce(self, n_bytes: float, gpus: int) -> float:
        """Seconds of a ring inside each node, then a ring of nodes.

        Source: Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms for Clusters of
        Workstations, 2009, section 3, https://doi.org/10.1016/j.jpdc.2008.09.002.
        """
        local = min(gpus, self.per_node)
        nodes = -(-gpus // self.per_node)
        return self._ring(n_bytes, local, self.inside) + self._ring(n_bytes, nodes, self.between)

    def _ring(self, n_bytes: float, members: int, bandwidth: float) -> float:
        steps = 2 * (members - 1)
        return steps * (n_bytes / members / bandwidth + self.latency)

    def iteration(self, flops: float, n_bytes: float, batch: int, gpus: int) -> float:
        """Seconds of an iteration with the batch sharded as evenly as possible.

        Args:
            flops: One image's forward pass.
            n_bytes: Of the parameters.
            batch: Images.
            gpus: At most one per image works.
        """
        share = -(-batch // gpus)
        compute = PASSES * flops * share / self.flops + SWEEPS * n_bytes / self.memory
        return self.launches + compute + self.all_reduce(n_bytes, min(gpus, batch))


MODELS = {
    "ConvNet, 32 px": ("convnet", 10, 32, "imagenet"),
    "ResNet-18, 32 px": ("resnet18", 10, 32, "cifar"),
    "VGG-11, 32 px": ("vgg11", 10, 32, "imagenet"),
    "ResNet-18, 224 px": ("resnet18", 1000, 224, "imagenet"),
    "ResNet-50, 224 px": ("resnet50", 1000, 224, "imagenet"),
    "ViT-B/16, 224 px": ("vit_b_16", 1000, 224, "imagenet"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--records", default="results/speed", metavar="DIR")
    parser.add_argument("--page", default="docs/scaling.md", metavar="FILE")
    for field, value in asdict(Machine()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write scaling.json, and put its tables and the measured ones into the page."""
    from training.storage import write_json, write_text

    args = build_parser().parse_args(argv)
    page = Path(args.page)
    if not page.exists():
        raise InputError(f"--page {page}: there is no such file")
    machine = Machine(**{name: getattr(args, name) for name in asdict(Machine())})
    if min(asdict(machine).values()) <= 0:
        raise InputError("rates, bandwidths and times of the machine must be above 0")
    record = {"machine": asdict(machine), "rows": predict(machine)}
    write_json(Path(args.records) / "scaling.json", record)
    write_text(page, renew(page.read_text(encoding="utf-8"), _blocks(record, Path(args.records))))


def predict(machine: Machine, batches: Sequence[int] = (8, 64)) -> list[Row]:
    """One row per model and batch: bytes, FLOPs, and seconds on each number of GPUs."""
    rows = []
    for name in MODELS:
        n_parameters, flops = measure_model(name)
        for batch in batches:
            seconds = [machine.iteration(flops, 4 * n_parameters, batch, n) for n in GPUS]
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "all_reduced_bytes": 4 * n_parameters,
                    "flops": PASSES * flops * batch,
                    "seconds": dict(zip(map(str, GPUS), seconds, strict=True)),
                    "all_reduce_seconds": {
                        str(n): machine.all_reduce(4 * n_parameters, min(n, batch)) for n in GPUS
                    },
                }
            )
    return rows


def measure_model(name: str) -> tuple[int, int]:
    """Number of parameters, and FLOPs of one image's forward pass, without computing it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from training.models import ModelSpec, build_model

    arch, n_classes, size, stem = MODELS[name]
    with torch.device("meta"):
        model = build_model(ModelSpec(arch, n_classes, size, stem)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def _blocks(record: dict[str, Any], folder: Path) -> dict[str, str]:
    from benchmarks.speed.render import SECTIONS, conditions

    blocks = {"predicted": _predicted(record["rows"]), "machine": _machine(record["machine"])}
    measured = folder / "processes.json"
    if measured.exists():
        processes = json.loads(measured.read_text(encoding="utf-8"))
        draw = SECTIONS["processes"][1]
        blocks["measured"] = f"{draw(processes['rows'])}\n{conditions(processes)}\n"
    return blocks


def _predicted(rows: list[Row]) -> str:
    from benchmarks.speed.render import table

    header = ["model", "batch", "MB all-reduced", "TFLOP", "kFLOP per byte", "1 GPU ms"]
    header += [f"{n} GPUs ms" for n in GPUS[1:]]
    header += [f"sharding speed-up on {n}" for n in GPUS[1:]]
    return table(header, [_predicted_cells(row) for row in rows])


def _predicted_cells(row: Row) -> list[str]:
    seconds = [row["seconds"][str(n)] for n in GPUS]
    return [
        row["model"],
        str(row["batch"]),
        f"{row['all_reduced_bytes'] / 1e6:.0f}",
        f"{row['flops'] / 1e12:.3f}",
        f"{row['flops'] / row['all_reduced_bytes'] / 1e3:.1f}",
        *(f"{1000 * s:.1f}" for s in seconds),
        *(f"{seconds[0] / s:.1f}" for s in seconds[1:]),
    ]


def _machine(machine: dict[str, Any]) -> str:
    from benchmarks.speed.render import table

    return table(["assumption", "value (SI units)"], [[k, f"{v:g}"] for k, v in machine.items()])


def renew(page: str, blocks: dict[str, str]) -> str:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        InputError: A block has no place in the page.
    """
    for name, text in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise InputError(f"--page: the page has no place for the table {name} ({begin})")
        page = f"{before}{begin}\n{text}{end}{after}"
    return page


if __name__ == "__main__":
    sys.exit(exit_status(main))
