"""BatchNorm statistics: by hooks, by merging, and from running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from core.models.building import ModelSpec, build_model
from gradients.batch_statistics import (
    collect_batch_statistics,
    merge_batch_statistics,
    statistics_from_running,
    values_per_channel,
)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec("resnet18", n_classes=3, image_size=32, stem="cifar", width=4))


def test_statistics_of_a_known_batch() -> None:
    model = nn.Sequential(nn.Identity(), nn.BatchNorm2d(1))
    images = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(2, 1, 1, 2)
    mean, variance = collect_batch_statistics(model, images)["1"]
    assert mean.tolist() == [3.0]
    assert variance.tolist() == [3.5]


def test_every_layer_is_measured_and_the_model_left_alone() -> None:
    model, images = _model().train(), torch.rand(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    found = collect_batch_statistics(model, images)
    assert list(found) == [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_statistics_are_those_the_layer_normalises_with() -> None:
    layer = nn.BatchNorm2d(2, affine=False, eps=1e-12).double().train()
    images = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    mean, variance = collect_batch_statistics(layer, images)[""]
    expected = (images - mean.view(1, 2, 1, 1)) / variance.sqrt().view(1, 2, 1, 1)
    torch.testing.assert_close(layer(images), expected)


def test_merged_parts_are_the_whole() -> None:
    layer, images = nn.BatchNorm2d(2).double(), 100 + torch.rand(7, 2, 4, 4, dtype=torch.float64)
    parts = [collect_batch_statistics(layer, part) for part in images.split((4, 1, 2))]
    merged = merge_batch_statistics(parts, (4, 1, 2))
    whole = collect_batch_statistics(layer, images)
    torch.testing.assert_close(merged[""], whole[""])


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_give_the_batch_back(momentum: float) -> None:
    model, images = _model().double().train(), torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    # Running statistics that have moved away from their initial 0 and 1.
    model(torch.rand(4, 3, 32, 32, dtype=torch.float64))
    old = copy.deepcopy(model.state_dict())
    measured = collect_batch_statistics(model, images)
    counts = values_per_channel(model, images)
    model(images)
    recovered = statistics_from_running(old, model.state_dict(), momentum, counts)
    assert list(recovered) == list(measured)
    for name, statistics in measured.items():
        torch.testing.assert_close(recovered[name], statistics, rtol=1e-8, atol=1e-10)


def test_without_a_count_the_variance_stays_unbiased() -> None:
    layer = nn.BatchNorm2d(1).double().train()
    old = copy.deepcopy(layer.state_dict())
    images = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64).view(2, 1, 1, 2)
    layer(images)
    recovered = statistics_from_running(old, layer.state_dict(), 0.1)
    _, variance = recovered[""]
    assert float(variance) == pytest.approx(3.5 * 4 / 3)
    _, biased = statistics_from_running(old, layer.state_dict(), 0.1, 4)[""]
    assert float(biased) == pytest.approx(3.5)
