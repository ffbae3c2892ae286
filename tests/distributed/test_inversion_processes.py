"""A batch spread over processes is inverted as one process inverts it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from attack.inversion import Inversion
from attack.settings import InversionConfig
from gradients.checkpoint import Target, Truth
from tests.targets import make_target
from training.distributed import Process, launch
from training.models import ModelSpec
from training.storage import load_checkpoint, save_checkpoint

CNN = ModelSpec("cnn", 10, 8, width=4)
RESIDUAL = ModelSpec("resnet18", 10, 8, "cifar", width=8)
# Others than the CNN.
MODELS = {
    "residual, synchronized": RESIDUAL,
    "residual, eval": RESIDUAL,
    "transformer": ModelSpec("vit_tiny", 10, 8),
}
BASE = InversionConfig(iterations=15, signed=False, tv=0.01, double=True, hvp="exact")
TARGETS = {
    "synchronized": {"train_mode": True},
    "asynchronous": {"train_mode": True, "shards": (3, 2)},
    "eval": {},
    "residual, synchronized": {"train_mode": True},
    "residual, eval": {},
    "transformer": {},
}


def change(**fields: object) -> InversionConfig:
    return dataclasses.replace(BASE, **fields)  # type: ignore[arg-type]


CASES: dict[str, tuple[str, InversionConfig]] = {
    **{f"{name}, exact": (name, BASE) for name in TARGETS if name not in MODELS},
    **{f"{name}, difference": (name, change(hvp="difference")) for name in TARGETS},
    "synchronized, running statistics": ("synchronized", change(bn=0.1)),
    "synchronized, exact statistics": ("synchronized", change(bn=0.1, exact_bn=True)),
    "asynchronous, running statistics": ("asynchronous", change(bn=0.1)),
    "eval, running statistics": ("eval", change(bn=0.1)),
    "synchronized, balanced": ("synchronized", change(bn=0.1, balance=0.5, balance_end=0.1)),
    "asynchronous, balanced": ("asynchronous", change(balance=0.5)),
    "synchronized, noise and group": (
        "synchronized",
        change(input_noise=0.1, restarts=2, group=0.1),
    ),
    "synchronized, combination": (
        "synchronized",
        change(restarts=2, combine=True, combine_every=2),
    ),
    # Boxed pixels are equal only up to rounding after the transform, and anisotropic
    # total variation has a corner there.
    "eval, cosines": ("eval", change(coordinates="dct", box=False)),
    "synchronized, spectral": (
        "synchronized",
        change(
            coordinates="dct", tv=1.0, tv_kind="double-opponents", balance=0.5, balance_end=0.05
        ),
    ),
    "eval, polished": ("eval", change(polish=5)),
}
# Three processes cannot split two asynchronous shards.
BY_THREE = [case for case, (target, _) in CASES.items() if target != "asynchronous"]


def made(name: str) -> tuple[Target, Truth]:
    return make_target(MODELS.get(name, CNN), 5, **TARGETS[name])  # type: ignore[arg-type]


def invert(case: str) -> dict[str, torch.Tensor | float]:
    name, config = CASES[case]
    target, truth = made(name)
    inversion = Inversion(target, truth.labels, config, device=torch.device("cpu"), seed=4)
    found = inversion.run()
    factored = inversion.matcher._factored
    layers = 0 if factored is None else len(factored._layers)
    return {"images": found.images, "objective": found.objective, "factored": layers}


def invert_all(process: Process, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = {case: invert(case) for case in args.cases}
    if process.is_main:
        save_checkpoint(found, Path(args.file))


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict]]:
    folder, found = tmp_path_factory.mktemp("inverted"), {}
    for processes, cases in ((2, list(CASES)), (3, BY_THREE)):
        file = folder / f"{processes}.pt"
        launch(
            invert_all,
            argparse.Namespace(
                cases=cases, file=str(file), cpu=True, gpu=None, nproc_per_node=processes,
                world_size=1, rank=0, dist_url="tcp://127.0.0.1:0", dist_backend="gloo",
                multiprocessing_distributed=True, seed=0,
            ),
        )  # fmt: skip
        found[processes] = load_checkpoint(file)
    return found


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case: str, by_processes: dict[int, dict[str, dict]]) -> None:
    one = invert(case)
    for processes, found in by_processes.items():
        if case not in found:
            assert processes == 3
            continue
        # A difference of two passes amplifies rounding a millionfold.
        tolerance = 1e-4 if "difference" in case else 1e-6
        images = found[case]["images"]
        torch.testing.assert_close(images, one["images"], rtol=0, atol=tolerance)
        assert found[case]["objective"] == pytest.approx(one["objective"], rel=1e-4)
        if "difference" in case:
            assert found[case]["factored"] > 0, "no factors travelled: nothing was compared"
