"""The table of defenses that claim to hold: every row's attackers come to a result."""

from __future__ import annotations

import pytest
import torch
import yaml

import gradinvbench as gib
from attack.knowledge.labels.accuracy import label_accuracy
from benchmarks.declare.tables import table_files
from core.models.building import ModelSpec, build_model
from tests.targets import smooth_images

# What would take long at its published setting, with fewer iterations or trials.
QUICK = {"dcs2": "dcs2:5", "ats": "ats:2"}


def defenses() -> list[str]:
    rows = yaml.safe_load(table_files()["graveyard"].read_text())["axes"]["defense"]
    return [row["extract"]["defense"] for row in rows.values() if "extract" in row]


@pytest.mark.parametrize("defense", defenses())
def test_the_told_attacker_gives_images_and_labels_that_can_be_measured(defense: str) -> None:
    torch.manual_seed(0)
    model, labels = build_model(ModelSpec("cnn", 10, 16, width=4)).eval(), torch.tensor([3, 7])
    target, truth = gib.share(
        model, smooth_images(2, 16), labels, defense=QUICK.get(defense, defense), train_mode=False
    )
    found = gib.invert(target, labels=labels, iterations=2, adaptive=True, progress=False)
    assert found.images.shape == truth.images.shape
    assert len(gib.evaluate(found, truth).per_image) == 2
    assert label_accuracy(found.labels, truth.labels) == 1.0
