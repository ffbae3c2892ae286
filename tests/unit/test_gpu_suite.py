"""`make gpu`: what waits for a GPU, within a time, and on again where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import gpu_suite
from benchmarks.speed.gpu_suite import PARTS, Part, Suite, main, run
from benchmarks.speed.pages import gpu_limit, gpu_line, gpu_page
from core.errors import InputError

TESTS = """
import pytest

def test_one():
    pass

def test_two():
    assert False

def test_three():
    pytest.skip("not here")
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that parts can run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "part_good.py").write_text(
        "import pathlib, sys\npath = pathlib.Path(sys.argv[1]) / 'ran.txt'\n"
        "path.open('a').write(sys.argv[2] + '\\n')\n"
    )
    (folder / "part_bad.py").write_text("raise SystemExit('it cannot be')")
    (folder / "part_slow.py").write_text("import time\ntime.sleep(60)")
    (folder / "test_three.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{':'.join(sys.path)}")
    return folder


def test_parts_are_run_once_and_a_failed_one_again(
    modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Part("good", "works", ("part_good", "{output}", "{device}"), 1.0)
    bad = Part("bad", "does not", ("part_bad",), 1.0)
    monkeypatch.setattr(gpu_suite, "PARTS", (bad, good))
    suite = Suite((bad, good), "cpu", "a card", tmp_path / "out")
    assert [(o.part, o.status) for o in run(suite)] == [("bad", "failed"), ("good", "finished")]
    run(suite)
    assert (tmp_path / "out" / "ran.txt").read_text() == "cpu\n"
    assert "it cannot be" in (tmp_path / "out" / "logs" / "bad.txt").read_text()
    # On another card, or where it is asked for, it runs again.
    run(Suite((good,), "cpu", "another card", tmp_path / "out"))
    run(Suite((good,), "cpu", "another card", tmp_path / "out", again=True))
    assert (tmp_path / "out" / "ran.txt").read_text() == "cpu\n" * 3


def test_a_part_is_cut_at_the_end_of_its_time(
    modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Part("slow", "sleeps", ("part_slow",), 0.02)
    late = Part("late", "has no time", ("part_good", "{output}", "x"), 1.0)
    monkeypatch.setattr(gpu_suite, "PARTS", (slow, late))
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.5)
    times = iter([0.0, 0.0, 0.0, 1.2, 100.0, 100.0])
    clock = lambda: next(times)  # noqa: E731
    outcomes = run(Suite((slow, late), "cpu", "a card", tmp_path, 10.0, clock=clock))
    assert [(o.part, o.status) for o in outcomes] == [("slow", "cut")]
    assert not (tmp_path / "ran.txt").exists()
    (entry,) = json.loads((tmp_path / "suite.json").read_text())["parts"]
    assert entry["status"] == "cut"


def test_tests_are_counted_and_the_machine_is_not_named(
    modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pytest", "-q", "-p", "no:cacheprovider", "--junitxml={output}/tests.xml")
    part = Part("tests", "three", (*words, str(modules / "test_three.py")), 1.0)
    monkeypatch.setattr(gpu_suite, "PARTS", (part,))
    (outcome,) = run(Suite((part,), "cpu", "a card", tmp_path / "out"))
    assert outcome.tests == {"passed": 1, "failed": 1, "skipped": 1}
    assert outcome.status == "failed"
    assert not (tmp_path / "out" / "tests.xml").exists()


def test_every_part_begins_with_a_command_that_exists() -> None:
    from benchmarks.fidelity.command import build_parser as fidelity
    from benchmarks.speed.__main__ import build_parser as speed
    from benchmarks.speed.gpu_images import build_parser as images
    from benchmarks.speed.sections import MEASUREMENTS, RESUMABLE

    parsers = {"benchmarks.speed": speed, "benchmarks.speed.gpu_images": images}
    sections = set()
    for part in PARTS:
        words = [w.format(device="cuda", output="out", minutes="1") for w in part.words]
        if words[0] == "pytest":
            continue
        if words[:2] == ["benchmarks", "fidelity"]:
            fidelity().parse_args(words[2:])
            continue
        args = parsers[words[0]]().parse_args(words[1:])
        sections.add(getattr(args, "only", None))
    assert {n for n in MEASUREMENTS if n.startswith("gpu-")} == sections - {None}
    assert sections - {None} <= set(RESUMABLE)


def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--only nonsense"):
        main(["--only", "nonsense"])
    with pytest.raises(InputError, match="--budget"):
        main(["--budget", "0"])
    main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_sentence() -> None:
    with pytest.raises(InputError, match="no CUDA GPU"):
        main([])


def test_pages_tell_what_a_gpu_gave() -> None:
    assert "No number here is from a GPU yet" in gpu_line({})
    made = {"device": "A card", "device_type": "cuda", "versions": {"torch": "2"}}
    rows = [
        {
            "case": name,
            "seconds": {"R1": 0.1, "R2": 0.1, "ours": 0.05},
            "speedup_over_R1": ratio,
            "cosine_to_float64": 1.0,
            "peak_bytes": {"ours": 2**20},
        }
        for name, ratio in (("a", 2.0), ("b", 3.5))
    ]
    image = {"source": "embedded", "arch": "resnet18", "image_size": 224, "batch": 1}
    image |= {"iterations": 24000, "seconds": 200.0, "psnr": 20.0, "ssim": 0.5}
    records = {
        "gpu-iterations": {"rows": rows, "provenance": made},
        "gpu-images": {"rows": [{**image, "peak_bytes": None}], "provenance": made},
    }
    line = gpu_line(records)
    assert "A card" in line
    assert "2.0 to 3.5 times" in line
    assert "24,000 iterations at 224 px (batch 1) take 200 s" in line
    assert "but those that name a GPU" in gpu_limit(records)
    assert "| embedded | resnet18 | 224 | 1 | 24000 | 200 | 20.00 | 0.500 |" in gpu_page(records)
