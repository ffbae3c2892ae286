"""On a CUDA device: the same reconstruction as on a CPU, every acceleration, every stage."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attack.loop.inversion import Inversion
from attack.matching.acceleration import AcceleratedMatcher, product_precision
from attack.matching.matcher import GradientMatcher, cosine_of_images
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.metrics import evaluate
from attack.settings import InversionConfig, SpeedSettings
from core.errors import exit_status
from core.launch_arguments import LaunchSettings
from core.models.building import ModelSpec
from core.processes.distributed import Process
from core.processes.launch import launch
from core.storage import load_checkpoint, save_checkpoint
from gradients.checkpoint import load_target, save_target
from tests.targets import make_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CNN = ModelSpec("cnn", 10, 16, width=8)
RESNET = ModelSpec("resnet18", 10, 32, "cifar", width=16)
EXACT = InversionConfig(
    iterations=20, signed=False, tv=0.01, coordinates="dct", double=True, hvp="exact"
)
FAST = EXACT.changed(double=False, hvp="auto", iterations=40)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hvp": "difference", "iterations": 5},
        {"bn": 0.1, "exact_bn": True},
        {"balance": 0.5, "balance_end": 0.05, "tv_kind": "double-opponents"},
        {"restarts": 2, "group": 0.1, "input_noise": 0.1},
        {"joint_labels": True, "objective": "L2"},
        {"polish": 5},
    ],
    ids=str,
)
def test_the_cpu_and_the_gpu_reconstruct_the_same(changes: dict[str, Any]) -> None:
    target, truth = make_target(CNN, 2, train_mode=True)
    config = EXACT.changed(**changes)
    found = [
        Inversion(target, truth.labels, config, device=device, seed=3).run()
        for device in (CPU, CUDA)
    ]
    tolerance = 1e-4 if config.matching.hvp == "difference" else 1e-5
    torch.testing.assert_close(found[1].images, found[0].images, rtol=0, atol=tolerance)
    assert found[1].objective == pytest.approx(found[0].objective, rel=1e-3)


ACCELERATIONS = {
    "compile": SpeedSettings(compile=True),
    "graphs": SpeedSettings(cuda_graphs=True),
    "compile and graphs": SpeedSettings(compile=True, cuda_graphs=True),
    "tf32": SpeedSettings(precision="tf32"),
    "bf16": SpeedSettings(precision="bf16"),
    "channels last": SpeedSettings(channels_last=True),
    "trace": SpeedSettings(trace=True),
    "all": SpeedSettings(
        trace=True, compile=True, cuda_graphs=True, precision="bf16", channels_last=True
    ),
}


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_accelerations_keep_the_attack(name: str) -> None:
    target, truth = make_target(RESNET, 2, double=False)
    config = FAST.changed(**dataclasses.asdict(ACCELERATIONS[name]))
    found = Inversion(target, truth.labels, config, device=CUDA).run()
    plain = Inversion(target, truth.labels, FAST, device=CUDA).run()
    notes = found.details["acceleration"]
    assert found.status == "finished"
    assert found.objective < 2 * plain.objective + 0.01
    if ACCELERATIONS[name].cuda_graphs and ACCELERATIONS[name].precision == "float32":
        assert notes["cuda_graphs"], notes["events"]


def test_a_captured_pass_is_the_pass_for_every_candidate() -> None:
    target, truth = make_target(RESNET, 2, train_mode=True)
    replicas = [Replica(target, CUDA, torch.float64) for _ in range(2)]
    plain = GradientMatcher(replicas[0], Cosine(), "difference", False)
    graphs = SpeedSettings(cuda_graphs=True)
    captured = AcceleratedMatcher(replicas[1], Cosine(), "difference", graphs)
    labels = truth.labels.to(CUDA)
    kept = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn((2, 3, 32, 32), generator=generator).double().to(CUDA)
        expected, found = plain(inputs, labels), captured(inputs, labels)
        torch.testing.assert_close(found.value, expected.value)
        assert cosine_of_images(found.input_gradient, expected.input_gradient) > 0.999999
        kept.append((found.input_gradient, found.input_gradient.clone()))
    # What was returned is nobody else's memory.
    assert all(torch.equal(now, then) for now, then in kept)
    assert captured.notes["cuda_graphs"], captured.events


def test_convolutions_do_not_lose_digits_unasked() -> None:
    target, truth = make_target(RESNET, 2, double=False)
    inversion = Inversion(target, truth.labels, FAST, device=CUDA)
    inversion.run()
    assert inversion.matcher.step is not None
    assert (inversion.matcher.agreement or 0) > 0.9999


def test_restarts_fill_the_card_and_stay_themselves() -> None:
    target, truth = make_target(RESNET, 1, double=False)
    config = FAST.changed(restarts=8, iterations=5, optimizer="SGD", hvp="difference")
    together = Inversion(target, truth.labels, config, device=CUDA)
    assert together.evaluation.at_once(8) == 8
    one_by_one = config.changed(restarts_at_once=1)
    alone = Inversion(target, truth.labels, one_by_one, device=CUDA)
    for inversion in (together, alone):
        inversion.run()
    for a, b in zip(together.restarts, alone.restarts, strict=True):
        assert a.best_value == pytest.approx(b.best_value, rel=1e-2)


def test_the_difference_needs_less_memory_than_a_double_backward() -> None:
    target, truth = make_target(ModelSpec("resnet18", 10, 64), 4, double=False)
    inputs, labels = target.data.normalize(truth.images).to(CUDA), truth.labels.to(CUDA)
    peaks = {}
    for hvp in ("exact", "difference"):
        matcher = GradientMatcher(Replica(target, CUDA), Cosine(), hvp)
        matcher(inputs, labels)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        matcher(inputs, labels)
        peaks[hvp] = torch.cuda.max_memory_allocated() - before
        del matcher
    assert peaks["difference"] < peaks["exact"]


def test_metrics_on_the_device_are_those_on_the_cpu() -> None:
    truth = make_target(CNN, 4)[1]
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(truth.images.shape, generator=generator)
    images = (truth.images + noise).clamp(0, 1)
    names = ["mse", "psnr", "ssim"]
    here, there = (
        evaluate(images, truth.labels, truth, metrics=names, device=device)
        for device in (CPU, CUDA)
    )
    for mine, theirs in zip(there.per_image, here.per_image, strict=True):
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4)


def invert_on_ranks(process: Process, file: Path) -> None:
    target, truth = make_target(CNN, 4)
    with product_precision("float32"):
        found = Inversion(target, truth.labels, EXACT, device=process.device, seed=4).run()
    if process.is_main:
        save_checkpoint({"images": found.images}, file)


@pytest.mark.parametrize("processes", [1, 2])
def test_nccl_gives_what_one_process_does(processes: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    settings = LaunchSettings(
        dist_url="tcp://127.0.0.1:0",
        dist_backend="nccl",
        multiprocessing_distributed=True,
        nproc_per_node=processes,
    )
    launch(invert_on_ranks, settings, tmp_path / "found.pt")
    target, truth = make_target(CNN, 4)
    expected = Inversion(target, truth.labels, EXACT, device=CPU, seed=4).run().images
    found = load_checkpoint(tmp_path / "found.pt")["images"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["cnn", "resnet18"])
def test_stage_two_shares_the_same_gradient_from_both_devices(arch: str, tmp_path: Path) -> None:
    from gradients.command import main

    shared = {}
    for name, more in {"cpu": ["--cpu"], "cuda": []}.items():
        words = ["--data", "photo-patches", "--batch-size", "2", "--arch", arch, "--width", "8"]
        folder = tmp_path / name
        words += ["--results", str(folder), *more]
        assert exit_status(functools.partial(main, words)) in (None, 0)
        (file,) = folder.rglob("*.tar")
        shared[name] = load_target(file)[0].gradient
    for name, gradient in shared["cpu"].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            shared["cuda"][name].cpu(), gradient, rtol=0, atol=2e-3 * scale + 1e-7
        )


@pytest.mark.parametrize(
    "more",
    [
        ["--compile"],
        ["--cuda-graphs"],
        ["--precision", "tf32"],
        ["--precision", "bf16", "--channels-last"],
    ],
    ids=" ".join,
)
def test_the_command_records_what_ran(more: list[str], tmp_path: Path) -> None:
    from attack.cli.command import main

    target, truth = make_target(CNN, 2, double=False)
    save_target(tmp_path / "target.tar", target, truth)
    words = ["--checkpoint", str(tmp_path / "target.tar"), "--root", str(tmp_path), "--metric"]
    words += ["--epochs", "20", "--quiet", "--pseudo-label-init", "from_grads", *more]
    assert exit_status(functools.partial(main, words)) == 0
    record = json.loads((tmp_path / "test" / "record.json").read_text())
    assert "acceleration" in json.dumps(record)
    assert record["provenance"]["device_type"] == "cuda"
