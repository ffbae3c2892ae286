"""Lists of operators: constants computed once, and small convolutions as matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack.matching.plain_operators import plain_operators
from attack.matching.small_convolutions import all_are_small, write_out_small_convolutions
from core.models.building import ModelSpec, build_model

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
# Kernel, stride, padding.
GEOMETRIES: list[tuple[Any, Any, Any]] = [
    (1, 1, 0),
    (1, 2, 0),
    (3, 1, 1),
    (3, 2, 1),
    (5, 2, 2),
    (5, 1, 0),
    ((3, 1), (2, 1), (1, 0)),
    ((2, 5), (1, 3), (0, 2)),
]


def targets_of(module: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes]


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_small_convolutions_and_their_derivatives_are_products(
    kernel: Any, stride: Any, padding: Any, batch: int, biased: bool
) -> None:
    layer = nn.Conv2d(3, 4, kernel, stride, padding, bias=biased).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((batch, 3, 9, 8), generator=generator, dtype=torch.float64)
    parameters = [p.detach() for p in layer.parameters()]

    def passes(x: torch.Tensor, *theta: torch.Tensor) -> list[torch.Tensor]:
        x, *leaves = (t.detach().requires_grad_() for t in (x, *theta))
        out = F.conv2d(x, leaves[0], leaves[1] if biased else None, stride, padding)
        found = torch.autograd.grad(out.sin().sum(), [x, *leaves])
        return [out.detach(), *(g.detach() for g in found)]

    module = plain_operators(passes, (inputs, *parameters))
    assert set(CONVOLUTIONS) <= set(targets_of(module))
    write_out_small_convolutions(module)
    assert not set(CONVOLUTIONS) & set(targets_of(module))
    # Others than it was written down for.
    other = [inputs.flip(0) + 0.1, *(p * 1.5 for p in parameters)]
    torch.testing.assert_close(module(*other), passes(*other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
    ],
    ids=["groups", "dilation", "transposed", "reflected"],
)
def test_other_convolutions_are_what_they_were(layer: nn.Module) -> None:
    inputs = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    layer.requires_grad_(False)
    module = plain_operators(lambda x: layer(x), (inputs,))
    write_out_small_convolutions(module)
    torch.testing.assert_close(module(inputs), layer(inputs))
    assert not all_are_small(nn.Sequential(layer), inputs.shape)


def test_a_convolution_of_many_images_is_left_to_the_library() -> None:
    layer = nn.Conv2d(3, 4, 3).requires_grad_(False)
    inputs = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    module = plain_operators(lambda x: layer(x), (inputs,))
    write_out_small_convolutions(module)
    assert CONVOLUTIONS[0] in targets_of(module)


def test_which_models_have_small_convolutions_alone() -> None:
    lenet = build_model(ModelSpec("lenet", 10, 32))
    assert all_are_small(lenet, (2, 3, 32, 32))
    assert not all_are_small(lenet, (3, 3, 32, 32))
    assert lenet.training
    assert not all_are_small(build_model(ModelSpec("mlp", 10, 8, width=4)), (1, 3, 8, 8))
    assert not all_are_small(build_model(ModelSpec("convnet", 10, 32)), (1, 3, 32, 32))
    # It says why itself, once it is called.
    assert not all_are_small(nn.Sequential(nn.Conv2d(4, 4, 3)), (1, 3, 8, 8))


def test_what_does_not_depend_on_values_is_computed_once() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        twos = (torch.ones_like(x) * 2).expand(3, *x.shape)
        return x + twos.sum(0), torch.zeros_like(x)

    inputs = torch.arange(4.0)
    module = plain_operators(function, (inputs,))
    assert aten.ones_like.default not in targets_of(module)
    found, zeros = module(inputs + 1)
    assert torch.equal(found, inputs + 7)
    # What is given away belongs to the caller.
    zeros += 5
    assert torch.equal(module(inputs)[1], torch.zeros(4))


def test_random_numbers_and_what_is_written_into_are_no_constants() -> None:
    def drawing(x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.ones_like(x) / 2)

    def writing(x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros_like(x)
        sums[1:] += x[1:]
        return sums + x

    inputs = torch.ones(64)
    drawn = plain_operators(drawing, (inputs,))
    torch.manual_seed(0)
    assert not torch.equal(drawn(inputs), drawn(inputs))
    written = plain_operators(writing, (inputs,))
    for factor in (1.0, 2.0):
        assert torch.equal(written(inputs * factor), writing(inputs * factor))
