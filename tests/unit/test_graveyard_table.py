"""The table of defenses that claim to hold: every row's attackers come to a result."""

from __future__ import annotations

import pytest
import torch
import yaml

import gradinvbench as gib
from attack.attacks.many_targets import Begun, reconstruct_many
from attack.attacks.spectral import Spectral
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


@pytest.mark.parametrize("defense", defenses())
def test_told_attackers_of_two_targets_at_once_find_what_they_find_alone(defense: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelSpec("cnn", 10, 16, width=4)).eval()
    begun = []
    for seed, classes in enumerate(([3, 7], [1, 2])):
        target, _ = gib.share(
            model,
            smooth_images(2, 16, seed),
            torch.tensor(classes),
            defense=QUICK.get(defense, defense),
            train_mode=False,
            seed=seed,
        )
        begun.append(Begun(target, torch.tensor(classes), on_snapshot=lambda *_: None))
    told = {"iterations": 2, "adaptive": True, "double": True, "hvp": "exact"}
    attack = Spectral(Spectral.published.changed(**told))
    device = torch.device("cpu")
    together = reconstruct_many(attack, begun, device=device, seed=0, at_once=2)
    for each, found in zip(begun, together, strict=True):
        alone = attack.reconstruct(each.target, labels=each.labels, device=device, seed=0)
        torch.testing.assert_close(found.images, alone.images, atol=1e-6, rtol=0)
