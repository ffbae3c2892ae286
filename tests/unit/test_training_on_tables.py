"""Stage 1 on tables of records, and the later stages on what it trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch import nn

from core.data.records import load_table
from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec
from core.storage import load_checkpoint
from training.main_pytorch import main, parse_args, run

RECORDS = 60


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty patients of four columns."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "patients.csv"
    age = rng.normal(60, 12, RECORDS)
    frame = pandas.DataFrame({"age": age, "dose": rng.normal(5, 2, RECORDS)})
    frame["ward"] = rng.choice(["a", "b", "c"], RECORDS)
    frame["sex"] = rng.choice(["f", "m"], RECORDS)
    frame["ill"] = np.where(age > 60, "yes", "no")
    frame.to_csv(path, index=False)
    return path


def words(file: Path, root: Path, more: str = "") -> list[str]:
    return [
        "--data", str(file), "--result-root", str(root), "--width", "16", "--cpu", *more.split()
    ]  # fmt: skip


def named(root: Path, name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(root / f"{name}.pth.tar")["state_dict"]
    return state


@pytest.mark.parametrize("scheme", ["pure", "DP-SGD"])
def test_a_step_of_training_is_what_torch_computes(scheme: str, file: Path, tmp_path: Path) -> None:
    """All records are one batch, so that one epoch is one step; DP-SGD without noise."""
    more = f"--scheme {scheme} --epochs 1 -b 48 --lr 0.5 --momentum 0 --wd 0 --sigma 0"
    assert main(words(file, tmp_path, more)) == 0
    train, _ = load_table(file).split()
    assert len(train) == 48
    raw = load_checkpoint(tmp_path / "model_init.pth.tar")
    model = ModelSpec.from_dict(raw["model"]).build()
    model.load_state_dict(raw["state_dict"])
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for record, target in zip(train.inputs, train.targets, strict=True):
        loss = nn.functional.cross_entropy(model(record[None]), target[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        scale = min(1.0, 1.0 / float(norm)) if scheme == "DP-SGD" else 1.0
        sums = [s + scale * g for s, g in zip(sums, gradients, strict=True)]
    stepped = [p - 0.5 * s / 48 for p, s in zip(model.parameters(), sums, strict=True)]
    after = named(tmp_path, "model_best")
    for (name, _), expected in zip(model.named_parameters(), stepped, strict=True):
        assert torch.allclose(after[name], expected, atol=1e-5), name


def test_a_trained_model_goes_through_all_stages(file: Path, tmp_path: Path) -> None:
    from attack.cli.command import main as attack
    from gradients.command import main as extract

    assert main(words(file, tmp_path / "t", "--scheme pure --epochs 4 -b 8 --lr 0.1")) == 0
    record = json.loads((tmp_path / "t" / "record.json").read_text())
    assert record["model"]["arch"] == "mlp"
    assert record["final_val_acc1"] > 50
    best = tmp_path / "t" / "model_best.pth.tar"
    told = ["--pretrained", str(best), "-b", "1", "--results", str(tmp_path / "g")]
    assert extract(["--data", str(file), *told]) == 0
    (checkpoint,) = (tmp_path / "g").glob("*.pth.tar")
    shared = load_checkpoint(checkpoint)
    assert torch.equal(
        shared["state_dict"]["1.weight"], named(tmp_path / "t", "model_best")["1.weight"]
    )
    options = ["--attack", "analytic", "--metric", "--cpu", "--id", "run", "--root", str(tmp_path)]
    assert not attack([*options, "--checkpoint", str(checkpoint)])
    found = json.loads((tmp_path / "run" / "record.json").read_text())
    assert found["evaluation"]["summary"]["record_exact"]["mean"] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--scheme RA", "--kernel-size-of-maxpool 19 .* no max-pooling layer"),
        ("--scheme GH", "--scheme GH: .* this model has no BatchNorm"),
        ("--arch resnet18", "resnet18 cannot take records"),
    ],
)
def test_what_defends_nothing_on_tables_is_refused(
    more: str, said: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        run(words(file, tmp_path, more))
    assert not list(tmp_path.glob("*.tar"))


def normalising() -> nn.Sequential:
    """Built by the command."""
    return nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_asynchronous_batchnorm_trains_on_tables(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = "--model tests.unit.test_training_on_tables:normalising"
    with caplog.at_level(logging.INFO):
        assert main(words(file, tmp_path, f"--scheme GH -b 24 --epochs 1 --bn-groups 2 {own}")) == 0
    assert named(tmp_path, "model_best")["1.running_mean"].abs().min() > 0
    assert "48 training, 12 validation records" in caplog.text


@pytest.mark.parametrize("split", ["iid", "dirichlet:1"])
def test_clients_train_in_rounds_on_tables(split: str, file: Path, tmp_path: Path) -> None:
    more = f"--clients 3 -b 12 --epochs 1 --defense clip:1 --split {split}"
    assert main(words(file, tmp_path, more)) == 0
    assert json.loads((tmp_path / "record.json").read_text())["federation"]["images"]


def test_the_network_of_a_table_unless_another_is_given() -> None:
    assert parse_args(["--data", "fair"]).arch == "mlp"
    assert parse_args(["--data", "fair", "--scheme", "DP-SGD"]).arch == "mlp"
    assert parse_args(["--data", "fair", "--arch", "cnn"]).arch == "cnn"
    assert parse_args(["--data", "photo-patches"]).arch == "resnet18"


def test_another_sites_records_are_read_by_the_scales_of_the_model(
    file: Path, tmp_path: Path
) -> None:
    whole = load_table(file)
    frame = pandas.read_csv(file)
    some = frame[frame["ward"] != "b"].head(9)
    path = tmp_path / "site.csv"
    some.to_csv(path, index=False)
    assert load_table(path).columns.width < whole.columns.width
    read = load_table(path, trained=whole.spec)
    assert read.columns == whole.columns
    assert torch.equal(read.inputs, whole.inputs[list(some.index)])
    assert torch.equal(read.targets, whole.targets[list(some.index)])
    # A spec without columns says nothing of scales.
    plain = DataSpec("x", (3,), (0,) * 3, (1,) * 3, 2)
    assert load_table(path, trained=plain).columns == load_table(path).columns
    for column, cell, said in (
        ("ward", "z", "'z' is none of its categories"),
        ("ill", "perhaps", "the model has no class 'perhaps'"),
    ):
        some.assign(**{column: cell}).to_csv(path, index=False)
        with pytest.raises(InputError, match=said):
            load_table(path, trained=whole.spec)
    some.drop(columns="age").to_csv(path, index=False)
    with pytest.raises(InputError, match="has no column age"):
        load_table(path, trained=whole.spec)
