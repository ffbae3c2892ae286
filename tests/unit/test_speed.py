"""The speed benchmark measures what it says, and writes tables from its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import references
from benchmarks.speed.__main__ import main
from benchmarks.speed.cases import (
    SMALL_CASE,
    SMALL_CASES,
    Case,
    make_problem,
    make_problems,
)
from benchmarks.speed.iterations import accuracy
from benchmarks.speed.levers import LEVERS
from benchmarks.speed.pages import main as renew_pages
from benchmarks.speed.pages import renew
from benchmarks.speed.render import render
from benchmarks.speed.scaling import LayerSize, Machine, ModelSize, Traffic
from benchmarks.speed.timing import interleaved, paired_ratio
from core.errors import InputError

PROBLEM = make_problem(SMALL_CASE)
# Levers that change the last digits, or the whole process.
ROUGH = ("bf16", "bf16 and double backward", "two threads")


@pytest.mark.parametrize("method", ["published_loop", "analytic_seed", "ours"])
def test_all_methods_find_the_same_gradient(method: str, benchmark) -> None:
    iteration = getattr(references, method)(PROBLEM)
    assert accuracy(PROBLEM, benchmark(iteration)) > 0.9999


def test_levers_change_the_time_and_not_the_result() -> None:
    for lever in LEVERS.values():
        if not lever.compiles and lever.name not in ROUGH:
            assert accuracy(PROBLEM, lever.with_(PROBLEM)()) > 0.9999, lever.name


def test_our_loop_advances_every_restart() -> None:
    iteration = references.our_loop(PROBLEM, restarts=2, at_once=2)
    before = iteration().clone()
    assert not torch.equal(before, iteration())


def test_functions_take_turns() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert len(times["a"]) == len(times["b"]) == 2
    assert paired_ratio([2.0, 9.0, 2.0], [1.0, 1.0, 1.0]) == 2.0


def test_table_comes_from_the_record() -> None:
    made = {
        "processor": "a processor",
        "cores": 2,
        "threads": 1,
        "load_average": 0.0,
        "versions": {"torch": "0"},
    }
    rows = [
        {
            "case": "x",
            "processes": n,
            "bytes": 4e6,
            "sent_bytes": (n - 1) * 1e6,
            "seconds": {"iteration": s, "all-reduce": 0.1, **others},
        }
        for n, s, others in [
            (1, 2.5, {}),
            (2, 2.0, {"whole": 3.0, "apart": 1.5, "sockets": 4.0}),
        ]
    ]
    text = render({"processes": {"rows": rows, "provenance": made}})
    assert "| x | 2 | 2000.0 | 1.50 | 2.00 | 0.75 | 1.0 | 4.0 | 100.0 |" in text


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="--only nonsense"):
        main(["--only", "nonsense"])
    with pytest.raises(InputError, match="--cases nonsense"):
        main(["--cases", "nonsense"])


@pytest.mark.slow
def test_workers_write_a_record(tmp_path: Path) -> None:
    words = ["--only", "iterations", "--cases", SMALL_CASE.name, "--repeats", "2"]
    main([*words, "--threads", "1", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "iterations.json").read_text())["rows"]
    assert row["cosine_to_float64"] > 0.9999
    assert row["case"] in (tmp_path / "table.md").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_difference_on_a_gpu_agrees_with_the_cpu() -> None:
    from attack.matching.matcher import GradientMatcher
    from attack.matching.objectives import Cosine
    from attack.matching.replica import Replica

    device = torch.device("cuda")
    matcher = GradientMatcher(Replica(PROBLEM.target, device), Cosine(), "difference")
    found = matcher(PROBLEM.inputs.to(device), PROBLEM.labels.to(device)).input_gradient
    assert accuracy(PROBLEM, found.cpu()) > 0.999


def test_predictions_follow_the_model() -> None:
    machine = Machine(latency=0.0, launches=0.0, memory=1e30)
    alone = machine.iteration(1e9, Traffic(4e6), 8, 1)
    assert alone == pytest.approx(5 * 8e9 / machine.flops)
    ring = 2 * 7 / 8 * 4e6 / machine.inside
    assert machine.iteration(1e9, Traffic(4e6), 8, 8) == pytest.approx(alone / 8 + ring)
    # A gather is half of an all-reduce.
    gathered = machine.iteration(1e9, Traffic(0.0, 8e6), 8, 8)
    assert gathered == pytest.approx(alone / 8 + ring)
    # No more GPUs than images work.
    assert machine.iteration(1e9, Traffic(4e6), 8, 64) == machine.iteration(1e9, Traffic(4e6), 8, 8)


def test_factors_travel_in_place_of_late_layers() -> None:
    late, early = LayerSize(16, 4608, 512, 16_384), LayerSize(4096, 576, 64, 524_288)
    size = ModelSize(4608 * 512 + 576 * 64, 10**9, (late, early))
    assert size.traffic(8, 8) == Traffic(4.0 * 576 * 64, 4.0 * 8 * 16_384)
    # So many rows that their products cost more than they save.
    assert size.traffic(512, 8) == Traffic(4.0 * size.parameters)


def test_page_keeps_its_prose() -> None:
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n"
    renewed = renew(page, {"a": "new\n"})
    assert renewed == "before\n<!-- begin a -->\nnew\n<!-- end a -->\nafter\n"
    with pytest.raises(InputError, match="no place for the table b"):
        renew(page, {"b": ""})


def test_pages_show_the_committed_records(tmp_path: Path) -> None:
    """What the repository shows is what its records say."""
    folder = Path(__file__).parents[2]
    words = ["--records", str(tmp_path)]
    for file in (folder / "results" / "speed").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pages = {
        "--readme": "docs/how-fast.md",
        "--scaling": "docs/scaling.md",
        "--front": "README.md",
        "--limits": "docs/how-to-read.md",
    }
    for file in (folder / "results" / "speed" / "gpu").glob("*.json"):
        (tmp_path / "gpu").mkdir(exist_ok=True)
        (tmp_path / "gpu" / file.name).write_bytes(file.read_bytes())
    for flag, page in pages.items():
        copy = tmp_path / Path(page).name
        copy.write_bytes((folder / page).read_bytes())
        words += [flag, str(copy)]
    renew_pages(words)
    for page in (*pages.values(), "results/speed/table.md"):
        assert (tmp_path / Path(page).name).read_text() == (folder / page).read_text(), page


def test_pages_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no records"):
        renew_pages(["--records", str(tmp_path)])


def test_sections_of_a_gpu_run_on_a_cpu_too() -> None:
    from benchmarks.speed import gpu

    (row,) = gpu.measure_iterations(SMALL_CASE, torch.device("cpu"), 1, 0)
    assert row["cosine_to_float64"] > 0.9999
    restarts = list(gpu.measure_restarts(SMALL_CASE, torch.device("cpu"), 1, 0, (1, 2)))
    assert [r["restarts"] for r in restarts] == [1, 2]
    names = ("none", "channels last", "bf16", "CUDA graphs")
    levers = list(gpu.measure_levers(SMALL_CASE, torch.device("cpu"), 1, 0, 20, names))
    assert [lever["lever"] for lever in levers] == ["none", "channels last", "bf16"]
    assert all(lever["cosine_to_float64"] > 0.97 for lever in levers)
    assert max(lever["psnr"] for lever in levers) - min(lever["psnr"] for lever in levers) < 3
    made = {"processor": "a", "cores": 1, "threads": 1, "load_average": 0.0, "versions": {}}
    made["versions"] = {"torch": "0"}
    records = {"gpu-iterations": [row], "gpu-restarts": restarts, "gpu-levers": levers}
    ranks = list(gpu.measure_ranks(SMALL_CASE, torch.device("cpu"), 1, 0, (1,)))
    assert [r["ranks"] for r in ranks] == [1]
    records |= {"gpu-targets": targets_of(SMALL_CASE), "gpu-ranks": ranks}
    text = render({n: {"rows": rows, "provenance": made} for n, rows in records.items()})
    assert text.count(SMALL_CASE.name) == 9


def targets_of(case: Case) -> list[dict[str, Any]]:
    from benchmarks.speed.targets import measure_targets

    return list(measure_targets(case, torch.device("cpu"), 1, 0, (1, 2)))


def test_targets_in_turn_and_at_once_move_alike() -> None:
    problems = make_problems(SMALL_CASE, 3)
    assert torch.equal(problems[0].inputs, PROBLEM.inputs)
    assert not torch.equal(
        problems[0].target.gradient["fc.weight"], problems[1].target.gradient["fc.weight"]
    )
    ways = [references.targets_in_turn(problems), references.targets_at_once(problems)]
    found = [way() for way in ways]
    # Signs of Adam's first step may differ where a gradient is next to zero.
    assert ((found[0] - found[1]).abs() > 1e-4).double().mean() < 0.01


def test_small_networks_are_timed_under_trace_too(tmp_path: Path) -> None:
    words = ["--only", "small", "--quick", "--repeats", "1", "--threads", "1"]
    main([*words, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "small.json").read_text())["rows"]
    assert row["case"] == "cnn-32px-b1-eval"
    assert row["traced_over_ours"] == row["seconds"]["ours"] / row["seconds"]["traced"]
    assert "| cnn-32px-b1-eval |" in (tmp_path / "table.md").read_text()
    # Both are the same attack.
    problem = make_problem(SMALL_CASES[row["case"]])
    plain, traced = references.our_loop(problem), references.our_traced_loop(problem)
    for _ in range(3):
        images = plain(), traced()
    # Signs of Adam's first steps may differ where a gradient is next to zero.
    assert ((images[0] - images[1]).abs() > 1e-4).double().mean() < 0.02


def test_a_section_goes_on_where_it_stopped(tmp_path: Path, capsys) -> None:
    words = ["--only", "targets", "--quick", "--repeats", "1", "--threads", "1", "--resume"]
    words += ["--output", str(tmp_path)]
    main(words)
    file = tmp_path / "targets.json"
    record = json.loads(file.read_text())
    assert [row["targets"] for row in record["rows"]] == [1, 4, 16]
    assert "complete" not in record
    record["rows"][0]["gain"] = 77.0
    file.write_text(json.dumps(record))
    main(words)
    assert json.loads(file.read_text())["rows"] == record["rows"]
    # Cut within a target: it is measured again, whole.
    file.write_text(json.dumps({**record, "rows": record["rows"][:1], "complete": False}))
    main(words)
    rows = json.loads(file.read_text())["rows"]
    assert [row["targets"] for row in rows] == [1, 4, 16]
    assert rows[0]["gain"] != 77.0
    with pytest.raises(InputError, match="--resume: the section memory"):
        main(["--only", "memory", "--resume"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="--device cuda: torch sees no CUDA GPU"):
        main(["--device", "cuda"])


def test_images_are_inverted_and_only_our_own_are_shown(tmp_path: Path) -> None:
    from PIL import Image

    from benchmarks.speed import gpu_images

    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{n}.png")
    words = ["--images", str(tmp_path), "--batches", "1,4", "--device", "cpu", "--arch", "cnn"]
    words += ["--image-size", "16", "--iterations", "3", "--output", str(tmp_path / "out")]
    gpu_images.main(words)
    rows = json.loads((tmp_path / "out" / "gpu-images.json").read_text())["rows"]
    made = [(row["source"], row["batch"]) for row in rows]
    assert made == [("folder", 1), ("embedded", 1), ("embedded", 4)]
    assert all(row["iterations"] == 3 and row["psnr"] > 0 for row in rows)
    pictures = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert pictures == ["gpu-images-cnn-b1.png", "gpu-images-cnn-b4.png"]
    with pytest.raises(InputError, match="--batches"):
        gpu_images.main([*words, "--batches", "one"])
