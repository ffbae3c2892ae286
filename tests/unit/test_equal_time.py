"""Attacks compared at equal processor time."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.speed import equal_time
from benchmarks.speed.equal_time import main, recorded_rows
from benchmarks.speed.equal_time_report import render_summary
from core.errors import InputError
from core.models.building import ModelSpec
from gradients.checkpoint import save_target
from tests.targets import make_target


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    target, truth = make_target(ModelSpec("lenet", 10, 8, width=4), 2, double=False)
    path = tmp_path / "small-checkpoint.pth.tar"
    save_target(path, target, truth)
    return path


def test_every_attack_gets_its_time_and_is_recorded(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    attacks = "spectral,inverting-gradients"
    main([str(checkpoint), "--attacks", attacks, "--seconds", "1", "--output", str(output)])
    rows = json.loads((output / "record.json").read_text())["rows"]
    assert [row["attack"] for row in rows] == attacks.split(",")
    for row in rows:
        assert row["iterations"] > 1
        # A budget, not a promise: the cost per iteration is estimated from a few.
        assert 0.2 < row["cpu_seconds"] < 5
        assert len(row["evaluation"]["per_image"]) == 2
    table = (output / "table.md").read_text()
    assert table.count("| small | eval | 2 |") == 2
    assert {path.name for path in output.glob("*.png")} == {"small.png", "gallery.png"}
    # Two images, and an original with two reconstructions each.
    picture = Image.open(output / "small.png")
    assert picture.height > picture.width


def test_a_clock_that_errs_does_not_buy_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    per_iteration, overhead, clock = 0.01, 0.2, [0.0]
    runs: list[int] = []

    def run(iterations: int) -> None:
        runs.append(iterations)
        clock[0] += overhead + per_iteration * iterations
        if iterations == 6:
            clock[0] += 0.1  # Something else ran.

    monkeypatch.setattr("time.process_time", lambda: clock[0])
    assert equal_time._affordable(run, 10) == pytest.approx((10 - overhead) / per_iteration, 0.05)
    assert max(runs) <= 48
    # Nothing seems to take longer, however often it is done.
    monkeypatch.setattr("time.process_time", iter(range(100)).__next__)
    assert equal_time._affordable(lambda iterations: None, 10) < 20_000


def test_a_grid_is_made_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", "lenet:4", "--batches", "1,2", "--seconds", "0.5", "--attacks", "spectral"]
    words += ["--data", "photo-patches", "--output", str(tmp_path)]
    main(words)
    names = [row["checkpoint"] for row in recorded_rows(tmp_path)]
    assert names == ["photo-patches_lenet-4_b1_i0.tar", "photo-patches_lenet-4_b2_i0.tar"]
    fresh: list[str] = []

    def instead(path: str, attack: str, *rest: object) -> dict[str, object]:
        fresh.append(Path(path).name)
        return {**recorded_rows(tmp_path)[0], "checkpoint": fresh[-1]}

    monkeypatch.setattr(equal_time, "compare", instead)
    main([*words, "--images", "0,1"])
    assert fresh == [name.replace("i0", "i1") for name in names]
    assert "| best in SSIM |" in capsys.readouterr().out


def test_the_summary_shows_means_and_counts_who_is_best() -> None:
    def row(attack: str, target: str, psnr: float, ssim: float, seed: int = 0) -> dict[str, object]:
        summary = {"psnr": {"mean": psnr}, "ssim": {"mean": ssim}}
        return {
            "attack": attack,
            "checkpoint": f"{target}.tar",
            "seed": seed,
            "evaluation": {"summary": summary},
        }

    rows = [
        row("a", "x_b1_i0", 20, 0.5),
        row("b", "x_b1_i0", 18, 0.6),
        row("a", "x_b1_i1", 10, 0.3, seed=1),
        row("b", "x_b1_i1", 9, 0.1, seed=1),
        row("a", "x_b4_i0", 9, 0.1),
    ]
    lines = render_summary(rows).splitlines()
    # A target that one attack alone has seen is in no mean and has no best one.
    assert lines[2:5] == [
        "| x_b1 | 2 | 15.00 / 0.400 | 13.50 / 0.350 |",
        "| best in PSNR | 3 | 2 | 0 |",
        "| best in SSIM | 3 | 1 | 1 |",
    ]
    assert "| x_b1_i1, seed 1 | 10.00 / 0.300 | 9.00 / 0.100 |" in lines
    assert "| x_b4_i0 | 9.00 / 0.100 | – |" in lines


def test_a_missing_package_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "breaching", None)
    with pytest.raises(InputError, match="needs `pip install breaching`"):
        main([str(checkpoint), "--attacks", "breaching:modern", "--seconds", "1"])


def test_without_truth_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    target, _ = make_target(ModelSpec("lenet", 10, 8, width=4), 1, double=False)
    path = tmp_path / "stripped.tar"
    save_target(path, target)
    with pytest.raises(InputError, match="holds no true images"):
        main([str(path)])
