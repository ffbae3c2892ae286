"""Layers computed in other ways against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from attack.matching import strided_convolutions as folded
from attack.matching.late_layers import Geometry, Windows
from attack.matching.strided_convolutions import convolve
from attack.matching.switches import RecordActivations, ReplayActivations


@pytest.fixture
def pixel_unshuffles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Factors by which pixels were folded."""
    found: list[int] = []
    plain = F.pixel_unshuffle

    def noted(x: torch.Tensor, factor: int) -> torch.Tensor:
        found.append(factor)
        return plain(x, factor)

    monkeypatch.setattr(folded.F, "pixel_unshuffle", noted)
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((20, 20), 7, 2, 3),
        ((21, 18), 7, (2, 2), (3, 2)),
        ((23, 23), 11, 4, 2),
        ((16, 24), 8, 8, 0),
        # The last pixels are read by no kernel.
        ((19, 17), 5, 3, 0),
    ],
)
def test_folding_changes_nothing(size, kernel, stride, padding, layout, pixel_unshuffles):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(5, 3, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    results = []
    for function in (F.conv2d, convolve):
        y = function(*leaves, stride, padding)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[1].square().sum(), leaves[:2])
        results.append((y, *first, *second))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-8)
    assert pixel_unshuffles, "nothing was folded: nothing was compared"


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 1, "padding": "same"},
        {"stride": 1},
        {"stride": (2, 1)},
        {"stride": 2, "dilation": 2},
        {"stride": 2, "groups": 3},
    ],
)
def test_other_convolutions_are_left_alone(arguments, pixel_unshuffles):
    x = torch.randn(2, 3, 20, 20)
    weight = torch.randn(6, 3 // arguments.get("groups", 1), 5, 5)
    torch.testing.assert_close(
        convolve(x, weight, **arguments), F.conv2d(x, weight, **arguments), rtol=0, atol=0
    )
    assert not pixel_unshuffles


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_replays_what_it_recorded(layout):
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=layout).requires_grad_()
    with RecordActivations() as record:
        pooled = F.max_pool2d(x, 3, 2, 1)
    with ReplayActivations(record.replays, record.switches):
        again = F.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(again, pooled, rtol=0, atol=0)
    assert again.is_contiguous(memory_format=layout)
    weights = torch.randn_like(pooled)
    gradients = [torch.autograd.grad(y, x, weights)[0] for y in (pooled, again)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), 1, 1, 1),
        ((3, 2), (2, 1), (0, 1), (1, 2)),
        ((1, 1), 2, 0, 1),
        ((5, 5), 2, 2, 1),
        ((1, 1), 1, 0, 1),
    ],
)
def test_windows_are_unfolded_images(kernel, stride, padding, dilation, layout):
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64).contiguous(memory_format=layout)
    windows = Windows(Geometry(kernel, stride, padding, dilation), x.shape)
    found = windows.gather(x)
    x.requires_grad_()
    columns = F.unfold(x, kernel, dilation, padding, stride)
    # S x C x taps to S x taps x C.
    expected = columns.transpose(1, 2).flatten(0, 1).unflatten(1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(found, expected.flatten(1).detach(), rtol=0, atol=0)
    weights = torch.randn_like(found)
    gradient = torch.autograd.grad(expected.flatten(1), x, weights)[0]
    torch.testing.assert_close(windows.scatter(weights), gradient)
