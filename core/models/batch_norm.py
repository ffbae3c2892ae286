"""BatchNorm over several processes, and several processes' BatchNorm in one.

*Synchronized*: every process normalises with the statistics of the whole batch.
*Asynchronous*: every process normalises with those of its own shard; plain
BatchNorm does just that, and `GroupedBatchNorm` simulates it inside one process.

Both can be differentiated twice, which gradient matching needs and
`torch.nn.SyncBatchNorm` does not offer (nor does it run on a CPU). Names and shapes
of parameters and buffers are those of `torch.nn.BatchNorm*`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from core.models.kinds import BatchNorm
from core.processes.distributed import all_reduce, shard_sizes, world_size


def _summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over processes, in place."""
    if group is None:
        return all_reduce(tensor)
    dist.all_reduce(tensor, group=group)
    return tensor


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; its derivative is a sum over processes again, to any order.

    Every process computes y = sum_s x_s, and what is differentiated is the sum of all
    processes' losses: dL/dx_s = sum_r dL/dy_r.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        return _summed(total, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return differentiable_all_reduce(grad, ctx.group), None


def differentiable_all_reduce(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Sum `tensor` over all processes, differentiable to any order.

    Every process must call it, and differentiate through it, in the same order: each
    derivative is a collective operation of its own.

    Args:
        tensor: Same shape on every process.
        group: Process group; None for all processes.

    Returns:
        The sum, on every process; `tensor` itself where there is one process.
    """
    if world_size() == 1:
        return tensor
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return _summed(tensor.clone(memory_format=torch.contiguous_format), group)
    return _AllReduceSum.apply(tensor, group)


class _SharedBatchNorm(BatchNorm):
    """What both kinds have in common: shapes, evaluation mode, running statistics."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected N x C x ..., got a tensor of {input.dim()} dimensions")

    @property
    def _uses_batch_statistics(self) -> bool:
        return self.training or self.running_mean is None

    def _with_running_statistics(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_var.detach().to(self.running_var.dtype), factor)


class Moments(NamedTuple):
    """Mean and variance of a batch over all processes, by channel.

    Attributes:
        mean: Mean of each of the C channels.
        var: Biased, C.
        n: Values of each channel, C.
    """

    mean: torch.Tensor
    var: torch.Tensor
    n: torch.Tensor


def batch_moments(x: torch.Tensor, group: Any = None) -> Moments:
    """Moments of a batch of which every process has a shard, differentiable to any order.

    Every shard's own (count, mean, M2) travel in one collective and are merged with the
    parallel algorithm of Chan, Golub and LeVeque (1979), which does not cancel where the
    mean is large as a sum of squares would.

    Args:
        x: This process's shard, N_r x C x ...
        group: Process group; None for all processes.
    """
    n, mean, m2 = _of_shard(x)
    table = _gathered(torch.stack([torch.full_like(mean, n), mean, m2]), group)
    if len(table) == 1:
        return Moments(mean, m2 / n, table[0, 0])
    counts, means, m2s = table.unbind(1)
    total = counts.sum(0)
    whole_mean = (counts * means).sum(0) / total
    whole_m2 = m2s.sum(0) + (counts * (means - whole_mean).square()).sum(0)
    return Moments(whole_mean, whole_m2 / total, total)


def _of_shard(x: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Values of a channel, their mean and the sum of their squared distances from it."""
    # Half precision would lose the sums.
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # One value per channel in a row: channels last, nothing is copied. `torch.var_mean` takes
    # ten times as long.
    rows = x.movedim(1, -1).flatten(0, -2)
    n = len(rows)
    mean = rows.sum(0) / max(n, 1)
    return n, mean, (rows - mean).square().sum(0)


def _gathered(mine: torch.Tensor, group: Any) -> torch.Tensor:
    """Every process's values, stacked.

    A gather, written as the sum of tables that are zero but for one row each: its
    derivatives are then sums as well, on every backend.
    """
    if world_size() == 1:
        return mine[None]
    table = mine.new_zeros(dist.get_world_size(group), *mine.shape)
    table[dist.get_rank(group)] = mine
    return differentiable_all_reduce(table, group)


def _by_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """C values, to be combined with N x C x ..."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def _normalised(
    x: torch.Tensor,
    moments: Moments,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """A shard with the whole batch's moments, differentiable to any order."""
    scale = torch.rsqrt(moments.var + eps)
    if weight is not None:
        scale = scale * weight
    normalised = (x - _by_channel(moments.mean, x)) * _by_channel(scale, x)
    return normalised if bias is None else normalised + _by_channel(bias, x)


class _SynchronizedKernels(torch.autograd.Function):
    """Synchronized BatchNorm by PyTorch's kernels for fixed statistics.

    They leave out what the statistics' own dependence on the batch adds to the derivative,

        dL/dx = s (dL/dy - (sum dL/dy + x^ sum (dL/dy x^)) / n),    s = weight / sqrt(var + eps),

    with sums over the whole batch. To differentiate that once more, it is formed again from
    differentiable parts.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, section 3,
    https://arxiv.org/abs/1502.03167.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        group: Any,
    ) -> tuple[torch.Tensor, ...]:
        moments = batch_moments(x, group)
        y = (
            F.batch_norm(x, moments.mean, moments.var, weight, bias, False, 0.0, eps)
            if len(x)
            else x
        )
        ctx.save_for_backward(x, weight, bias, *moments)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(*moments)
        return y, *moments

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, *moments = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiable_backward(ctx, x, weight, bias, grad)
        else:
            found = _backward_by_kernels(ctx, x, weight, bias, Moments(*moments), grad)
        return *found, None, None


def _differentiable_backward(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grad: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    y = _normalised(x, batch_moments(x, ctx.group), weight, bias, ctx.eps)
    wanted = [
        t if need else None
        for t, need in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
    ]
    variables = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(y, variables, grad, create_graph=True))
    return tuple(None if t is None else next(found) for t in wanted)


def _backward_by_kernels(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    moments: Moments,
    grad: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    mean, var, n = moments
    # Without a weight the kernel gives no sums: it takes ones.
    scale = torch.ones_like(mean) if weight is None else weight
    inner, times_normalised, alone = grad, torch.zeros_like(mean), torch.zeros_like(mean)
    if len(x):
        inner, times_normalised, alone = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
    sums = _summed(torch.stack([alone, times_normalised]), ctx.group)
    precision = torch.rsqrt(var + ctx.eps)
    constant, slope = sums * (scale * precision / n)
    slope = slope * precision
    inner.addcmul_(x, _by_channel(slope, x), value=-1)
    inner.sub_(_by_channel(constant - slope * mean, x))
    return inner, *(
        None if p is None else g for p, g in ((weight, times_normalised), (bias, alone))
    )


class SynchronizedBatchNorm(_SharedBatchNorm):
    """BatchNorm with the statistics of the batch over all processes, twice differentiable.

    Shards may differ in size and may be empty. With W processes, values, first and
    second derivatives and running statistics are those of one process that holds the
    whole batch. Collectives run in the forward pass and in each derivative; every
    process must differentiate, whatever its shard.

    Args:
        num_features: Number of channels.
        process_group: Processes to synchronize over; None for all.
        **options: As for `torch.nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int, process_group: Any = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.process_group = process_group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise this process's shard (N_r x C x ...)."""
        self._check_input_dim(input)
        if not self._uses_batch_statistics:
            return self._with_running_statistics(input)
        normalised: torch.Tensor = self._synchronized(input)
        return normalised

    def _synchronized(self, input: torch.Tensor) -> torch.Tensor:
        if world_size() > 1 and input.dtype in (torch.float32, torch.float64):
            normalised, moments = self._by_kernels(input)
        else:
            moments = batch_moments(input, self.process_group)
            normalised = _normalised(input, moments, self.weight, self.bias, self.eps)
        self._update_running(moments.mean, moments.var * moments.n / (moments.n - 1).clamp(min=1))
        return normalised

    def _by_kernels(self, x: torch.Tensor) -> tuple[torch.Tensor, Moments]:
        y, *moments = _SynchronizedKernels.apply(
            x, self.weight, self.bias, self.eps, self.process_group
        )
        return y, Moments(*moments)


def leave_synchronization_to_python() -> None:
    """Make `torch.compile` leave synchronized BatchNorm as it is; call before it.

    A compiler would take what other processes send for constants. Not done where the layer is
    defined, since the compiler takes a second to import.
    """
    layer: Any = SynchronizedBatchNorm
    if not hasattr(layer._synchronized, "__wrapped__"):
        layer._synchronized = torch.compiler.disable(layer._synchronized)


class GroupedBatchNorm(_SharedBatchNorm):
    """Asynchronous BatchNorm inside one process: every group has its own statistics.

    It simulates the shards of several processes. The running statistics follow the
    average over groups, weighted by group size, of the groups' statistics: the same as
    the average of the running statistics that separate processes would keep.

    Args:
        num_features: Number of channels.
        groups: A number of groups, over which a batch is divided as evenly as
            possible, or the groups' sizes, which must sum to the batch size.
        **options: As for `torch.nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int, groups: int | Sequence[int] = 1, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.groups = groups if isinstance(groups, int) else tuple(groups)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise the whole batch (N x C x ...), group by group."""
        self._check_input_dim(input)
        if not self._uses_batch_statistics:
            return self._with_running_statistics(input)
        parts = input.split(group_sizes(self.groups, len(input)))
        self._track(parts)
        return torch.cat([self._normalised(part) for part in parts])

    def _normalised(self, part: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @torch.no_grad()
    def _track(self, parts: Sequence[torch.Tensor]) -> None:
        means, variances, weights = [], [], []
        for part in parts:
            n, mean, m2 = _of_shard(part)
            means.append(mean)
            variances.append(m2 / max(n - 1, 1))
            weights.append(len(part))
        share = torch.tensor(weights, dtype=means[0].dtype, device=means[0].device)
        share = (share / share.sum())[:, None]
        self._update_running(
            (share * torch.stack(means)).sum(0), (share * torch.stack(variances)).sum(0)
        )


def group_sizes(groups: int | Sequence[int], batch_size: int) -> list[int]:
    """The sizes of the groups that a batch is cut into; empty groups are left out.

    Raises:
        InputError: Given sizes do not sum to the batch size.
    """
    if isinstance(groups, int):
        return [size for size in shard_sizes(batch_size, groups) if size]
    if sum(groups) != batch_size:
        raise InputError(
            f"BatchNorm groups {tuple(groups)} do not sum to the batch size {batch_size}"
        )
    return [size for size in groups if size]


Build = Callable[[BatchNorm, dict[str, Any]], BatchNorm]


class OneProcessBatchNorm(_SharedBatchNorm):
    """What `torch.nn.SyncBatchNorm` is on one process: BatchNorm for any number of dimensions."""


def without_synchronization(model: nn.Module) -> nn.Module:
    """Replace every `torch.nn.SyncBatchNorm`, which runs nowhere but in a process group on GPUs.

    Args:
        model: Changed in place; parameters, buffers and names stay.

    Returns:
        The model (a new module where the model itself is one).
    """
    return _replace(
        model,
        lambda old, options: OneProcessBatchNorm(old.num_features, **options),
        nn.SyncBatchNorm,
    )


def convert_batch_norm(
    model: nn.Module,
    kind: str,
    *,
    groups: int | Sequence[int] = 1,
    process_group: Any = None,
) -> nn.Module:
    """Replace every BatchNorm of a model; parameters, buffers and names stay.

    Args:
        model: Changed in place.
        kind: "synchronized" or "grouped". The latter with one group is plain
            BatchNorm, asynchronous between processes.
        groups: For "grouped": number or sizes of groups, see `GroupedBatchNorm`.
        process_group: For "synchronized".

    Returns:
        The model (a new module where the model itself is a BatchNorm).
    """
    if kind == "synchronized":
        return _replace(
            model, lambda old, o: SynchronizedBatchNorm(old.num_features, process_group, **o)
        )
    if kind == "grouped":
        return _replace(model, lambda old, o: GroupedBatchNorm(old.num_features, groups, **o))
    raise ValueError(f"unknown kind of BatchNorm {kind!r}")


def _replace(module: nn.Module, build: Build, kind: type[BatchNorm] = BatchNorm) -> nn.Module:
    if isinstance(module, kind):
        return _with_state_of(module, build)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, build, kind))
    return module


def _with_state_of(old: BatchNorm, build: Build) -> BatchNorm:
    """A new layer that shares the old one's parameters and buffers."""
    options = {
        "eps": old.eps,
        "momentum": old.momentum,
        "affine": old.affine,
        "track_running_stats": old.track_running_stats,
    }
    new = build(old, options)
    for name in ("weight", "bias"):
        setattr(new, name, getattr(old, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give every process the average of all processes' running statistics, in place.

    After asynchronous training each process has its own. Running statistics are linear
    in the batches', so averaging now and then equals averaging at the end.
    """
    if world_size() == 1:
        return
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = all_reduce(torch.cat([buffer.flatten() for buffer in buffers])) / world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@contextlib.contextmanager
def explain_single_values(advice: str) -> Iterator[None]:
    """Turn torch's complaint about one value per channel into one about the command line.

    Args:
        advice: What to say instead, naming the flags to change.

    Raises:
        InputError: A BatchNorm layer in train mode had a single value to normalise over.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(advice) from None
