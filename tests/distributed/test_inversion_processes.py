"""A batch spread over processes is inverted as one process inverts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from attack.loop.inversion import Inversion
from attack.settings import InversionConfig
from core.models.building import ModelSpec
from core.processes.distributed import Process
from core.processes.launch import launch
from core.storage import load_checkpoint, save_checkpoint
from core.target import Target, Truth
from tests.launched import on_cpu
from tests.targets import make_target

CNN = ModelSpec("cnn", 10, 8, width=4)
RESIDUAL = ModelSpec("resnet18", 10, 8, "cifar", width=8)
# Others than the CNN.
MODELS = {
    "residual, synchronized": RESIDUAL,
    "residual, eval": RESIDUAL,
    "transformer": ModelSpec("vit_tiny", 10, 8),
}
BASE = InversionConfig(iterations=8, signed=False, tv=0.01, double=True, hvp="exact")
TARGETS = {
    "synchronized": {"train_mode": True},
    "asynchronous": {"train_mode": True, "shards": (3, 2)},
    "one image apart": {"train_mode": True, "shards": (4, 1)},
    "eval": {},
    "residual, synchronized": {"train_mode": True},
    "residual, eval": {},
    "transformer": {},
}


def change(**fields: object) -> InversionConfig:
    return BASE.changed(**fields)  # type: ignore[arg-type]


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
    "one image apart, contrast": ("one image apart", change(keep_contrast=True, balance=0.5)),
    "eval, polished": ("eval", change(polish=5)),
}
# Three processes cannot split two asynchronous shards.
BY_THREE = [case for case, (target, _) in CASES.items() if "shards" not in TARGETS[target]]


def made(name: str) -> tuple[Target, Truth]:
    return make_target(MODELS.get(name, CNN), 5, **TARGETS[name])  # type: ignore[arg-type]


def make_inversion(case: str) -> tuple[Inversion, Truth]:
    name, config = CASES[case]
    target, truth = made(name)
    return Inversion(target, truth.labels, config, device=torch.device("cpu"), seed=4), truth


def invert(case: str) -> dict[str, torch.Tensor | float]:
    found = make_inversion(case)[0].run()
    return {"images": found.images, "objective": found.objective}


def evaluate(case: str) -> dict[str, torch.Tensor | float]:
    """Value and gradient at given images: the start, one nearby, and near the truth."""
    inversion, truth = make_inversion(case)
    problem, restart = inversion.problem, inversion.restarts[0]
    true = problem.mine(problem.target.data.normalize(truth.images)).to(problem.dtype)
    start = problem.inputs(restart)
    values, gradients = [], []
    for inputs in (start, 0.9 * start, true + 0.01 * start):
        match = inversion.evaluation.match(restart, inputs)
        values.append(match.value.double().reshape(()))
        gradients.append(problem.whole(match.input_gradient))
    factored = inversion.matcher._factored
    layers = 0 if factored is None else len(factored._layers)
    return {"value": torch.stack(values), "gradient": torch.stack(gradients), "factored": layers}


def compute(case: str) -> dict[str, torch.Tensor | float]:
    """A difference of two passes amplifies rounding a millionfold, and iterating does it again
    in every step, by how much depends on the processor: there single evaluations are compared.
    """
    return evaluate(case) if "difference" in case else invert(case)


def invert_all(process: Process, cases: Sequence[str], file: Path) -> None:
    torch.set_num_threads(1)
    found = {case: compute(case) for case in cases}
    if process.is_main:
        save_checkpoint(found, file)


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict]]:
    folder, found = tmp_path_factory.mktemp("inverted"), {}
    for processes, cases in ((2, list(CASES)), (3, BY_THREE)):
        file = folder / f"{processes}.pt"
        launch(invert_all, on_cpu(processes), cases, file)
        found[processes] = load_checkpoint(file)
    return found


def found_by(case: str, by_processes: dict[int, dict[str, dict]]) -> list[dict]:
    """What each number of processes found; three cannot split two shards."""
    assert case in by_processes[2]
    return [found[case] for found in by_processes.values() if case in found]


ITERATED = [case for case in CASES if "difference" not in case]
EVALUATED = [case for case in CASES if "difference" in case]


@pytest.mark.parametrize("case", ITERATED)
def test_as_one_process(case: str, by_processes: dict[int, dict[str, dict]]) -> None:
    one = invert(case)
    for found in found_by(case, by_processes):
        torch.testing.assert_close(found["images"], one["images"], rtol=0, atol=1e-6)
        assert found["objective"] == pytest.approx(one["objective"], rel=1e-4)


@pytest.mark.parametrize("case", EVALUATED)
def test_the_difference_is_that_of_one_process(
    case: str, by_processes: dict[int, dict[str, dict]]
) -> None:
    one = evaluate(case)
    for found in found_by(case, by_processes):
        torch.testing.assert_close(found["value"], one["value"], rtol=1e-9, atol=1e-12)
        for own, whole in zip(found["gradient"], one["gradient"], strict=True):
            assert float((own - whole).norm()) < 1e-5 * float(whole.norm())
        assert found["factored"] > 0, "no factors travelled: nothing was compared"
