"""One reader of pictures and one of lists, for every stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.image_files import load_image, read_image
from core.data.list_files import Sample, load_datalist, open_datalist
from core.data.sources import FileSource
from core.errors import InputError

TOP_BRIGHT = np.repeat(np.repeat([[255], [0]], 4, 0), 8, 1).astype(np.uint8)


def pixels(path: Path) -> np.ndarray:
    """What both readers see, which must be the same."""
    read = np.asarray(read_image(path))
    listed = np.asarray(FileSource([path], [0]).image(0))
    side = read.shape[0]
    tensor = load_image(path, side)
    assert read.shape == (side, side, 3)
    np.testing.assert_array_equal(listed, read)
    assert torch.equal(tensor, torch.from_numpy(read.copy()).permute(2, 0, 1).float() / 255)
    return read


def test_eight_bit_colours_are_untouched(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), values)


def test_a_cameras_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(TOP_BRIGHT)
    exif = picture.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png")[..., 0], TOP_BRIGHT[::-1])


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_are_scaled_and_rounded(name: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(tmp_path / name)[..., 1], expected)
    assert pixels(tmp_path / name).max() == 255


def test_floating_point_values_between_zero_and_one(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif")[..., 2], np.round(255 * values))


@pytest.mark.parametrize("values", [[-1024.0, 3071.0], [0.0, float("nan")]])
def test_floating_point_values_of_unknown_range_are_refused(
    values: list[float], tmp_path: Path
) -> None:
    Image.fromarray(np.array([values, values], dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"--data: the image .*x\.tif cannot be read .*floating"):
        FileSource([tmp_path / "x.tif"], [0]).image(0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode: str, tmp_path: Path) -> None:
    alpha = Image.fromarray(TOP_BRIGHT)
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    picture.putalpha(alpha)
    picture.convert(mode).save(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png")[..., 0], 255 - TOP_BRIGHT)


def test_messages_name_what_led_to_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data_root: there is no image .*none\.png"):
        read_image(tmp_path / "none.png", "data_root")
    (tmp_path / "list.json").write_text('{"training": [{"image": "x", "label": "cat"}]}')
    with pytest.raises(InputError, match=r"^dataset_json: .*entry 0 of training"):
        load_datalist(tmp_path / "list.json", "training")
    with pytest.raises(InputError, match=r"^--data: .*entry 0 of training"):
        open_datalist(tmp_path / "list.json", "--data").samples("training")


@pytest.mark.parametrize(
    ("label", "index"), [(2, 2), ([2], 2), ([0, 0, 1], 2), ("2", 2), (2.0, 2), ([1.0, 0.0], 0)]
)
@pytest.mark.parametrize("name", ["testing", "test"])
def test_every_way_to_write_a_label_and_a_section(
    name: str, label: object, index: int, tmp_path: Path
) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({name: [{"image": "x.png", "label": label}]}))
    assert load_datalist(path, "testing") == [Sample("x.png", index)]


@pytest.mark.parametrize("label", [[1, 1], [0, 0], [0.5, 0.5], [], True, -1, 1.5, None, ["a", "b"]])
def test_what_is_no_class_index_is_refused(label: object, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "x.png", "label": label}]}))
    with pytest.raises(InputError, match="no class index"):
        load_datalist(path, "training")
