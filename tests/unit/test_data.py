"""Folders, lists and built-in names become data sets; mistakes become sentences."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.data.data_sets import load_data, take_samples
from core.data.sources import FileSource
from core.data.specs import DataSpec
from core.errors import InputError
from tests.image_folders import write_image, write_tree


def test_train_and_val_folders(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", classes=3, per_class=5)
    write_tree(tmp_path / "val", classes=2, per_class=2)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val)) == (15, 4)
    assert data.spec.n_classes == 3
    assert data.spec.class_names == ("class0", "class1", "class2")
    assert data.spec.shape == (3, 8, 8)
    # The train folder itself, as in the published command lines, finds its sibling.
    assert len(load_data(tmp_path / "train").val) == 4


def test_single_tree_holds_out_a_seeded_share_of_every_class(tmp_path: Path) -> None:
    write_tree(tmp_path, classes=2, per_class=10)
    first, again = load_data(tmp_path), load_data(tmp_path, seed=5)
    other = load_data(tmp_path, split_seed=1)
    assert list(first.val.labels) == [0, 0, 1, 1]
    paths = [set(d.val.source.paths) for d in (first, again, other)]  # type: ignore[attr-defined]
    assert paths[0] == paths[1] != paths[2]
    assert not paths[0] & set(first.train.source.paths)  # type: ignore[attr-defined]


def test_augmentation_depends_on_seed_epoch_and_image_only(tmp_path: Path) -> None:
    write_tree(tmp_path, side=16)
    data, other_seed = load_data(tmp_path), load_data(tmp_path, seed=1)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = data.train[(0, 3)][0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(data.train[(0, 3)][0], first)
    assert not torch.equal(data.train[(1, 3)][0], first)
    assert not torch.equal(other_seed.train[(0, 3)][0], first)
    plain = data.train_plain
    assert torch.equal(plain[3][0], plain[3][0])
    assert not torch.equal(plain[3][0], first)


@pytest.mark.parametrize("side", [8, 120])
def test_sizes_and_range(tmp_path: Path, side: int) -> None:
    write_tree(tmp_path, side=side)
    data = load_data(tmp_path, image_size=None if side == 8 else 64)
    assert data.spec.shape[1] == (8 if side == 8 else 64)
    for part in (data.train, data.train_plain, data.val):
        assert part[0][0].shape == data.spec.shape
    images, labels = take_samples(data.train_plain, [0, 9], data.spec)
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.tolist() == [0, 1]


def test_plain_sample_is_the_file(tmp_path: Path) -> None:
    from PIL import Image

    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val")
    data = load_data(tmp_path)
    images, _ = take_samples(data.train_plain, [2], data.spec)
    pixels = np.asarray(Image.open(tmp_path / "train" / "class0" / "002.png"))
    np.testing.assert_allclose(images[0].permute(1, 2, 0) * 255, pixels, atol=1e-3)


def test_sixteen_bit_greys_keep_their_contrast(tmp_path: Path) -> None:
    from PIL import Image

    write_tree(tmp_path)
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(ramp).save(tmp_path / "class0" / "000.png")
    data = load_data(tmp_path)
    source = next(
        s for s in (data.train.source, data.val.source)
        if tmp_path / "class0" / "000.png" in s.paths  # type: ignore[attr-defined]
    )  # fmt: skip
    pixels = np.asarray(source.image(0))
    np.testing.assert_array_equal(pixels[..., 0], np.round(ramp * (255 / 65535)))


def test_an_image_that_claims_gigabytes_is_refused_by_name(tmp_path: Path) -> None:
    write_image(tmp_path / "bomb.png", 0)
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read .*exceeds limit"):
        FileSource([tmp_path / "bomb.png"], [0]).image(0)


def test_json_list(tmp_path: Path) -> None:
    for index in range(6):
        write_image(tmp_path / "images" / f"{index}.png", index)
    entries = [{"image": f"images/{i}.png", "label": i % 2} for i in range(6)]
    content = {"labels": {"0": "healthy", "1": "ill"}, "training": entries[:4]}
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content | {"validation": entries[4:]}))
    data = load_data(path)
    assert (len(data.train), len(data.val)) == (4, 2)
    assert data.spec.class_names == ("healthy", "ill")
    # One-hot labels, another root, and a held-out split.
    one_hot = [{"image": e["image"], "label": [1 - e["label"], e["label"]]} for e in entries]
    elsewhere = tmp_path / "lists" / "list.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps({"training": one_hot}))
    data = load_data(elsewhere, root=tmp_path)
    assert (len(data.train), len(data.val)) == (4, 2)


def test_torchvision_format(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 4)):
        images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 2051, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(n, dtype=np.uint8)
        header = struct.pack(">II", 2049, n)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    for data in (
        load_data("fashionmnist", root=tmp_path),
        load_data(tmp_path, name="fashionmnist"),
    ):
        assert data.spec.name == "fashionmnist"
        assert (len(data.train), len(data.val), data.spec.n_classes) == (6, 4, 10)
        assert data.train[(0, 0)][0].shape == (3, 28, 28)


def test_named_folder_of_classes_is_read_as_a_folder(tmp_path: Path) -> None:
    write_tree(tmp_path)
    data = load_data(tmp_path, name="cifar10")
    assert data.spec.n_classes == 2
    assert data.spec.mean == (0.4914, 0.4822, 0.4465)


def test_spec_round_trip() -> None:
    spec = DataSpec("x", (3, 8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2, ("a", "b"))
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(spec.denormalize(spec.normalize(images)), images)
    with pytest.raises(InputError, match="broken"):
        DataSpec.from_dict({"name": "x"})


def empty(folder: Path) -> Path:
    return folder


def one_class(folder: Path) -> Path:
    return write_tree(folder, classes=1)


def single_image_class(folder: Path) -> Path:
    write_tree(folder)
    write_image(folder / "lonely" / "0.png", 0)
    return folder


def foreign_val_class(folder: Path) -> Path:
    write_tree(folder / "train")
    write_tree(folder / "val", classes=3)
    return folder


def empty_val(folder: Path) -> Path:
    write_tree(folder / "train")
    (folder / "val").mkdir()
    return folder


def broken_json(folder: Path) -> Path:
    (folder / "list.json").write_text("{")
    return folder / "list.json"


def json_without_training(folder: Path) -> Path:
    (folder / "list.json").write_text("{}")
    return folder / "list.json"


def json_missing_image(folder: Path) -> Path:
    content = {"training": [{"image": "no.png", "label": 0}]}
    (folder / "list.json").write_text(json.dumps(content))
    return folder / "list.json"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "there is no folder"),
        (lambda folder: folder / "nowhere.json", "there is no file"),
        (lambda folder: "cifar10", "--data-root"),
        (a_file, "is not a folder"),
        (empty, "no class folders with images"),
        (one_class, "at least two"),
        (single_image_class, "single image"),
        (foreign_val_class, "class2 that the training data lacks"),
        (empty_val, "holds no images"),
        (broken_json, "is not JSON"),
        (json_without_training, 'no "training" list'),
        (json_missing_image, "does not exist"),
    ],
)
def test_mistakes(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_data(make(tmp_path))


def test_more_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchvision's format"):
        load_data("svhn", root=tmp_path)
    with pytest.raises(InputError, match="--image-size 4"):
        load_data(write_tree(tmp_path), image_size=4)
    data = load_data(tmp_path)
    with pytest.raises(InputError, match="image 100 does not exist"):
        take_samples(data.train_plain, [100], data.spec)
    (tmp_path / "class0" / "000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"000\.png cannot be read"):
        load_data(tmp_path)


@pytest.mark.parametrize("damage", ["label", "labels", "flat", "missing"])
def test_a_damaged_torchvision_format(tmp_path: Path, damage: str) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, 4, 2, 2)
        if damage == "flat":
            header = struct.pack(">IIIII", 2052, 4, 2, 2, 1)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(16))
        n = 3 if damage == "labels" else 4
        labels = bytes([200 if damage == "label" else 1] * n)
        if damage != "missing":
            path = raw / f"{part}-labels-idx1-ubyte"
            path.write_bytes(struct.pack(">II", 2049, n) + labels)
    with pytest.raises(InputError, match=r"^--data fashionmnist: .*torchvision's format"):
        load_data("fashionmnist", root=tmp_path)
