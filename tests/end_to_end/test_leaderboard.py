"""An entry from nothing: victims, attacks and accuracies, in processes of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.leaderboard.entry import read_entry
from benchmarks.leaderboard.measure import About
from benchmarks.submission import Desk, Measurement, submit_measured
from tests.board_entries import SMALL

TINY = dataclasses.replace(
    SMALL,
    images=2,
    batch_sizes=(2,),
    states=("initial", "trained"),
    utility=dataclasses.replace(SMALL.utility, seeds=(0,)),
)


@pytest.mark.slow
def test_an_entry_from_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    desk = Desk(tmp_path / "store", tmp_path, jobs=1, protocol=TINY, say=said.append)
    mine = Measurement(About("Noise", "Noise."), "gaussian:0.01")
    path = submit_measured(mine, desk)
    (sentence,) = said
    assert sentence.startswith("Small-v1, Noise: 4 parts to compute, about 1 min on 1 core")
    entry = read_entry(path)
    assert set(entry.leaks) == {"lenet, initial, batch 2", "lenet, trained, batch 2"}
    assert 0 < entry.accuracies[0] < 100
    assert all(len(leak.ssim) == 2 for leak in entry.leaks.values())
    # Nothing is computed twice.
    written = path.read_bytes()
    assert submit_measured(mine, desk).read_bytes() == written
    assert len(said) == 1
