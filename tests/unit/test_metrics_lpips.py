"""LPIPS' arithmetic against the published package, without any downloaded weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torchvision

from attack.metrics import LpipsDistance, evaluate, load_lpips
from attack.metrics.perceptual import _BACKBONES
from core.errors import InputError
from core.target import Truth

BACKBONES = ["alex", "vgg"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trunks of torchvision's shape (small random numbers) and heads."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    for backbone, (name, file, _, _) in _BACKBONES.items():
        trunk = torchvision.models.get_model(name, weights=None).features
        torch.save({f"features.{k}": v for k, v in trunk.state_dict().items()}, folder / file)
        channels = [64, 192, 384, 256, 256] if backbone == "alex" else [64, 128, 256, 512, 512]
        heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
        torch.save(heads, folder / f"{backbone}.pth")
    return folder


@pytest.fixture
def weights(made: Path, tmp_path: Path) -> Path:
    """A folder of its own with these files; the trunks are large and shared."""
    trunks = [file for _, file, *_ in _BACKBONES.values()]
    for file in made.iterdir():
        if file.name in trunks:
            (tmp_path / file.name).hardlink_to(file)
        else:
            shutil.copy(file, tmp_path)
    return tmp_path


def published(backbone: str, ours: LpipsDistance) -> torch.nn.Module:
    """The package's network with our backbone and its own published heads."""
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    layers = iter([m for m in ours.features if isinstance(m, torch.nn.Conv2d)])
    for module in theirs.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.load_state_dict(next(layers).state_dict())
    for head, lin in zip(ours.heads, theirs.lins, strict=True):
        lin.model[1].weight.data.copy_(head.view(1, -1, 1, 1))
    return theirs


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_equals_the_package(backbone: str, weights: Path) -> None:
    ours, reason = load_lpips(backbone, weights)
    assert ours is not None
    assert reason is None
    images, originals = torch.rand(3, 3, 40, 36), torch.rand(3, 3, 40, 36)
    expected = published(backbone, ours)(images, originals, normalize=True).flatten()
    torch.testing.assert_close(ours(images, originals), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_heads_come_from_the_package(backbone: str, weights: Path) -> None:
    lpips = pytest.importorskip("lpips")
    (weights / f"{backbone}.pth").unlink()
    ours, _ = load_lpips(backbone, weights)
    assert ours is not None
    theirs = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    for head, lin in zip(ours.heads, theirs.lins, strict=True):
        assert torch.equal(head, lin.model[1].weight.flatten())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_identical_is_zero_and_grey_is_taken(backbone: str, weights: Path) -> None:
    ours, _ = load_lpips(backbone, weights)
    assert ours is not None
    grey = torch.rand(2, 1, 32, 32)
    assert ours(grey, grey).tolist() == [0, 0]
    assert (ours(grey, 1 - grey) > 0).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_smallest_image_is_stated_right(backbone: str, weights: Path) -> None:
    ours, _ = load_lpips(backbone, weights)
    assert ours is not None
    side = ours.min_size
    assert ours(torch.rand(1, 3, side, side), torch.rand(1, 3, side, side)).isfinite().all()
    with pytest.raises(RuntimeError):
        ours(torch.rand(1, 3, side - 1, side - 1), torch.rand(1, 3, side - 1, side - 1))


def test_no_weights_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network, reason = load_lpips("vgg")
    assert network is None
    assert "vgg16-397923af.pth" in str(reason)


def test_found_in_torch_home(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips")
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (weights / _BACKBONES["alex"][1]).rename(folder / _BACKBONES["alex"][1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert load_lpips("alex")[0] is not None


def test_evaluate_uses_it_or_says_why(weights: Path) -> None:
    truth = Truth(torch.rand(2, 3, 24, 24), torch.tensor([0, 1]))
    result = evaluate(truth.images.flip(0), truth.labels, truth, lpips_weights=weights)
    assert result.per_image[0]["lpips_vgg"] == 0
    assert result.per_image[0]["lpips_alex"] is None
    assert "24 px" in result.missing["lpips_alex"]


def test_bad_input_names_the_flag(weights: Path) -> None:
    with pytest.raises(InputError, match="--lpips-weights: there is no folder"):
        load_lpips("alex", weights / "nowhere")
    with pytest.raises(InputError, match="no backbone squeeze"):
        load_lpips("squeeze")
    for backbone in BACKBONES:
        # Shared with the other tests.
        (weights / _BACKBONES[backbone][1]).unlink()
    (weights / _BACKBONES["alex"][1]).write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="--lpips-weights"):
        load_lpips("alex", weights)
    torch.save({"features.0.weight": torch.zeros(1)}, weights / _BACKBONES["vgg"][1])
    with pytest.raises(InputError, match="does not hold the weights of vgg16"):
        load_lpips("vgg", weights)


def test_heads_of_another_network_are_refused(weights: Path) -> None:
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, weights / "vgg.pth")
    with pytest.raises(InputError, match="linear heads"):
        load_lpips("vgg", weights)
