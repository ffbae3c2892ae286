"""Data lists, images and the embedded phantoms."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.image_files import load_image
from core.data.list_files import Sample, load_datalist, write_datalist
from core.data.listed_images import ImageListDataset
from core.errors import InputError
from core.models.building import build_model
from federated.experiment.cli.make_phantoms import main as make_phantoms_command
from federated.flare.images import chest_spec
from federated.flare.networks import network_spec
from federated.phantoms.anatomy import chest_radiograph
from federated.phantoms.data_set import (
    BATCH_SIZES,
    SITE_SIZES,
    cached_phantoms,
    make_phantoms,
    phantom_sizes,
)


def test_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    samples = [Sample("a/b.png", 0), Sample("c.png", 1)]
    write_datalist(tmp_path / "list.json", {"training": samples, "testing": []})
    assert load_datalist(tmp_path / "list.json", "training") == samples
    assert load_datalist(tmp_path / "list.json", "testing") == []


def test_published_list_has_labels_in_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "x.png", "label": [1]}]}))
    assert load_datalist(path, "training") == [Sample("x.png", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("{", "is not JSON"),
        ("[]", "JSON list"),
        ('{"validation": []}', 'has no "training" list; it has validation'),
        ('{"training": [{"label": 1}]}', "entry 0 of training has no image path"),
        ('{"training": [{"image": "x", "label": "cat"}]}', "label 'cat'"),
        ('{"training": [{"image": "x", "label": [1, 1]}]}', "entry 0"),
        ('{"training": [{"image": "x", "label": []}]}', "entry 0"),
        ('{"training": [{"image": "x", "label": -1}]}', "label -1"),
        ('{"training": [{"image": "x", "label": true}]}', "True"),
    ],
)
def test_broken_list_is_one_clear_sentence(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_datalist(path, "training")
    assert str(path) in str(caught.value)


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_images_are_the_right_way_up(tmp_path: Path) -> None:
    grey = np.zeros((16, 16), np.uint8)
    grey[:4] = 255  # A bright top.
    for name in ("grey.png", "colour.png", "colour.jpg"):
        values = grey if "grey" in name else np.repeat(grey[..., None], 3, 2)
        image = load_image(save(tmp_path / name, values), 16)
        assert image.shape == (3, 16, 16)
        assert image[:, :3].min() > 0.9
        assert image[:, 6:].max() < 0.1


def test_sixteen_bit_image_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = load_image(save(tmp_path / "deep.png", ramp), 8)
    assert torch.allclose(image[0].flatten(), torch.linspace(0, 1, 64), atol=0.01)


def test_missing_or_broken_image_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("none.png", "text.png"):
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name, 8)


def test_dataset_normalises_and_keeps_a_share_in_memory(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / f"{k}.png", np.full((8, 8), 60 * k, np.uint8))
    spec = chest_spec(8)
    samples = [Sample(f"{k}.png", k % 2) for k in range(4)]
    data = ImageListDataset(tmp_path, samples, 8, spec, cache_rate=0.5)
    first = [data[k] for k in range(4)]
    assert torch.allclose(spec.denormalize(first[2][0][None]), torch.full((1, 3, 8, 8), 120 / 255))
    assert data.labels().tolist() == [0, 1, 0, 1]
    for name in ("0.png", "1.png"):
        os.remove(tmp_path / name)
    assert torch.equal(data[1][0], first[1][0])
    os.remove(tmp_path / "3.png")
    with pytest.raises(InputError, match=r"3\.png"):
        data[3]


def test_networks_are_torchvisions_or_the_small_victim() -> None:
    assert network_spec("cnn", 2, 32).stem == "cifar"
    resnet = build_model(network_spec("resnet18", 2, 224))
    names = resnet.state_dict()
    assert "layer1.0.bn1.running_mean" in names
    assert names["conv1.weight"].shape[-1] == 7
    for arguments in (("resnet1", 2, 32), ("cnn", 1, 32), ("cnn", 2, 4)):
        with pytest.raises(InputError):
            network_spec(*arguments)


def test_sizes_are_the_published_ones() -> None:
    full = phantom_sizes(1.0)
    assert list(full.sites.values()) == [8, 32, 128, 512, 8, 32, 128, 512, 1]
    assert sum(full.sites.values()) == 1361
    assert (full.validation, full.testing) == (200, 1382)
    assert BATCH_SIZES.keys() == SITE_SIZES.keys()
    small = phantom_sizes(0.05)
    assert [small.sites[s] for s in (1, 5, 9)] == [8, 8, 1]
    assert sum(small.sites.values()) < 120
    for scale in (0, 1.5):
        with pytest.raises(InputError, match="--scale"):
            phantom_sizes(scale)


def test_phantoms_are_deterministic_and_complete(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "a", scale=0.02, size=16, seed=3)
    make_phantoms(tmp_path / "b", scale=0.02, size=16, seed=3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.*"))
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    lists = [tmp_path / "a" / f"data_200val+rest_client{n}.json" for n in range(1, 10)]
    training = [sample.image for path in lists for sample in load_datalist(path, "training")]
    common = [
        s.image for section in ("validation", "testing") for s in load_datalist(lists[0], section)
    ]
    everything = training + common
    assert len(set(everything)) == len(everything)
    assert all((tmp_path / "a" / name).is_file() for name in everything)
    validation = load_datalist(lists[0], "validation")
    assert load_datalist(lists[8], "validation") == validation
    mean = ImageListDataset(tmp_path / "a", validation, 16).images().mean(0)
    prior = load_image(tmp_path / "a" / "prior.png", 16)
    assert torch.allclose(prior, mean, atol=1 / 255)


def test_patients_differ_more_than_noise() -> None:
    drawn = [chest_radiograph(32, False, np.random.default_rng([0, k])) for k in range(40)]
    images = torch.from_numpy(np.stack(drawn)).float().div(255).flatten(1)
    distances = torch.cdist(images, images)[~torch.eye(len(images), dtype=torch.bool)]
    # The detector's noise alone would be below 0.02 per pixel.
    assert distances.min() / images.shape[1] ** 0.5 > 0.04


def test_cache_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADINVBENCH_CACHE", str(tmp_path))
    folder = cached_phantoms(scale=0.02, size=16, seed=1)
    stamp = (folder / "prior.png").stat().st_mtime_ns
    assert cached_phantoms(scale=0.02, size=16, seed=1) == folder
    assert (folder / "prior.png").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_command_reports_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--scale", "0.02", "--size", "16"]
    assert make_phantoms_command(arguments) == 0
    assert "data_200val+rest_client" in capsys.readouterr().out
    assert make_phantoms_command(["--output", str(tmp_path), "--scale", "7"]) == 2
    assert "--scale 7" in capsys.readouterr().err


@pytest.mark.slow
def test_small_network_learns_the_phantoms() -> None:
    drawn = [chest_radiograph(32, bool(k % 2), np.random.default_rng([0, k])) for k in range(900)]
    grey = torch.from_numpy(np.stack(drawn)).float().div(255)[:, None].repeat(1, 3, 1, 1)
    inputs, labels = chest_spec(32).normalize(grey), torch.arange(900) % 2
    torch.manual_seed(0)
    model = build_model(network_spec("cnn", 2, 32))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for _ in range(7):
        for batch in torch.randperm(650).split(16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(inputs[650:]).argmax(1) == labels[650:]).float().mean()
    assert accuracy > 0.85
