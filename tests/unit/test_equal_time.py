"""Attacks compared at equal processor time."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.speed import equal_time
from benchmarks.speed.equal_time import main, recorded_rows
from benchmarks.speed.equal_time_cases import CASES, Source, find_cases, make_cases
from benchmarks.speed.equal_time_report import render_summary
from benchmarks.speed.equal_time_runs import affordable
from core.errors import InputError
from core.models.building import ModelSpec
from gradients.checkpoint import load_target, save_target
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
        # Looked at on the way, in the order of time, and at last what the evaluation says.
        moments = [seconds for seconds, _, _ in row["course"]]
        # How many depends on how the iterations that fit are divided among the attack's phases.
        assert len(moments) >= min(10, row["iterations"] // 2)
        assert moments == sorted(moments)
        assert moments[-1] <= row["cpu_seconds"]
        assert max(psnr for _, psnr, _ in row["course"]) > 0
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
    assert affordable(run, 10) == pytest.approx((10 - overhead) / per_iteration, 0.05)
    assert max(runs) <= 48
    # Nothing seems to take longer, however often it is done.
    monkeypatch.setattr("time.process_time", iter(range(100)).__next__)
    assert affordable(lambda iterations: None, 10) < 20_000


def test_a_grid_is_made_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--models", "lenet:4", "--batches", "1,2", "--seconds", "0.5", "--attacks", "spectral"]
    words += ["--data", "photo-patches", "--output", str(tmp_path)]
    main(words)
    names = [row["checkpoint"] for row in recorded_rows(tmp_path)]
    assert names == ["photo-patches_lenet-4_b1_i0.tar", "photo-patches_lenet-4_b2_i0.tar"]
    fresh: list[str] = []

    seeds: list[object] = []

    def instead(path: Path, attack: str, *rest: object) -> dict[str, object]:
        fresh.append(path.name)
        seeds.append(rest[3])
        return {**recorded_rows(tmp_path)[0], "checkpoint": fresh[-1], "seed": rest[3]}

    monkeypatch.setattr(equal_time, "compare", instead)
    main([*words, "--images", "0,1"])
    assert fresh == [name.replace("i0", "i1") for name in names]
    # Every image has a seed of its own.
    assert seeds == [1, 1]
    assert "| photo-patches_lenet-4_b1 | 2 |" in capsys.readouterr().out


def test_cases_make_what_they_say(tmp_path: Path) -> None:
    with_cifar = Source({"cifar10": "photo-patches"})
    cases = find_cases("ResNet-18, batch 4, train mode; ResNet-18, batch 4", with_cifar)
    made = make_cases(cases, [2, 5], with_cifar, tmp_path)
    assert [(path.name, image) for path, image in made] == [
        (f"{case.name}_i{image}.tar", image) for image in (2, 5) for case in cases
    ]
    seen = [load_target(path) for path, _ in made]
    assert [target.train_mode for target, _ in seen] == [True, False] * 2
    assert all(target.batch_size == 4 for target, _ in seen)
    first, second, third, _ = [truth.images for _, truth in seen if truth is not None]
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_cases_without_their_data_are_left_out_or_refused() -> None:
    embedded = find_cases("all", Source())
    assert {case.data for case in embedded} == {"photo-patches"}
    assert len(embedded) < len(CASES)
    with pytest.raises(InputError, match="needs --folder cifar10=DIR"):
        find_cases("ResNet-18, batch 8", Source())
    with pytest.raises(InputError, match="needs --weights resnet20=FILE"):
        find_cases("ResNet-20 of CIFAR-10, batch 1", Source({"cifar10": "photo-patches"}))
    with pytest.raises(InputError, match="--cases VGG: unknown; known are ConvNet, batch 1;"):
        find_cases("VGG", Source())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seconds", "8,soon"], "--seconds 8,soon: expected seconds"),
        (["--seconds", "0"], "--seconds 0: expected seconds"),
        (["--images", "-1"], "--images -1: expected numbers"),
        (["--cases", "all", "--folder", "photos=."], "--folder photos=.: expected NAME=PATH"),
        (["--cases", "all", "--folder", "cifar10=nowhere"], "there is no such path"),
        ([], "CHECKPOINT: give"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        main([*words, "--output", str(tmp_path)])


def row(
    attack: str, target: str, ssim: float, seed: int = 0, budget: float = 8, seen: float = 2
) -> dict[str, Any]:
    """A row of a record, whose images had at `seen` seconds the SSIM that they ended with."""
    psnr = 40 * ssim
    return {
        "attack": attack,
        "checkpoint": f"{target}.tar",
        "budget_seconds": budget,
        "cpu_seconds": budget,
        "seed": seed,
        "course": [[1.0, 5.0, 0.1], [seen, psnr, ssim]],
        "evaluation": {
            "summary": {"psnr": {"mean": psnr}, "ssim": {"mean": ssim}},
            "baselines": {"flat colour": {"psnr": {"mean": 12.0}, "ssim": {"mean": 0.05}}},
        },
    }


def test_the_summary_compares_pairs_and_says_who_is_behind() -> None:
    rows = [
        row("a", "x_b1_i0", 0.6),
        row("b", "x_b1_i0", 0.4),
        row("a", "x_b1_i1", 0.4, seed=1),
        row("b", "x_b1_i1", 0.3, seed=1),
        row("a", "x_b4_i0", 0.1),
        row("b", "x_b4_i0", 0.2),
        row("a", "x_b4_i1", 0.3, seed=1),
        row("b", "x_b4_i1", 0.4, seed=1),
        # A target that one attack alone has seen is in no mean.
        row("a", "x_b8_i0", 0.1),
    ]
    lines = render_summary(rows).splitlines()
    assert lines[0] == "## 8 s of processor time"
    assert "| x_b1 | 2 | 20.00 (16.00 to 24.00) | 14.00 (12.00 to 16.00) | 12.00 |" in lines
    assert "| x_b1 | 2 | 0.500 (0.400 to 0.600) | 0.350 (0.300 to 0.400) | 0.050 |" in lines
    # Intervals of the two attacks overlap; those of their differences tell them apart.
    assert "| x_b1 | +6.00 (+4.00 to +8.00) | +0.150 (+0.100 to +0.200) |" in lines
    assert "| x_b4 | -4.00 (-4.00 to -4.00) | -0.100 (-0.100 to -0.100) |" in lines
    assert any("best or level in PSNR on 1, in SSIM on 1 of 2 rows" in line for line in lines)
    assert not any("x_b8" in line for line in lines)


def test_the_first_moment_counts_whatever_the_budget() -> None:
    rows = [
        row("a", "x_i0", 0.6, seen=3),
        row("a", "x_i0", 0.7, budget=60, seen=30),
        row("a", "x_i1", 0.4),
        row("a", "x_i1", 0.8, budget=60, seen=20),
        row("a", "x_i2", 0.4),
        row("a", "x_i2", 0.3, budget=60),
    ]
    lines = render_summary(rows).splitlines()
    assert "## 60 s of processor time" in lines
    # 3, 20 and never.
    assert "| x | 3 | 2 of 3, median 20.0 s |" in lines


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
