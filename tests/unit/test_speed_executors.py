"""The speed of the two executors on the same cells."""

from __future__ import annotations

import json

import pytest

from benchmarks.speed import executors
from benchmarks.speed.render import render


def test_the_two_take_turns_and_are_compared_round_by_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The machine gets slower; Ray takes a tenth longer in every round.
    seconds = iter([10.0, 11.0, 22.0, 20.0, 40.0, 44.0])
    asked: list[str] = []

    def run(module: str, *words: str) -> str:
        asked.append(words[words.index("--executor") + 1])
        took = {"cells": 16, "start_seconds": 6.0, "cells_seconds": next(seconds)}
        return "what a library says\n" + json.dumps(took)

    monkeypatch.setattr(executors, "in_subprocess", run)
    local, ray = executors.measure_executors(quick=False, repeats=3)
    assert asked == ["local", "ray", "ray", "local", "local", "ray"]
    assert (local["executor"], local["cells_seconds"], local["over_local"]) == ("local", 20, 1)
    assert (ray["cells"], ray["rounds"], ray["cells_seconds"]) == (16, 3, 22)
    assert ray["over_local"] == pytest.approx(1.1)
    made = {"processor": "a", "cores": 2, "threads": 1, "load_average": 0.0, "versions": {}}
    made["versions"] = {"torch": "0"}
    text = render({"executors": {"rows": [local, ray], "provenance": made}})
    assert "| ray | 16 | 3 | 6.0 | 22.0 | 1.10 |" in text


def test_the_cells_are_computed(capsys: pytest.CaptureFixture[str]) -> None:
    executors.main(["--quick"])
    took = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert took["cells"] == 2
    assert took["cells_seconds"] > took["start_seconds"] > 0
