"""W processes against one process: value, first and second derivative, running statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.launch_arguments import LaunchSettings, add_launch_arguments
from core.models.batch_norm import (
    average_running_statistics,
    convert_batch_norm,
    leave_synchronization_to_python,
)
from core.processes.distributed import (
    Process,
    all_reduce,
    shard_slice,
)
from core.processes.launch import launch

BATCH, CHANNELS, SIDE, CLASSES = 9, 3, 6, 4


def make_model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.BatchNorm2d(6, affine=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    ).double()
    model(torch.randn(2, CHANNELS, SIDE, SIDE, dtype=torch.float64))
    return model


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    # A large mean is where a sum of squares would lose its digits.
    images = 3 * torch.randn(BATCH, CHANNELS, SIDE, SIDE, dtype=torch.float64) + 50
    return images, torch.randint(CLASSES, (BATCH,))


def match(model: nn.Module, sizes: list[int], rank: int) -> dict[str, Any]:
    """A shard's part of D = |G|^2 / 2 for the mean gradient G of the whole batch."""
    images, labels = (part[shard_slice(sizes, rank)] for part in make_batch())
    images.requires_grad_(True)
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / BATCH
    variables = [images, *model.parameters()]
    in_images, *first = torch.autograd.grad(loss, variables, retain_graph=True)
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    whole = [all_reduce(part.detach().clone()) for part in gradient]
    (second,) = torch.autograd.grad(gradient, images, grad_outputs=whole)
    model(images)  # a second update of the running statistics
    average_running_statistics(model)
    return {
        "logits": logits.detach(),
        "in images": in_images,
        # Without a graph of its own, by other kernels.
        "first": [all_reduce(part) for part in first],
        "gradient": whole,
        "second": second,
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
    }


def shard(process: Process, args: argparse.Namespace) -> None:
    model = make_model()
    if args.kind == "synchronized":
        model = convert_batch_norm(model, "synchronized")
    result = match(model, args.sizes, process.rank)
    torch.save(result, Path(args.out) / f"{process.rank}.pt")


def compiled_shard(process: Process, args: argparse.Namespace) -> None:
    model = convert_batch_norm(make_model().float(), "synchronized")
    images, labels = (part[shard_slice(args.sizes, process.rank)] for part in make_batch())
    found = []
    leave_synchronization_to_python()
    for forward in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        nn.functional.cross_entropy(forward(images.float()), labels, reduction="sum").backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.save(found, Path(args.out) / f"{process.rank}.pt")


def run_shards(kind: str, sizes: list[int], out: Path, work: Any = shard) -> list[Any]:
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    flags = ["--cpu", "--multiprocessing-distributed", "--dist-url", "tcp://127.0.0.1:0"]
    args = parser.parse_args([*flags, "--nproc-per-node", str(len(sizes))])
    args.kind, args.sizes, args.out = kind, sizes, str(out)
    launch(work, LaunchSettings.from_arguments(args), args)
    return [torch.load(out / f"{rank}.pt") for rank in range(len(sizes))]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("synchronized", [5, 4]),
        ("synchronized", [6, 1, 2]),
        ("synchronized", [5, 0, 4]),
        ("asynchronous", [3, 3, 3]),
        ("asynchronous", [5, 1, 3]),
    ],
)
def test_processes_equal_one_process(kind: str, sizes: list[int], tmp_path: Path) -> None:
    shards = run_shards(kind, sizes, tmp_path)
    model = make_model()
    if kind == "asynchronous":
        model = convert_batch_norm(model, "grouped", groups=sizes)
    expected = match(model, [BATCH], 0)

    close(torch.cat([part["logits"] for part in shards]), expected["logits"])
    close(torch.cat([part["in images"] for part in shards]), expected["in images"])
    close(torch.cat([part["second"] for part in shards]), expected["second"])
    for part in shards:
        for order in ("first", "gradient"):
            for ours, theirs in zip(part[order], expected[order], strict=True):
                close(ours, theirs)
    even = len(set(sizes)) == 1
    if kind == "synchronized" or even:
        # Processes average their running statistics evenly; groups weigh them by size.
        for name, buffer in expected["buffers"].items():
            torch.testing.assert_close(shards[0]["buffers"][name], buffer)


def test_a_compiled_model_synchronizes_too(tmp_path: Path) -> None:
    for plain, compiled in run_shards("synchronized", [5, 4], tmp_path, compiled_shard):
        assert len(plain) == len(compiled) > 4
        for ours, theirs in zip(compiled, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_asynchronous_differs_from_synchronized() -> None:
    """The comparison above would otherwise prove nothing."""
    grouped = match(convert_batch_norm(make_model(), "grouped", groups=[5, 4]), [BATCH], 0)
    whole = match(make_model(), [BATCH], 0)
    assert (grouped["second"] - whole["second"]).norm() > 0.1 * whole["second"].norm()
