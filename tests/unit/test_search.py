"""A small real search, and the words for what cannot be searched."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attack.cli.search import (
    PUBLISHED_SPACE,
    Range,
    Report,
    _reporting,
    _result,
    published_space,
    search,
)
from core.errors import InputError


def bowl(config: dict[str, Any], report: Report) -> None:
    """Gradient descent on (x - 3)^2 from 0; NaN for a large lr."""
    x = 0.0
    for iteration in range(1, 21):
        x -= config["lr"] * 2 * (x - 3)
        report(iteration, (x - 3) ** 2 if config["lr"] < 0.9 else float("nan"))


@pytest.mark.slow
def test_a_real_search(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    result = search(
        bowl,
        {"lr": Range(0.01, 0.5)},
        constants={"name": "bowl"},
        num_samples=3,
        max_concurrent=2,
        min_t=2,
        max_t=6,
        verbose=0,
        storage=tmp_path,
        ray_options={"num_cpus": 2, "address": "local"},
    )
    assert not ray.is_initialized()
    losses = [trial["loss"] for trial in result.trials]
    assert len(losses) == 3
    assert result.loss == min(losses)
    assert result.config["name"] == "bowl"
    assert 0.01 <= result.config["lr"] <= 0.5
    # The larger the step, the faster this bowl is descended.
    assert result.config["lr"] == max(trial["config"]["lr"] for trial in result.trials)
    assert max(trial["iterations"] for trial in result.trials) <= 6


def test_a_diverged_trial_ranks_last(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = pytest.importorskip("ray.tune")
    reports: list[dict[str, float]] = []
    monkeypatch.setattr(tune, "report", reports.append)
    _reporting(bowl)({"lr": 0.95})
    assert [entry["loss"] for entry in reports] == [1e30] * 20
    _reporting(bowl)({"lr": 0.1})
    assert reports[-1] == {"loss": pytest.approx((3 * 0.8**20) ** 2), "iteration": 20}


def outcome(loss: float | None, error: Exception | None = None) -> SimpleNamespace:
    metrics = None if loss is None else {"loss": loss, "iteration": 5}
    return SimpleNamespace(config={"lr": loss}, metrics=metrics, error=error)


def test_a_failed_trial_is_recorded_and_never_best() -> None:
    failure = RuntimeError("first line\nno such thing")
    result = _result([outcome(0.5), outcome(0.01, failure), outcome(0.3), outcome(None)])
    assert (result.loss, result.config) == (0.3, {"lr": 0.3})
    assert result.trials[1]["error"] == "no such thing"
    with pytest.raises(InputError, match=r"every trial failed \(no such thing\)"):
        _result([outcome(None, failure)])


def test_published_ranges() -> None:
    assert PUBLISHED_SPACE["epochs"] == Range(5000, 20000, "integer")
    assert published_space("lr", "TV") == {"lr": Range(0.1, 1.0), "TV": Range(1e-6, 1.0, "log")}


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"gradinvbench\[search\]"):
        search(bowl, {"lr": Range(0.1, 1.0)})


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"space": {}}, "empty"),
        ({"num_samples": 0}, "--num-samples"),
        ({"min_t": 5, "max_t": 4}, "--min-t 5"),
    ],
)
def test_limits_are_checked_before_any_work(options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        search(bowl, **{"space": {"lr": Range(0.1, 1.0)}, **options})


def test_spaces_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="--lr-tune"):
        published_space()
    with pytest.raises(InputError, match="depth"):
        published_space("depth")
    with pytest.raises(InputError, match="is empty"):
        Range(0.0, 1.0, "log")
    with pytest.raises(InputError, match="is empty"):
        Range(2.0, 1.0)
