"""Predict iterations on many GPUs.

python -m benchmarks.speed.scaling
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser

Row = dict[str, Any]
# A difference of first-order passes: forward 1, backward 2, forward 1, backward in x 1.
PASSES = 5
# Over what is written out: read g and t, then g, t and theta, and write theta + h v.
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

    def travel(self, traffic: Traffic, gpus: int) -> float:
        """Seconds of what processes tell each other; a gather is half of an all-reduce."""
        reduced = self.all_reduce(traffic.dense, gpus)
        gathered = self.all_reduce(traffic.factors, gpus) / 2 if traffic.factors else 0.0
        return reduced + gathered

    def iteration(self, flops: float, traffic: Traffic, batch: int, gpus: int) -> float:
        """Seconds of an iteration with the batch sharded as evenly as possible.

        Args:
            flops: One image's forward pass.
            traffic: With so many GPUs.
            batch: Number of images in the batch.
            gpus: At most one per image works.
        """
        share = -(-batch // gpus)
        compute = PASSES * flops * share / self.flops + SWEEPS * traffic.dense / self.memory
        return self.launches + compute + self.travel(traffic, min(gpus, batch))


@dataclass(frozen=True)
class Traffic:
    """Bytes of an iteration.

    Attributes:
        dense: Of the gradients that are written out: swept, and all-reduced.
        factors: Of the others' factors, which are gathered (see `attack.matching.late_layers`).
    """

    dense: float
    factors: float = 0.0


@dataclass(frozen=True)
class LayerSize:
    """A convolution or a fully connected layer, per image.

    Attributes:
        rows: Number of output positions.
        patch: Values that one of them reads.
        channels: Outputs of one of them.
        values: Inputs and outputs.
    """

    rows: int
    patch: int
    channels: int
    values: int


@dataclass(frozen=True)
class ModelSize:
    """What scaling depends on.

    Attributes:
        parameters: Number of parameters.
        flops: Of one image's forward pass.
        layers: Those whose gradient may be kept as a product.
    """

    parameters: int
    flops: int
    layers: tuple[LayerSize, ...]

    def traffic(self, batch: int, gpus: int) -> Traffic:
        """Bytes of an iteration on so many GPUs, by the rule that holds on CPUs."""
        from attack.matching.late_layers import saves_sweeps
        from core.processes.distributed import shard_sizes

        sizes = shard_sizes(batch, min(batch, gpus))
        kept = [
            layer
            for layer in self.layers
            if saves_sweeps(layer.rows * sizes[0], layer.patch, layer.channels, sizes)
        ]
        dense = self.parameters - sum(layer.patch * layer.channels for layer in kept)
        factors = batch * sum(layer.values for layer in kept) if len(sizes) > 1 else 0
        return Traffic(4.0 * dense, 4.0 * factors)


MODELS = {
    "ConvNet, 32 px": ("convnet", 10, 32, "imagenet"),
    "ResNet-18, 32 px": ("resnet18", 10, 32, "cifar"),
    "VGG-11, 32 px": ("vgg11", 10, 32, "imagenet"),
    "ResNet-18, 224 px": ("resnet18", 1000, 224, "imagenet"),
    "ResNet-50, 224 px": ("resnet50", 1000, 224, "imagenet"),
    "ViT-B/16, 224 px": ("vit_b_16", 1000, 224, "imagenet"),
}


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.speed.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--records", default="results/speed", metavar="DIR")
    for field, value in asdict(Machine()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write scaling.json; `python -m benchmarks.speed.pages` shows it."""
    from core.storage import write_json

    args = build_parser().parse_args(argv)
    machine = Machine(**{name: getattr(args, name) for name in asdict(Machine())})
    if min(asdict(machine).values()) <= 0:
        raise InputError("rates, bandwidths and times of the machine must be above 0")
    record = {"machine": asdict(machine), "rows": predict(machine)}
    write_json(Path(args.records) / "scaling.json", record)


def predict(machine: Machine, batches: Sequence[int] = (8, 64)) -> list[Row]:
    """One row per model and batch: bytes, FLOPs, and seconds on each number of GPUs."""
    rows = []
    for name in MODELS:
        size = measure_model(name)
        for batch in batches:
            traffic = {n: size.traffic(batch, n) for n in GPUS}
            seconds = {n: machine.iteration(size.flops, traffic[n], batch, n) for n in GPUS}
            travel = {n: machine.travel(traffic[n], min(n, batch)) for n in GPUS}
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "parameter_bytes": 4 * size.parameters,
                    "traffic": {str(n): asdict(t) for n, t in traffic.items()},
                    "flops": PASSES * size.flops * batch,
                    "seconds": {str(n): s for n, s in seconds.items()},
                    "travel_seconds": {str(n): s for n, s in travel.items()},
                }
            )
    return rows


def measure_model(name: str) -> ModelSize:
    """A model's size and work for one image, without computing it."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from core.models.building import ModelSpec, build_model

    arch, n_classes, size, stem = MODELS[name]
    layers: list[LayerSize] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight: Any = layer.weight
        channels = len(weight)
        values = inputs[0].numel() + output.numel()
        layers.append(LayerSize(output.numel() // channels, weight[0].numel(), channels, values))

    with torch.device("meta"):
        model = build_model(ModelSpec(arch, n_classes, size, stem)).eval()
        for layer in model.modules():
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                layer.register_forward_hook(note)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    n_parameters = sum(p.numel() for p in model.parameters())
    return ModelSize(n_parameters, counter.get_total_flops(), tuple(layers))


def predicted_table(rows: list[Row]) -> str:
    """What is predicted, as Markdown."""
    from benchmarks.speed.render import table

    header = ["model", "batch", "MB of parameters", "MB all-reduced on 8", "MB gathered on 8"]
    header += ["TFLOP", "kFLOP per byte", "1 GPU ms"]
    header += [f"{n} GPUs ms" for n in GPUS[1:]]
    header += [f"sharding speed-up on {n}" for n in GPUS[1:]]
    return table(header, [_predicted_cells(row) for row in rows])


def _predicted_cells(row: Row) -> list[str]:
    seconds, on_eight = [row["seconds"][str(n)] for n in GPUS], row["traffic"]["8"]
    return [
        row["model"],
        str(row["batch"]),
        f"{row['parameter_bytes'] / 1e6:.0f}",
        *(f"{on_eight[part] / 1e6:.0f}" for part in ("dense", "factors")),
        f"{row['flops'] / 1e12:.3f}",
        f"{row['flops'] / sum(on_eight.values()) / 1e3:.1f}",
        *(f"{1000 * s:.1f}" for s in seconds),
        *(f"{seconds[0] / s:.1f}" for s in seconds[1:]),
    ]


def machine_table(machine: dict[str, Any]) -> str:
    """What is assumed, as Markdown."""
    from benchmarks.speed.render import table

    return table(["assumption", "value (SI units)"], [[k, f"{v:g}"] for k, v in machine.items()])


if __name__ == "__main__":
    sys.exit(exit_status(main))
