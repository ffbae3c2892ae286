"""Data of which a client has little: one class, one image of a class, fewer than a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from core.data.data_sets import load_data
from core.errors import InputError
from gradients.checkpoint import load_target
from gradients.client_batch import batch_indices
from gradients.command import run as extract
from tests.image_folders import write_image, write_tree
from training.main_pytorch import run as train

SMALL = ["--arch", "cnn", "--width", "4", "--cpu", "--workers", "0"]


def checkpoint(folder: Path) -> Path:
    (found,) = folder.glob("*-checkpoint.pth.tar")
    return found


def test_a_batch_larger_than_the_data_set_is_named_as_it_is(tmp_path: Path) -> None:
    data = str(write_tree(tmp_path / "data"))
    for more in ([], ["--duplicates", "2"]):
        with pytest.raises(InputError, match=r"^-b 100000: the data set has \d+ images$"):
            extract(["--data", data, "-b", "100000", "--results", str(tmp_path), *SMALL, *more])
    with pytest.raises(InputError, match=r"^--target-idx 2: 10 images make 2 batches of 5$"):
        batch_indices(10, 5, 2, 0)


def test_a_class_with_one_image_is_shared_but_not_trained_on(tmp_path: Path) -> None:
    whole = load_data(write_tree(tmp_path / "whole"))
    data = write_tree(tmp_path / "data")
    write_image(data / "lonely" / "0.png", 0)
    loaded = load_data(data, training=False)
    # The other classes are split as they were without it.
    assert list(loaded.train.labels) == [*whole.train.labels, 2]
    assert list(loaded.val.labels) == list(whole.val.labels)
    extract(["--data", str(data), "-b", "3", "--results", str(tmp_path / "out"), *SMALL])
    target, _ = load_target(checkpoint(tmp_path / "out"))
    assert target.data.n_classes == 3
    with pytest.raises(InputError, match="single image"):
        train(["--data", str(data), "--result-root", str(tmp_path / "trained"), *SMALL])


def test_a_site_with_one_class_has_its_number_in_the_model(tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", classes=3)
    trained = tmp_path / "trained"
    train(["--data", str(data), "--result-root", str(trained), "--epochs", "1", "-b", "8",
           "--no-tensorboard", *SMALL])  # fmt: skip
    site = tmp_path / "site"
    write_image(site / "class2" / "0.png", 1)
    extract(["--data", str(site), "--pretrained", str(trained / "model_best.pth.tar"), "-b", "1",
             "--results", str(tmp_path / "out"), "--cpu", "--workers", "0"])  # fmt: skip
    target, truth = load_target(checkpoint(tmp_path / "out"))
    assert target.data.class_names == ("class0", "class1", "class2")
    assert truth is not None
    assert truth.labels.tolist() == [2]


def test_one_class_alone_has_no_gradient(tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", classes=1)
    with pytest.raises(InputError, match="a classifier of one class has no gradient"):
        extract(["--data", str(data), "-b", "1", "--results", str(tmp_path / "out"), *SMALL])


MODULE = """
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
"""


def test_one_class_suits_a_module_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "four_classes.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data = write_tree(tmp_path / "data", classes=1)
    extract(["--model", "four_classes:build", "--data", str(data), "-b", "2", "--results", "out",
             "--cpu", "--workers", "0"])  # fmt: skip
    from four_classes import build

    target, truth = load_target(checkpoint(tmp_path / "out"), build=build)
    assert (target.data.n_classes, target.data.class_names) == (4, ())
    assert truth is not None
    assert torch.equal(truth.labels, torch.zeros(2, dtype=torch.long))
    sys.modules.pop("four_classes")
