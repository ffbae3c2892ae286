"""The speed of what surrounds gradient matching: training, metrics, harness, start-up."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.run.cells import ROOT, Cell
from benchmarks.run.executor import Job, LocalExecutor
from benchmarks.run.stages import Stage
from benchmarks.speed import metrics
from benchmarks.speed.timing import interleaved, medians
from core.models.building import ModelSpec, build_model
from training.privacy import PerSampleClipping

Row = dict[str, Any]
COMMANDS = {
    "stage 1": ("training/main_pytorch.py",),
    "stage 2": ("training/get_gradients.py",),
    "stage 3": ("main_run.py",),
    "benchmarks": ("-m", "benchmarks"),
    "speed": ("-m", "benchmarks.speed"),
}
A_CELL = 60.0


def measure_parts(quick: bool, seed: int) -> Iterator[Row]:
    """One row per figure."""
    yield from _start_up(1 if quick else 3)
    yield from _metrics(quick, seed)
    yield from _training(8 if quick else 32, 2 if quick else 5, seed)
    yield from _stage_two(quick)
    yield _harness(3 if quick else 10)


def _row(part: str, value: float, unit: str) -> Row:
    return {"part": part, "value": value, "unit": unit}


def _start_up(repeats: int) -> Iterator[Row]:
    """Processor seconds are not asked for: a user waits by the clock on the wall."""
    for name, words in COMMANDS.items():
        call = [sys.executable, *words, "--help"]
        seconds = min(_seconds_of(call) for _ in range(repeats))
        yield _row(f"`--help` of {name}", seconds, "s")


def _seconds_of(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _metrics(quick: bool, seed: int) -> Iterator[Row]:
    for size, n in [(32, 100)] if quick else [(32, 1000), (64, 1000), (224, 100)]:
        record = metrics.measure(n, size, torch.device("cpu"), 2, seed)
        name = f"MSE, PSNR, SSIM of {n} images of {size} px"
        yield _row(name, record["seconds_ours"], "s")
        yield _row(f"{name}: scikit-image's loop", record["ratio"], "times ours")
        by_processor = record["ratio_of_cpu_seconds"]
        yield _row(f"{name}: scikit-image's loop, processor time", by_processor, "times ours")
        yield _row(f"{name}: difference", max(record["largest_difference"].values()), "at most")


def _training(batch: int, repeats: int, seed: int) -> Iterator[Row]:
    """Images per second of one step of stage 1, ResNet-18 with GroupNorm at 32 px."""
    torch.manual_seed(seed)
    spec = ModelSpec("resnet18", 10, 32, "cifar", width=16, norm="group")
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    steps = {
        "plain": _plain_step(spec, images, labels),
        "DP, ours (torch.func)": _private_step(spec, images, labels),
        "DP, Opacus' hooks": _hooked_step(spec, images, labels),
    }
    for name, seconds in medians(interleaved(steps, repeats)).items():
        yield _row(f"stage 1, {name}", batch / seconds, "images/s")


def _plain_step(spec: ModelSpec, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    model = build_model(spec)
    return lambda: torch.autograd.grad(
        F.cross_entropy(model(images), labels), list(model.parameters())
    )


def _private_step(spec: ModelSpec, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    step = PerSampleClipping(
        build_model(spec), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=len(images)
    )
    generator = torch.Generator().manual_seed(0)
    return lambda: step.backward(images, labels, generator)


def _hooked_step(spec: ModelSpec, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    from opacus import GradSampleModule

    model = build_model(spec)
    for module in model.modules():
        # Opacus' hooks refuse what changes activations in place.
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for block in model.modules():
        if type(block).__name__ == "BasicBlock":
            block.forward = _out_of_place(block)  # type: ignore[method-assign]
    wrapped = GradSampleModule(model)

    def step() -> None:
        for parameter in wrapped.parameters():
            parameter.grad_sample = None
        F.cross_entropy(wrapped(images), labels).backward()

    return step


def _out_of_place(block: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchvision's residual block without its in-place sum."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        return F.relu(inner + (x if block.downsample is None else block.downsample(x)))

    return forward


def _stage_two(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--data", "photo-patches", "--batch-size", "2" if quick else "8"]
        words += ["--arch", "cnn" if quick else "resnet18", "--results", folder]
        command = [sys.executable, *COMMANDS["stage 2"], *words]
        yield _row("stage 2, from start to checkpoint", _seconds_of(command), "s")


def _harness(repeats: int) -> Row:
    """What the harness adds to a command that does nothing, per cell of a minute."""
    stage = Stage("nothing", ("-c", "pass"), ("core",), lambda folder: {}, "none.json")
    with tempfile.TemporaryDirectory() as folder:
        times = interleaved(
            {
                "bare": lambda: _seconds_of([sys.executable, "-c", "pass"]),
                "cell": lambda: _one_cell(stage, Path(folder)),
            },
            repeats,
        )
    seconds = medians(times)
    share = max(0.0, seconds["cell"] - seconds["bare"]) / A_CELL
    return _row("harness per cell of a minute", 100 * share, "%")


def _one_cell(stage: Stage, folder: Path) -> None:
    cell = Cell(stage.name, {}, code=stage.code())
    with (folder / "lock").open("w") as lock:
        job = Job(cell, stage, {}, folder, folder / f"{cell.key}.log", {}, lock.fileno())
        executor = LocalExecutor()
        executor.start(job)
        while not executor.poll():
            time.sleep(0.001)
