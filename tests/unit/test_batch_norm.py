"""BatchNorm inside one process, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import InputError
from core.models.batch_norm import (
    GroupedBatchNorm,
    SynchronizedBatchNorm,
    average_running_statistics,
    convert_batch_norm,
    group_sizes,
)
from core.models.building import ModelSpec, build_model


def batch(n: int = 8, *shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, 4, *(shape or (5, 5)), dtype=torch.float64) * 2 + 3


@pytest.mark.parametrize("layer", [SynchronizedBatchNorm, GroupedBatchNorm])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("shape", [(5, 5), (7,), ()])
def test_one_process_one_group_is_plain_batch_norm(
    layer: type, momentum: float | None, shape: tuple[int, ...]
) -> None:
    x = torch.randn(8, 4, *shape, dtype=torch.float64) * 2 + 3
    plain = (nn.BatchNorm2d if len(shape) == 2 else nn.BatchNorm1d)(4, momentum=momentum).double()
    ours = layer(4, momentum=momentum).double()
    for _ in range(3):
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(ours.eval()(x + 1), plain.eval()(x + 1))


def test_without_running_statistics_or_parameters() -> None:
    x = batch()
    plain = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ours = SynchronizedBatchNorm(4, affine=False, track_running_stats=False)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("layer", [SynchronizedBatchNorm, GroupedBatchNorm])
def test_gradgradcheck(layer: type) -> None:
    norm = layer(4, track_running_stats=False).double()
    x = batch(4, 2).requires_grad_(True)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def apply(*tensors: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(("weight", "bias"), tensors[1:], strict=True))
        return torch.func.functional_call(norm, parameters, tensors[0])

    assert torch.autograd.gradcheck(apply, (x, weight, bias))
    assert torch.autograd.gradgradcheck(apply, (x, weight, bias))


def test_groups_are_batch_norms_of_their_own() -> None:
    x, sizes = batch(), [5, 1, 2]
    grouped = GroupedBatchNorm(4, sizes).double()
    parts = [nn.BatchNorm2d(4).double() for _ in sizes]
    expected = [norm(part) for norm, part in zip(parts, x.split(sizes), strict=True)]
    torch.testing.assert_close(grouped(x), torch.cat(expected))
    mean = sum(n / 8 * norm.running_mean for n, norm in zip(sizes, parts, strict=True))
    torch.testing.assert_close(grouped.running_mean, mean)


def test_group_sizes() -> None:
    assert group_sizes(3, 8) == [3, 3, 2]
    assert group_sizes(4, 2) == [1, 1]
    assert group_sizes([5, 0, 3], 8) == [5, 3]
    with pytest.raises(InputError, match="do not sum to the batch size 9"):
        group_sizes([5, 3], 9)


@pytest.mark.parametrize("kind", ["synchronized", "grouped"])
def test_conversion_keeps_names_parameters_and_mode(kind: str) -> None:
    model = build_model(ModelSpec("resnet18", 10, 32, "cifar", width=4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    converted = convert_batch_norm(model, kind, groups=2)
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert list(converted.state_dict()) == list(before)
    torch.testing.assert_close(dict(converted.state_dict()), before)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert not any(m.training for m in converted.modules())


def test_averaging_needs_no_group() -> None:
    model = nn.BatchNorm2d(4)
    average_running_statistics(model)
    assert model.running_mean is not None
    assert not model.running_mean.any()


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        convert_batch_norm(nn.BatchNorm2d(3), "weird")
