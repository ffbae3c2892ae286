"""Pictures are whole PNG files that show what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attack.metrics import evaluate
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.pictures import (
    image_grid,
    read_image,
    save_comparison,
    save_curve,
    save_gallery,
    save_images,
)
from core.target import Truth


def pixels(path: Path) -> np.ndarray:
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file is left"
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(picture.astype(int) - colour).max(-1) <= 2).mean())


def flat(colour: tuple[float, float, float], n: int = 1) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(n, 3, 8, 8)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_comparison_shows_both_rows(tmp_path: Path, n: int) -> None:
    path = tmp_path / "grid.png"
    save_comparison(path, flat((1, 0, 0), n), flat((0, 0, 1), n), columns=4)
    picture = pixels(path)
    red, blue = share_of(picture, (255, 0, 0)), share_of(picture, (0, 0, 255))
    assert red == pytest.approx(blue, rel=0.1)
    assert red > 0.05
    first_red = np.argwhere((picture == (255, 0, 0)).all(-1))[:, 0].min()
    first_blue = np.argwhere((picture == (0, 0, 255)).all(-1))[:, 0].min()
    assert first_red < first_blue


def test_scores_and_title_are_drawn(tmp_path: Path) -> None:
    truth = Truth(torch.rand(2, 1, 12, 12), torch.tensor([0, 1]))
    scores = evaluate(truth.images, None, truth).per_image
    plain, scored = tmp_path / "a" / "plain.png", tmp_path / "b" / "scored.png"
    save_comparison(plain, truth.images, truth.images)
    save_comparison(scored, truth.images, truth.images, scores, title="exact")
    assert share_of(pixels(scored), (0, 0, 0)) > share_of(pixels(plain), (0, 0, 0))


def test_only_so_many_are_shown(tmp_path: Path) -> None:
    few, many = tmp_path / "a" / "few.png", tmp_path / "b" / "many.png"
    save_comparison(few, flat((1, 0, 0), 4), flat((0, 0, 1), 4))
    save_comparison(many, flat((1, 0, 0), 40), flat((0, 0, 1), 40), max_images=4)
    assert pixels(few).shape[1] == pixels(many).shape[1]


def test_broken_pixels_do_not_break_the_picture(tmp_path: Path) -> None:
    images = torch.full((1, 3, 8, 8), float("nan"))
    save_images(tmp_path / "nan.png", images)
    assert share_of(pixels(tmp_path / "nan.png"), (127, 127, 127)) > 0.1


def test_different_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="side by side"):
        save_comparison(tmp_path / "x.png", flat((1, 0, 0), 2), flat((0, 0, 1), 3))
    assert not list(tmp_path.iterdir())


def test_curve_with_and_without_psnr(tmp_path: Path) -> None:
    trace = [{"iteration": i, "objective": 0.5**i, "psnr": 5.0 + i} for i in range(9)]
    save_curve(tmp_path / "a" / "both.png", trace, title="run")
    red = (214, 39, 40)
    assert share_of(pixels(tmp_path / "a" / "both.png"), red) > 0
    blind = [{"iteration": e["iteration"], "objective": e["objective"]} for e in trace]
    save_curve(tmp_path / "b" / "one.png", [*blind, {"iteration": 9, "objective": float("nan")}])
    assert share_of(pixels(tmp_path / "b" / "one.png"), red) == 0


def test_an_empty_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finite objective"):
        save_curve(tmp_path / "x.png", [{"iteration": 0, "objective": float("inf")}])


def test_pyplot_is_not_touched(tmp_path: Path) -> None:
    save_images(tmp_path / "x.png", flat((1, 0, 0)))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_gallery_has_a_row_per_attack(tmp_path: Path) -> None:
    red, blue = flat((1, 0, 0), 3), flat((0, 0, 1), 3)
    path = tmp_path / "gallery.png"
    captions = {"attack": ["1 dB", "2 dB", "3 dB"]}
    save_gallery(path, {"original": list(red), "attack": list(blue)}, captions)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    half = len(pixels) // 2
    assert (pixels[:half] == (255, 0, 0)).all(-1).any()
    assert not (pixels[half:] == (255, 0, 0)).all(-1).any()
    assert (pixels[half:] == (0, 0, 255)).all(-1).any()
    with pytest.raises(InputError, match="equally many"):
        save_gallery(path, {"original": list(red), "attack": list(blue[:2])})


SHAPES = {"row": (12,), "signal": (2, 40), "grey": (1, 9, 9), "volume": (1, 6, 9, 9)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    samples = 7 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    truth = Truth(samples, torch.tensor([0, 1, 2]))
    scores = evaluate(samples.flip(0), None, truth).per_image
    save_comparison(tmp_path / "a" / "pair.png", samples, samples.flip(0), scores)
    save_images(tmp_path / "b" / "grid.png", samples)
    save_gallery(tmp_path / "c" / "rows.png", {"original": list(samples), "found": list(samples)})
    for path in tmp_path.glob("*/*.png"):
        # More than a blank page.
        assert len(np.unique(pixels(path).reshape(-1, 3), axis=0)) > 8


def test_a_volume_is_a_row_of_its_slices(tmp_path: Path) -> None:
    grey = [0.0, 0.2, 0.4, 0.6, 0.8]
    # Ten slices, in pairs of one grey value each.
    volume = torch.tensor(grey).repeat_interleave(2).view(1, 1, 10, 1, 1).expand(1, 1, 10, 8, 8)
    save_images(tmp_path / "volume.png", volume)
    picture = pixels(tmp_path / "volume.png")
    places = []
    for value in grey:
        level = round(255 * value)
        columns = np.argwhere((np.abs(picture.astype(int) - level).max(-1) <= 1).sum(0) > 20)
        assert len(columns), f"no slice of grey {level}"
        places.append(float(columns.mean()))
    assert places == sorted(places)


def test_a_reconstruction_is_drawn_on_the_scale_of_its_original(tmp_path: Path) -> None:
    original = torch.tensor([[0.0, 10.0, 0.0, 10.0]])
    yellow, violet = (253, 231, 36), (68, 1, 84)
    for name, factor in (("a", 1.0), ("b", 0.0)):
        save_comparison(tmp_path / name / "pair.png", original, factor * original)
    both, first = (pixels(tmp_path / name / "pair.png") for name in ("a", "b"))
    # Without its own scale, a row of zeros is all of the darkest colour.
    assert share_of(first, yellow) == pytest.approx(share_of(both, yellow) / 2, rel=0.1)
    assert share_of(first, violet) == pytest.approx(1.5 * share_of(both, violet), rel=0.1)


def test_a_signal_is_one_line_per_channel() -> None:
    figure = image_grid(torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)), [4, 5])
    assert [len(axis.lines) for axis in figure.axes] == [3, 3]
    assert [axis.get_title() for axis in figure.axes] == ["4", "5"]


def test_images_outside_the_unit_range_keep_their_contrast(tmp_path: Path) -> None:
    low, high = torch.full((1, 1, 8, 8), -1000.0), torch.full((1, 1, 8, 8), 1000.0)
    save_images(tmp_path / "units.png", torch.cat([low, high], dim=-1))
    picture = pixels(tmp_path / "units.png")
    assert share_of(picture, (0, 0, 0)) > 0.1


def test_an_image_for_a_target_of_volumes_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path / "x.png", flat((1, 0, 0)))
    with pytest.raises(InputError, match=r"--prior .*: an image does not fit .* 1 x 8 x 8 x 8"):
        read_image(tmp_path / "x.png", (1, 8, 8, 8), "--prior")


def test_a_reconstruction_of_any_shape_plots_itself() -> None:
    for shape in SHAPES.values():
        found = Reconstruction(torch.rand(2, *shape), torch.tensor([3, 1]), 0.1)
        assert "<img" in found._repr_html_()
    several = Reconstruction(torch.rand(2, 12), torch.rand(2, 4), 0.1)
    assert "labels of shape 2 x 4" in repr(several)
    assert len(several.plot().axes) == 2
