"""The second implementation of TabLeak: a table in its words, and how it is called."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import gradinvbench as gib
from benchmarks.fidelity.beside import TABLEAK, installed, version
from benchmarks.fidelity.beside_tableak import Described, TabLeakOfItsAuthors
from benchmarks.fidelity.declare import Trial
from benchmarks.fidelity.networks import tableak_network
from benchmarks.fidelity.rows import find_row
from benchmarks.fidelity.samples import Samples
from core.data.columns import Columns
from core.data.records import Table
from core.errors import InputError

TRIAL = Trial(0, Samples(), torch.device("cpu"))
# Hands out what it was asked with, where their attack would hand out records.
STANDING_IN = """
import torch

def continuous_sigmoid_bound(x, dataset):
    x[:, 0] = 0.5
    return x

def invert_grad(**told):
    variables = torch.zeros_like(told["true_data"], requires_grad=True)
    bounded = continuous_sigmoid_bound(variables, dataset=told["dataset"])
    assert not float(variables.detach().abs().max())
    output = told["net"](bounded)
    told["training_criterion"](output, told["true_label"]).backward()
    shapes = [tuple(p.shape) for p in told["net"].parameters()]
    assert [tuple(g.shape) for g in told["true_grad"]] == shapes
    asked.append(told)
    return bounded

asked = []
"""


@pytest.fixture
def table() -> Table:
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "age": rng.integers(18, 90, 40),
            "word": rng.choice(["a", "b", "c"], 40),
            "dose": rng.normal(5, 2, 40),
        }
    )
    columns = Columns.infer(frame, {"age": "continuous"})
    targets = torch.from_numpy(rng.integers(0, 2, 40))
    return Table("made", columns, columns.encode(frame), targets, ("no", "yes"))


def test_a_table_is_described_in_their_words(table: Table) -> None:
    described = Described(table.columns)
    cells = described.decode_batch(table.inputs)
    frame = table.to_frame()
    assert cells[:, 0].tolist() == frame["age"].tolist()
    assert cells[:, 1].tolist() == frame["word"].tolist()
    assert cells[:, 2].astype(float) == pytest.approx(frame["dose"].to_numpy(), rel=1e-4)
    assert torch.allclose(described.project_batch(table.inputs), table.inputs, atol=1e-5)
    # What is between two whole numbers or two words goes to the nearer one.
    moved = table.inputs.clone()
    moved[:, 0] += 0.3 / table.columns.columns[0].scale
    moved[:, 1:4] *= 0.4
    assert (described.decode_batch(moved)[:, :2] == cells[:, :2]).all()
    numbers = (described.mean + described.std * table.inputs)[:, 0]
    assert numbers.tolist() == pytest.approx(frame["age"].tolist(), rel=1e-5)
    assert torch.equal(
        (described.mean + described.std * table.inputs)[:, 1:4], table.inputs[:, 1:4]
    )
    assert described.train_feature_index_map["word"] == ("cat", [1, 2, 3])
    low, high = described.standardized_continuous_bounds["age"]
    assert (low, high) == pytest.approx(
        (float(table.inputs[:, 0].min()), float(table.inputs[:, 0].max())), rel=1e-5
    )
    tolerances = described.create_tolerance_map()
    assert tolerances[1] == "cat"
    assert tolerances[2] == pytest.approx(0.319 * frame["dose"].std(ddof=0), rel=1e-3)


def test_their_attack_gets_the_network_and_the_gradient(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not installed(TABLEAK)
    target, truth = gib.share(tableak_network(5, 2), table.batch(4))
    with pytest.raises(InputError, match="needs a clone of"):
        TabLeakOfItsAuthors()(target, truth.labels, TRIAL)
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "__init__.py").write_text("")
    (tmp_path / "attacks" / "gradient_inversion_attack.py").write_text(STANDING_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert installed(TABLEAK)
        assert version(TABLEAK) == "tableak of an unknown commit"
        found = TabLeakOfItsAuthors(iterations=7, starts=3)(target, truth.labels, TRIAL)
        module = importlib.import_module("attacks.gradient_inversion_attack")
        (told,) = module.asked
        assert (told["max_iterations"], told["post_selection"]) == (7, 3)
        assert torch.equal(told["true_grad"][0], next(iter(target.gradient.values())))
        assert found.images[:, 0].tolist() == [0.5] * 4
        # Records, whatever they hand out.
        assert torch.equal(table.columns.project(found.images), found.images)
        assert module.continuous_sigmoid_bound.__module__ == module.__name__
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "attacks"]:
            del sys.modules[name]


def test_the_row_of_adult_asks_for_the_file_of_records() -> None:
    experiment = find_row("tableak-adult").experiment
    assert experiment is not None
    assert experiment.needs == ("adult.data",)
    with pytest.raises(InputError, match=r"--weights adult\.data=FILE"):
        experiment.ours(TRIAL)
