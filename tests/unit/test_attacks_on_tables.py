"""Attacks on records: exact ones recover all, optimised ones beat a guess."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradinvbench as gib
from attack.attacks.auto import Auto
from attack.attacks.ensemble import SHARE_FOR_CLOSED_FORMS, EnsembleConfig
from attack.attacks.parts.closed_form import gradient_loss
from attack.matching.many_starts import ClientOfManyStarts
from attack.recovered import Recovered
from benchmarks.tabular import network
from core.data.columns import Columns
from core.data.records import Table
from gradients.servers.trap import set_traps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def table() -> Table:
    """400 records of twelve numbers and a word."""
    import pandas

    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({f"x{i}": rng.normal(size=400) for i in range(12)})
    frame["word"] = rng.choice(["a", "b", "c"], size=400)
    columns = Columns.infer(frame)
    targets = torch.from_numpy(rng.integers(0, 2, 400))
    return Table("made", columns, columns.encode(frame), targets, ("no", "yes"))


def model(table: Table, width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return network(table.columns.width, width, 2)


def exact(found: gib.Reconstruction, truth: gib.Truth) -> float:
    mean = gib.evaluate(found, truth, metrics=["record_exact"]).summary()["record_exact"]["mean"]
    assert mean is not None
    return mean


@pytest.mark.parametrize(("attack", "size"), [("analytic", 1), ("spear-descent", 6), ("spear", 4)])
def test_an_exact_attack_recovers_every_record(table: Table, attack: str, size: int) -> None:
    target, truth = gib.share(model(table, 128).double(), table.batch(size, seed=2))
    found = gib.invert(target, attack=attack, progress=False)
    assert exact(found, truth) == 1
    assert sorted(found.labels.tolist()) == sorted(truth.labels.tolist())


@pytest.mark.parametrize("defense", ["", "clip:0.01"])
def test_traps_give_a_malicious_server_a_batch_of_64(table: Table, defense: str) -> None:
    first = model(table, 1000)
    train, public = table.split()
    assert isinstance(first[0], nn.Linear)
    set_traps(first[0], public.inputs, 1, 64)
    target, truth = gib.share(first, train.batch(64, seed=1), defense=defense)
    assert exact(gib.invert(target, attack="trap-weights"), truth) >= 0.95


def peeled(active: np.ndarray) -> set[int]:
    """Samples that an erasure decoder gets from which sample activates which row."""
    known: set[int] = set()
    while True:
        left = active.copy()
        left[:, list(known)] = False
        new = {int(row.argmax()) for row in left if row.sum() == 1} - known
        if not new:
            return known
        known |= new


def test_peeling_finds_what_a_decoder_finds_that_sees_the_batch(table: Table) -> None:
    partly = 0
    for seed in range(4):
        first = model(table, 48, seed)
        assert isinstance(first[0], nn.Linear)
        set_traps(first[0], table.inputs, 2, 24, seed)
        first = first.double()
        batch = table.batch(24, seed=seed)
        target, _ = gib.share(first, batch)
        with torch.no_grad():
            active = (first[0](batch.inputs.double()) > 0).T.numpy()
        found = gib.invert(target, attack="trap-weights", labels=batch.targets)
        recovered = found.images[: int(found.details["solved"])]
        apart = torch.cdist(batch.inputs, recovered).amin(1)
        assert {int(i) for i in (apart < 1e-3).nonzero()} == peeled(active)
        partly += 0 < len(recovered) < 24
    # Neither all nor nothing, or the two would agree trivially.
    assert partly


@pytest.mark.parametrize("local", [None, "sgd lr=0.2 epochs=3 batches=2"])
def test_starts_side_by_side_are_what_each_is_alone(table: Table, local: str | None) -> None:
    target, truth = gib.share(model(table, 16).double(), table.batch(4), local=local)
    client = ClientOfManyStarts(target, truth.labels, CPU)
    starts = torch.stack([table.batch(4, index).inputs for index in (1, 2, 3)]).double()
    together = client.distance(starts)
    if local is None:
        alone = [gradient_loss(target, start, truth.labels, CPU) for start in starts]
        assert together.tolist() == pytest.approx(alone, rel=1e-9)
    assert float(client.distance(truth.images[None].double())) == pytest.approx(0, abs=1e-9)
    direction = torch.randn(
        starts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    step = 1e-5
    ends = [client.distance(starts + sign * step * direction) for sign in (1, -1)]
    slopes = (client.slope(starts) * direction).flatten(1).sum(1)
    assert slopes.tolist() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).tolist(), rel=1e-5)


def test_tableak_beats_a_guess_and_knows_where(table: Table) -> None:
    target, truth = gib.share(model(table, 64), table.batch(4, seed=1))
    found = gib.invert(target, attack="tableak", iterations=120, restarts=6, progress=False)
    measured = gib.evaluate(found, truth)
    mean = measured.summary()["record_accuracy"]["mean"]
    guess = measured.baselines["marginal guess"]["record_accuracy"]["mean"]
    assert mean is not None
    assert guess is not None
    assert mean > guess + 0.2
    assert found.confidence is not None
    assert found.confidence.shape == (4, 13)
    # Categories come back as categories.
    assert torch.equal(table.columns.project(found.images), found.images)


def test_tableak_refuses_what_is_no_table() -> None:
    first = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    target, _ = gib.share(first, torch.rand(2, 3, 2, 2), [0, 1])
    with pytest.raises(gib.InputError, match="columns are known"):
        gib.invert(target, attack="tableak")


def test_the_commands_take_a_table_from_the_file_to_the_record(
    tmp_path: Path, table: Table
) -> None:
    from attack.cli.command import main as attack
    from gradients.command import main as extract

    file = tmp_path / "patients.csv"
    frame = table.to_frame()
    frame["ill"] = table.targets.tolist()
    frame.to_csv(file, index=False)
    words = f"--data {file} --width 300 --model-eval -b 8 --malicious trap:1"
    assert extract([*words.split(), "--results", str(tmp_path / "shared")]) == 0
    checkpoint = next((tmp_path / "shared").glob("*.tar"))
    words = "--attack trap-weights --metric --cpu --id run --checkpoint"
    assert not attack([*words.split(), str(checkpoint), "--root", str(tmp_path)])
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["evaluation"]["summary"]["record_exact"]["mean"] == 1
    assert "marginal guess" in record["evaluation"]["baselines"]
    assert "recovered" in record["tables"][-1]


def test_a_row_of_the_tables_is_computed(tmp_path: Path) -> None:
    from benchmarks.tabular import main

    words = "--data diabetes --attack analytic -b 2 --batches 2 --width 32 --results"
    main([*words.split(), str(tmp_path)])
    record = json.loads((tmp_path / "record.json").read_text())
    batches = record["batches"]
    assert len(batches) == 2
    assert Recovered.from_record(record["recovered"]).total == 2
    assert all(0 <= batch["marginal_guess"] <= 1 for batch in batches)


def test_a_row_of_the_tables_attacks_a_trained_network(tmp_path: Path) -> None:
    from benchmarks.tabular import main
    from training.main_pytorch import main as train

    words = "--data diabetes --epochs 2 --width 24 --cpu --no-tensorboard --result-root"
    assert train([*words.split(), str(tmp_path / "trained")]) == 0
    best = str(tmp_path / "trained" / "model_best.pth.tar")
    words = "--data diabetes --attack analytic -b 1 --batches 3 --results"
    main([*words.split(), str(tmp_path / "row"), "--pretrained", best])
    record = json.loads((tmp_path / "row" / "record.json").read_text())
    assert [batch["exact"] for batch in record["batches"]] == [1, 1, 1]
    for more, said in (("--width 25", "has another"), ("--data fair", "not of stage 1 on")):
        with pytest.raises(gib.InputError, match=said):
            main([*words.split(), str(tmp_path), "--pretrained", best, *more.split()])


def test_the_figure_shows_shares_with_wilson_s_intervals(tmp_path: Path) -> None:
    from scipy.stats import binomtest

    from benchmarks.declare.records import Run
    from benchmarks.declare.tables import find_table, load_table
    from benchmarks.run.store import Store
    from benchmarks.show.confidence import confidence, points_of
    from benchmarks.show.results import collect

    store = Store(tmp_path / "store")
    table = load_table(find_table("tabular"))
    cell = table.rows[1].repeats[0]["tabular"]
    entry = {"bin": 4, "cells": 30, "confidence": 13.5, "right": 12}
    batches = [{"confidence": [entry], "marginal_guess": 0.4} for _ in range(2)]
    few = {"bin": 9, "cells": 3, "confidence": 2.9, "right": 3}
    batches[0]["confidence"] = [entry, few]
    store.finish(cell, {"status": "finished", "batches": batches})
    result = collect(table, store)
    (point,) = points_of(result.rows[1])
    expected = binomtest(24, 60).proportion_ci(method="wilson")
    assert point.confidence == pytest.approx(0.45)
    assert point.right == pytest.approx(0.4)
    assert (point.low, point.high) == pytest.approx(tuple(expected), abs=1e-4)
    (picture,) = confidence(result, store, tmp_path)
    assert picture.file.stat().st_size > 1000
    assert not points_of(result.rows[0])
    assert Run({"tabular": {"batches": batches}}).entries("tabular.batches") == batches


def test_auto_reads_a_table(table: Table) -> None:
    """TabLeak takes part and pays for its iterations; what reads text is not even tried."""
    target, truth = gib.share(model(table, 64), table.batch(4, seed=3))
    members = ("analytic", "tableak", "inverting-gradients", "tag", "lamp")
    attack = Auto(EnsembleConfig(members=members, iterations=60))
    found = attack.reconstruct(target, labels=truth.labels, device=CPU, seed=0)
    records = found.details["members"]
    assert {*records} == {"analytic", "tableak", "inverting-gradients"}
    spent = int(SHARE_FOR_CLOSED_FORMS * 60)
    assert records["tableak"]["evaluations"] == spent
    # One optimiser is left: no rounds are played, and all that is left is its own.
    assert records["inverting-gradients"]["rounds"] == 1
    assert records["inverting-gradients"]["evaluations"] == found.details["budget"] == 60 - spent
    assert found.members["tableak"].images.shape == truth.images.shape
    assert found.details["chosen"] == min(records, key=lambda n: records[n]["gradient_loss"])
