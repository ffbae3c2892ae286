"""What several processes share is what one process shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.data.specs import DataSpec
from core.models.building import ModelSpec, build_model
from core.processes.distributed import Process
from core.processes.launch import launch
from core.target import LocalTraining, Target
from gradients.checkpoint import load_target as load
from gradients.checkpoint import save_target
from gradients.client import ClientSettings, share_update
from gradients.private_gradient import PrivacySettings
from tests.launched import on_cpu

SMALL = ModelSpec("cnn", n_classes=5, image_size=12, width=4)
RESIDUAL = ModelSpec("resnet18", n_classes=5, image_size=16, stem="cifar", width=4)
DROPOUT = ModelSpec("mobilenet_v2", n_classes=5, image_size=32)
LABELS = torch.tensor([0, 1, 2, 3, 4, 4, 2])


SETTINGS = {
    "synchronized": ClientSettings(synchronized=True),
    "synchronized, uneven": ClientSettings(synchronized=True, shards=(5, 2)),
    "asynchronous": ClientSettings(),
    "asynchronous, uneven": ClientSettings(shards=(5, 2)),
    "several synchronized steps": ClientSettings(
        synchronized=True, local=LocalTraining(epochs=2, batches=2, lr=0.05, momentum=0.9)
    ),
    "several asynchronous steps": ClientSettings(
        local=LocalTraining(epochs=3, lr=0.05, weight_decay=0.01), shards=(4, 3)
    ),
    "paper's clipping": ClientSettings(
        synchronized=True, privacy=PrivacySettings(0.1, 0.5, "batch")
    ),
    "eval mode, per-sample clipping": ClientSettings(
        train_mode=False, privacy=PrivacySettings(0.1, 0.5)
    ),
    "residual network in float64, synchronized": ClientSettings(synchronized=True),
    "residual network in float64, asynchronous": ClientSettings(),
    "dropout in float64": ClientSettings(dropout_seed=3),
}


def _model_of(name: str) -> ModelSpec:
    return RESIDUAL if "residual" in name else DROPOUT if "dropout" in name else SMALL


def _share(name: str, settings: ClientSettings, process: Process | None = None) -> Target | None:
    spec = _model_of(name)
    data = DataSpec("noise", (3, *(spec.image_size,) * 2), (0.5,) * 3, (0.25,) * 3, 5)
    torch.manual_seed(3)
    model = build_model(spec)
    if "float64" in name:
        # Without rounding, no activation changes sign between the two computations.
        model = model.double()
    images = torch.rand(len(LABELS), *data.shape)
    return share_update(model, spec, data, images, LABELS, settings, process)


def _share_all(process: Process, folder: Path) -> None:
    for name, settings in SETTINGS.items():
        target = _share(name, settings, process)
        if target is not None:
            save_target(folder / name, target)


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    launch(_share_all, on_cpu(2), folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_share_what_one_shares(name: str, by_two_processes: Path) -> None:
    two, _ = load(by_two_processes / name)
    settings = SETTINGS[name]
    if not settings.synchronized:
        # One process plays both: its groups are the other's processes.
        settings = ClientSettings(**{**vars(settings), "shards": two.shards})
    one = _share(name, settings)
    assert one is not None
    assert len(two.shards) == 2
    assert sum(two.shards) == 7
    tolerance = 1e-10 if "float64" in name else 1e-5
    # Biases before MobileNet's BatchNorm have no gradient but rounding, 1e-12.
    _assert_same(two, one, tolerance, least=1e-11 if "dropout" in name else 0.0)


def _assert_same(two: Target, one: Target, tolerance: float, least: float = 0.0) -> None:
    for key, gradient in one.gradient.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            two.gradient[key], gradient, rtol=tolerance, atol=max(tolerance * scale, least)
        )
    assert (two.running_after or {}).keys() == (one.running_after or {}).keys()
    for name, value in (one.running_after or {}).items():
        shared = (two.running_after or {})[name]
        torch.testing.assert_close(shared, value, rtol=tolerance, atol=1e-6)
    assert (two.bn_statistics is None) == (one.bn_statistics is None)
    for got, expected in zip(two.bn_statistics or (), one.bn_statistics or (), strict=True):
        for layer in expected:
            torch.testing.assert_close(got[layer], expected[layer], rtol=tolerance, atol=1e-6)


def test_asynchronous_statistics_are_stored_per_process(by_two_processes: Path) -> None:
    target, _ = load(by_two_processes / "asynchronous, uneven")
    assert target.bn_statistics is not None
    assert len(target.bn_statistics) == 2
    first, second = target.bn_statistics
    assert not torch.allclose(first["bn1"][0], second["bn1"][0])


def test_synchronized_and_asynchronous_updates_differ(by_two_processes: Path) -> None:
    synchronized, _ = load(by_two_processes / "synchronized")
    asynchronous, _ = load(by_two_processes / "asynchronous")
    difference = synchronized.gradient["conv1.weight"] - asynchronous.gradient["conv1.weight"]
    assert difference.norm() > 1e-2 * synchronized.gradient["conv1.weight"].norm()
