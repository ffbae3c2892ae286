"""Every stage on a pretended accelerator, compared with the CPU; prints a line per case.

python -m tests.on_pretended_device PART FOLDER

A line is JSON: the case, and either the largest difference from the CPU's result (None where
there is nothing to compare) or the error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import attack.cli.command
import gradients.command
import training.main_pytorch
from attack.attacks import OptimizationAttack, get_attack
from attack.attacks.ensemble import EnsembleConfig
from attack.loop.inversion import Inversion
from attack.loop.many_targets import ManyInversions
from attack.metrics import ssim
from attack.settings import InversionConfig
from audit.inversion import invert_update
from audit.settings import InversionSettings
from benchmarks.speed import gpu
from benchmarks.speed.cases import SMALL_CASE
from benchmarks.speed.targets import measure_targets
from core.models.building import ModelSpec
from core.processes import launch
from tests.attack_targets import CASES, SETTINGS, Case, run_case
from tests.federated.sites import update_of, victims
from tests.pretended_device import Pretend, install
from tests.targets import make_target, share_model, smooth_images

CPU = torch.device("cpu")
EXACT = InversionConfig(
    iterations=4, signed=False, tv=0.01, coordinates="dct", double=True, hvp="exact"
)
ENGINE: dict[str, dict[str, Any]] = {
    "plain": {},
    "difference": {"hvp": "difference", "iterations": 3},
    # Without total variation, whose sign at equal neighbours magnifies rounding.
    "layer statistics": {"bn": 0.1, "exact_bn": True, "tv": 0.0},
    "balance": {"balance": 0.5, "balance_end": 0.05, "tv_kind": "double-opponents"},
    "group": {"restarts": 2, "group": 0.1, "registration": True, "input_noise": 0.1},
    "batched restarts": {"restarts": 3, "halving": True, "iterations": 8},
    "labels": {"joint_labels": True, "objective": "L2"},
    "polish": {"polish": 3},
    "priors": {"colour": 0.1, "patch": 0.1, "patch_size": 4, "input_norm": 0.01},
    "fusion": {"restarts": 2, "combine": True, "combine_every": 2},
    "race": {"race": 3},
    "features": {"features": 0.1},
    "channels last": {"hvp": "difference", "channels_last": True, "double": False},
}
# Of these settings, those with which several targets are attacked at once.
MANY_TARGETS = ("plain", "difference", "layer statistics", "balance", "group", "labels")
DEFENSES = (
    "clip:1", "freeze:1", "gaussian:0.001", "laplace:0.001", "percentile-noise:10", "prune:0.5",
    "quantize:8", "sign", "topk:0.1", "soteria:0.5",
)  # fmt: skip
SHARED = {
    "plain": "",
    "local steps": "--local-epochs 2 --local-batches 2 --lr 0.01 --local-momentum 0.9",
    "shards": "--shards 1,1",
    "private": "--enable-dp --sigma 0.01 -c 1",
    "resnet": "--arch resnet18 --stem cifar",
    **{f"defense {d}": f"--defense {d}" for d in DEFENSES},
}
TRAINED = {
    "pure": "--scheme pure",
    "RA": "--scheme RA",
    "DP-SGD": "--scheme DP-SGD",
    "GH": "--scheme GH --bn-groups 2",
}
SMALL = "--image-size 16 --arch cnn --width 8"

Work = Callable[[], "float | None"]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, wherever the tensors are."""
    return float((getattr(found, "held", found) - expected).abs().max())


def rule_cases(device: torch.device) -> Iterator[tuple[str, Work]]:
    """What a GPU refuses and what it does not."""
    refused: dict[str, Callable[[], Any]] = {
        "a sum": lambda: torch.ones(2) + torch.ones(2, device=device),
        "a product": lambda: torch.ones(2, 2, device=device) @ torch.ones(2, 2),
        "an index": lambda: torch.ones(2)[torch.tensor([0], device=device)],
        "a generator": lambda: torch.randn(2, device=device, generator=torch.Generator()),
        "NumPy": lambda: torch.ones(2, device=device).numpy(),
    }
    allowed: dict[str, Callable[[], Any]] = {
        "a scalar": lambda: torch.ones(2, device=device) * torch.tensor(2.0),
        "an index of the CPU": lambda: torch.ones(2, device=device)[torch.tensor([0])],
        "its own generator": lambda: torch.randn(
            2, device=device, generator=torch.Generator(device)
        ),
        "a copy": lambda: torch.ones(2).copy_(torch.ones(2, device=device)),
        "a derivative": lambda: derivative(device),
    }

    def refuses(work: Callable[[], Any]) -> None:
        try:
            with Pretend():
                work()
        except (RuntimeError, TypeError):
            return
        raise AssertionError("was not refused")

    def allows(work: Callable[[], Any]) -> None:
        with Pretend():
            work()

    for name, work in refused.items():
        yield f"refused: {name}", lambda work=work: refuses(work)
    for name, work in allowed.items():
        yield f"allowed: {name}", lambda work=work: allows(work)


def derivative(device: torch.device) -> None:
    """Of second order, through a module that was moved there."""
    layer = torch.nn.Linear(3, 2).to(device)
    inputs = torch.ones(1, 3).to(device).requires_grad_()
    (first,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    first.square().sum().backward()
    if inputs.grad is None or inputs.grad.device != device:
        raise AssertionError("the derivative is elsewhere")


def engine_cases(device: torch.device) -> Iterator[tuple[str, Work]]:
    """The engine in double precision, where both devices must agree."""
    target, truth = make_target(ModelSpec("cnn", 10, 16, width=8), 2, train_mode=True)

    def invert(changes: dict[str, Any]) -> float:
        config = EXACT.changed(**changes)
        expected = Inversion(target, truth.labels, config, device=CPU, seed=3).run().images
        with Pretend():
            found = Inversion(target, truth.labels, config, device=device, seed=3).run().images
        return difference(found, expected)

    def invert_many(changes: dict[str, Any]) -> float:
        config = EXACT.changed(**changes)
        targets = share_model(ModelSpec("cnn", 10, 16, width=8), 3, 2, train_mode=True)

        def run(where: torch.device) -> torch.Tensor:
            begun = [Inversion(t, y, config, device=where, seed=3) for t, y in targets]
            return torch.stack([found.images for found in ManyInversions(begun).run()])

        expected = run(CPU)
        with Pretend():
            return difference(run(device), expected)

    for name, changes in ENGINE.items():
        yield f"engine: {name}", lambda changes=changes: invert(changes)
    for name in MANY_TARGETS:
        yield f"many targets: {name}", lambda name=name: invert_many(ENGINE[name])


def metric_cases(device: torch.device) -> Iterator[tuple[str, Work]]:
    """Scores whose CPU path is another."""

    def score() -> float:
        originals = smooth_images(20, 24)
        images = (originals + 0.1 * smooth_images(20, 24, seed=1)).clamp(0, 1)
        with Pretend():
            found = ssim(images.to(device), originals.to(device)).cpu()
        return difference(found, ssim(images, originals))

    yield "metric: ssim", score


def speed_cases(device: torch.device) -> Iterator[tuple[str, Work]]:
    """What `make gpu` measures in this process: it runs, and on the device."""
    case = SMALL_CASE
    sections: dict[str, Callable[[], Any]] = {
        "iterations": lambda: gpu.measure_iterations(case, device, 1, 0),
        "restarts": lambda: gpu.measure_restarts(case, device, 1, 0, (1, 2)),
        "levers": lambda: gpu.measure_levers(case, device, 1, 0, 2, ("none", "channels last")),
        "targets": lambda: measure_targets(case, device, 1, 0, (1, 3)),
    }

    def measure(section: Callable[[], Any]) -> None:
        with Pretend():
            rows = list(section())
        if {row["device"] for row in rows} != {device.type}:
            raise AssertionError(f"measured elsewhere: {rows}")

    for name, section in sections.items():
        yield f"speed: {name}", lambda section=section: measure(section)


def federated_cases(device: torch.device) -> Iterator[tuple[str, Work]]:
    """The inversion of a site's update."""
    public = victims().public

    def invert(method: str, n: int, epochs: int) -> float:
        update = update_of(n, n, epochs)
        settings = InversionSettings(iterations=4, method=method)
        asked: dict[str, Any] = {"prior": public.mean(0), "public": public}
        expected = invert_update(update, settings, **asked).images
        with Pretend():
            found = invert_update(update, settings, **asked, device=device).images
        return difference(found, expected)

    for method, n, epochs in (("full", 1, 2), ("full", 4, 1), ("bn", 4, 1), ("published", 1, 1)):
        yield f"federated: {method}, {n}", lambda m=method, n=n, e=epochs: invert(m, n, e)


def attack_cases(device: torch.device) -> Iterator[tuple[str, Work]]:
    """Every attack on every setting, cut short: float32 iterations are not compared."""

    def invert(case: Case) -> None:
        target, truth = SETTINGS[case.setting]()
        with Pretend():
            found = run_case(case, (target, truth), device)
        if not bool(getattr(found.images, "held", found.images).isfinite().all()):
            raise ValueError("not finite")

    for case in CASES:
        yield f"attack: {case}", lambda case=case: invert(shortened(case))


def shortened(case: Case) -> Case:
    """The same with few iterations."""
    changes = dict(case.changes)
    attack = get_attack(case.attack)
    if issubclass(attack, OptimizationAttack):
        changes |= {"iterations": 3, "warmup": 1}
        if "combine_every" in changes:
            changes["combine_every"] = 1
        if attack.published.optimiser.name == "LBFGS":
            changes["iterations"] = 1
    if isinstance(config := changes.get("config"), EnsembleConfig):
        changes["config"] = dataclasses.replace(config, iterations=3)
    return dataclasses.replace(case, changes=changes)


def command_cases(device: torch.device, folder: Path) -> Iterator[tuple[str, Work]]:
    """The three stages by their commands."""

    def run(main: Callable[[list[str]], Any], words: str) -> None:
        errors = io.StringIO()
        with Pretend(), contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
            status = main(words.split())
        if status not in (None, 0):
            raise RuntimeError(errors.getvalue()[-300:])

    def share_and_invert(name: str, more: str) -> None:
        place = folder / name.replace(" ", "_").replace(":", "_")
        n = 1 if "soteria" in name else 2
        run(
            gradients.command.main,
            f"--data photo-patches {SMALL} --batch-size {n} {more} --results {place}",
        )
        (file,) = place.rglob("*.tar")
        run(
            attack.cli.command.main,
            f"--checkpoint {file} --root {place} --attack spectral --adaptive --epochs 4 --quiet "
            "--metric --pseudo-label-init known",
        )

    for name, more in SHARED.items():
        yield f"stages 2 and 3: {name}", lambda n=name, m=more: share_and_invert(n, m)
    for name, more in TRAINED.items():
        words = f"--data photo-patches {SMALL} --epochs 1 -b 512 -j 0 --no-tensorboard {more}"
        yield (
            f"stage 1: {name}",
            lambda n=name, w=words: run(
                training.main_pytorch.main, f"{w} --result-root {folder / n}"
            ),
        )


def library_cases(device: torch.device, _folder: Path) -> Iterator[tuple[str, Work]]:
    """All that are no commands."""
    yield from rule_cases(device)
    yield from engine_cases(device)
    yield from metric_cases(device)
    yield from speed_cases(device)
    yield from federated_cases(device)
    yield from attack_cases(device)


# Of about the same length.
PARTS = {"library": library_cases, "commands": command_cases}


def main(part: str, folder: Path) -> None:
    """Run all cases of a part."""
    device = install()
    torch.set_num_threads(1)
    # What the commands compute on, and how much memory it has.
    launch._device = lambda settings, rank: device  # type: ignore[assignment]
    torch.cuda.mem_get_info = lambda device=None: (10**9, 10**10)  # type: ignore[assignment]
    for name, work in PARTS[part](device, folder):
        line: dict[str, Any] = {"case": name}
        try:
            line["difference"] = work()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames][-6:]
            line["error"] = f"{type(error).__name__}: {str(error)[:300]} ({' '.join(where)})"
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
