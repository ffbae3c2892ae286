"""Layers that the passes of the difference replace give what PyTorch's own give."""

import pytest
import torch
import torch.nn.functional as F

from attack.matching.late_layers import Geometry, Windows
from attack.matching.switches import RecordActivations, ReplayActivations


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
