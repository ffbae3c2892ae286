"""Figures that every room draws on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from core.figures import blank_figure, legend_beside, save_figure, subplots


def test_a_figure_is_saved_for_screens_and_for_papers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure, axes = subplots(1, 2, 2.0, 1.5)
        assert axes.shape == (1, 2)
        save_figure(figure, tmp_path / "new" / f"{name}.png", dpi=50, pdf=True)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size == (200, 75)
    first, second = ((tmp_path / "new" / f"{name}.pdf").read_bytes() for name in ("a", "b"))
    assert first.startswith(b"%PDF")
    assert first == second


@pytest.mark.parametrize("constrained", [True, False])
def test_empty_margins_are_cut_off_where_asked_for(tmp_path: Path, constrained: bool) -> None:
    figure = blank_figure(4.0, 4.0, constrained=constrained, dpi=50)
    figure.text(0.5, 0.5, "small")
    sizes = []
    for tight in (False, True):
        save_figure(figure, tmp_path / "a.png", tight=tight)
        with Image.open(tmp_path / "a.png") as picture:
            sizes.append(picture.size)
    assert sizes[0] == (200, 200)
    assert max(sizes[1]) < 100
    assert not (tmp_path / "a.pdf").exists()


@pytest.mark.parametrize("entries", [3, 30, 60])
def test_a_legend_beside_the_panels_is_seen_whole(entries: int) -> None:
    figure, axes = subplots(1, 1, 7.2, 4.2)
    for number in range(entries):
        axes[0][0].errorbar(number, number, yerr=1, fmt="o", label=f"defense {number}")
    legend_beside(figure)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.y0 <= box.y0
    assert box.y1 <= figure.bbox.y1
    assert len(legend.get_texts()) == entries
    assert bool(figure.get_figheight() > 4.2) is (entries > 3)
