"""Gradients kept as products against gradients written out."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack.matching.fixed_convolutions import FixedConv2d
from attack.matching.late_layers import find_layers, saves_sweeps
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import L2, Cosine, LayerMeanCosine
from attack.matching.replica import Replica
from core.models.building import ModelSpec
from tests.targets import make_target

CPU = torch.device("cpu")
MODELS = {
    "resnet": ModelSpec("resnet18", 10, 16, "cifar", width=8),
    "vgg": ModelSpec("vgg11", 10, 32),
    "vit": ModelSpec("vit_tiny", 10, 16),
}


def problem(name: str, train_mode: bool = False, double: bool = True, batch: int = 2):
    target, _ = make_target(MODELS[name], batch, train_mode=train_mode, double=double)
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn((batch, *target.data.shape), generator=generator)
    return target, inputs.double() if double else inputs, torch.arange(batch)


def matcher(target, objective, factor: bool, dtype=torch.float64) -> GradientMatcher:
    return GradientMatcher(Replica(target, CPU, dtype), objective, "difference", factor)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.mark.parametrize("objective", [Cosine, L2])
@pytest.mark.parametrize(
    ("name", "train_mode"), [("resnet", False), ("resnet", True), ("vit", False)]
)
def test_products_change_nothing(name, train_mode, objective):
    target, inputs, labels = problem(name, train_mode)
    plain = matcher(target, objective(), False)
    factored = matcher(target, objective(), True)
    # A later call uses the weights that an earlier one moved.
    for x in (inputs, inputs + 0.1 * torch.randn_like(inputs)):
        expected, found = plain(x, labels), factored(x, labels)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=0)
        assert cosine(found.input_gradient, expected.input_gradient) > 1 - 1e-8
        ratio = found.input_gradient.norm() / expected.input_gradient.norm()
        assert float(ratio) == pytest.approx(1, abs=1e-4)
    assert factored._factored is not None, "no layer was factored: nothing was compared"
    assert plain._factored is None


@pytest.mark.parametrize("n", [1, 3])
def test_clients_that_share_such_weights_alone(n):
    target, inputs, labels = problem("resnet")
    late = [name for name in target.gradient if name.startswith("layer4") and "conv" in name][:n]
    target = dataclasses.replace(target, gradient={k: target.gradient[k] for k in late})
    expected = matcher(target, Cosine(), False)(inputs, labels)
    factored = matcher(target, Cosine(), True)
    found = factored(inputs, labels)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=0)
    assert cosine(found.input_gradient, expected.input_gradient) > 1 - 1e-8
    kept = [] if factored._factored is None else factored._factored._layers
    assert len(kept) == n - 1


def test_fully_connected_giants_in_float32():
    target, inputs, labels = problem("vgg", double=False, batch=1)
    exact = GradientMatcher(Replica(target, CPU), Cosine(), "exact")(inputs, labels)
    found = matcher(target, Cosine(), True, torch.float32)(inputs, labels)
    assert cosine(found.input_gradient, exact.input_gradient) > 0.9999


def test_near_a_match_products_are_not_trusted():
    target, truth = make_target(MODELS["resnet"], 2)
    found = matcher(target, Cosine(), True)
    inputs = target.data.normalize(truth.images.double())
    value = found(inputs + 1e-6 * torch.randn_like(inputs), truth.labels).value
    assert 0 < float(value) < 1e-6
    assert found._near > 0


def test_other_objectives_are_left_alone():
    target, inputs, labels = problem("resnet")
    found = matcher(target, LayerMeanCosine(), True)
    found(inputs, labels)
    assert found._factored is None


class Oddities(nn.Module):
    """Weights that are no plain layer's, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.scaled = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.twice(self.twice(self.plain(x)))).mean((2, 3))
        return F.linear(x, self.scaled.weight / self.scaled.weight.norm())


def test_only_plain_layers_are_factored():
    model = Oddities()
    names = [name for name, _ in model.named_parameters()]
    sizes = []

    def worth(*rows_patch_channels: int) -> bool:
        sizes.append(rows_patch_channels)
        return True

    layers = find_layers(model, list(model.parameters()), (2, 3, 8, 8), worth)
    assert [names[layer.index] for layer in layers] == ["plain.weight"]
    assert sizes == [(2 * 4 * 4, 3 * 3 * 3, 4)]


def test_few_rows_are_worth_it():
    assert saves_sweeps(16, 4608, 512, [1])
    assert not saves_sweeps(1024, 576, 64, [1])


def test_what_need_not_travel_is_worth_more_and_all_processes_agree(monkeypatch):
    assert not saves_sweeps(256, 4608, 512, [8])
    for rank, images in enumerate((5, 3)):
        monkeypatch.setattr("core.processes.distributed.rank", lambda rank=rank: rank)
        assert saves_sweeps(images * 32, 4608, 512, [5, 3])
        assert not saves_sweeps(images * 128, 4608, 512, [5, 3])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"), [(3, 1, 1), (1, 0, 1), (3, 2, 2), (3, 0, 1)]
)
def test_reordered_weights_convolve_alike(stride, kernel, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, kernel, kernel, generator=generator)
    x = torch.randn(2, 16, 9, 9, generator=generator).requires_grad_()
    expected = F.conv2d(x, weight, None, stride, padding, dilation)
    found = FixedConv2d(weight, stride, padding, dilation)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    seed = torch.randn(expected.shape, generator=generator)
    (wanted,) = torch.autograd.grad(expected, x, seed)
    (gotten,) = torch.autograd.grad(found, x, seed)
    torch.testing.assert_close(gotten, wanted, rtol=1e-4, atol=1e-4)


def test_without_the_operator_plain_convolutions_do(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(FixedConv2d(weight, 1, 1, 1)(x), F.conv2d(x, weight, padding=1))
