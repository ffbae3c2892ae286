"""The client's local SGD, from the model it received to the update it shares.

One implementation serves the client and the attacker: the client runs it once,
the attacker differentiates through it (`unrolled_update`, `create_graph=True`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss
from core.processes.distributed import shard_sizes, shard_slice
from core.target import LocalTraining

Parameters = dict[str, torch.Tensor]
# Gradient of one local step at the given parameters, in their order.
StepGradient = Callable[[Parameters, int], Sequence[torch.Tensor]]
# Which of a client's images a step uses.
Selection = slice | list[int]
# Sums a list of gradients over the client's processes.
Reduce = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Placement:
    """How a client's batch lies on its processes.

    Attributes:
        shards: Images per process; with asynchronous BatchNorm these are the groups
            that have statistics of their own. Empty: one group.
        part: The process that this one is; it computes its own share of every step
            only. None: all shards, one after the other.
        reduce: Sums gradients over processes, where `part` is given; differentiable
            if the update is to be differentiated.
        dropout_seed: Seeds the dropout masks of every step and shard; None leaves
            torch's random numbers as they are.
    """

    shards: tuple[int, ...] = ()
    part: int | None = None
    reduce: Reduce | None = None
    dropout_seed: int | None = None


ONE_PROCESS = Placement()


def own_parts(placement: Placement) -> Sequence[int]:
    """The shards that this process computes."""
    return range(len(placement.shards) or 1) if placement.part is None else [placement.part]


def images_of_steps(
    n: int, local: LocalTraining, shards: Sequence[int] = ()
) -> list[list[Selection]]:
    """Which images each local step uses, and how they are spread over processes.

    Args:
        n: Images of the client.
        local: Its local SGD; without an order of its own, every epoch passes over the same
            batches in order.
        shards: Images per process; several batches per epoch are each spread
            evenly over the processes.

    Returns:
        Per step, per process: which of the client's images.

    Raises:
        InputError: A process would be left without images in some step, or the steps have
            an order of their own and several processes.
    """
    if local.order is not None:
        return [[list(step)] for step in _checked_order(n, local.order, shards)]
    sizes = shard_sizes(n, local.batches)
    parts = len(shards) or 1
    epoch: list[list[Selection]] = []
    for index, size in enumerate(sizes):
        start = sum(sizes[:index])
        spread = list(shards) if shards and local.batches == 1 else shard_sizes(size, parts)
        if min(spread) < 1 or sum(spread) != size:
            raise InputError(
                f"a local batch of {size} images cannot be spread over {parts} processes as "
                f"{tuple(spread)}; change -b, --shards or --local-batches"
            )
        pieces = [shard_slice(spread, part) for part in range(parts)]
        epoch.append([slice(start + p.start, start + p.stop) for p in pieces])
    return epoch * local.epochs


def _checked_order(
    n: int, order: tuple[tuple[int, ...], ...], shards: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    if len(shards) > 1:
        raise InputError("local steps with an order of their own run on one process")
    if any(not step or not all(0 <= image < n for image in step) for step in order):
        raise InputError(f"the order of the local steps does not name images 0 to {n - 1} only")
    return order


def n_selected(selection: Selection) -> int:
    """How many images a selection holds."""
    if isinstance(selection, slice):
        return int(selection.stop) - int(selection.start)
    return len(selection)


def local_sgd(parameters: Parameters, local: LocalTraining, gradient: StepGradient) -> Parameters:
    """Run local SGD and return the update (theta_0 - theta_K) / (lr K).

    The update is summed from the steps' directions d_k, since theta_{k+1} =
    theta_k - lr d_k: the same value without subtracting nearly equal weights in
    float32. For K = 1 it is the gradient itself (plus weight decay).

    Args:
        parameters: theta_0; not changed.
        local: Steps, learning rate, momentum (as `torch.optim.SGD`, not Nesterov),
            weight decay and FedProx's proximal term.
        gradient: Gradient of step k at theta_k. If it is differentiable, so is the
            result.

    Returns:
        The update by parameter name, in the order of `parameters`.

    Source: FedProx (Li et al. 2020), eq. 2, https://arxiv.org/abs/1812.06127.
    """
    current = list(parameters.values())
    anchor = [p.detach() for p in current]
    velocity: list[torch.Tensor] | None = None
    total: list[torch.Tensor] | None = None
    for step in range(local.steps):
        direction = list(gradient(dict(zip(parameters, current, strict=True)), step))
        if local.proximal:
            direction = _add(direction, _add(current, anchor, -1.0), local.proximal)
        if local.weight_decay:
            direction = _add(direction, current, local.weight_decay)
        if local.momentum and velocity is not None:
            direction = _add(direction, velocity, local.momentum)
        velocity = direction
        total = direction if total is None else _add(total, direction, 1.0)
        if step + 1 < local.steps:
            current = _add(current, direction, -local.lr)
    assert total is not None
    mean = total if local.steps == 1 else [t / local.steps for t in total]
    return dict(zip(parameters, mean, strict=True))


def _add(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], factor: float
) -> list[torch.Tensor]:
    return [a + factor * b for a, b in zip(left, right, strict=True)]


def trainable_parameters(model: nn.Module) -> Parameters:
    """The parameters that the client trains and shares, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def unrolled_update(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    local: LocalTraining,
    *,
    create_graph: bool = True,
    placement: Placement = ONE_PROCESS,
    buffers: Mapping[str, torch.Tensor] | None = None,
    parameters: Parameters | None = None,
    loss: Loss = DEFAULT_LOSS,
) -> Parameters:
    """The update a client would share for `images`, as a differentiable function of them.

    The model is not touched: parameters and buffers are passed functionally.

    Args:
        model: Architecture and theta_0, in the mode the client runs it in. Its
            parameters that do not require gradients are frozen.
        images: N x C x H x W, normalised.
        labels: N x ..., as the loss takes them; floating-point ones are differentiable too.
        local: The client's local SGD.
        create_graph: Keep the graph for derivatives of the update.
        placement: Groups of images, processes and dropout masks.
        buffers: Take the changes of the running statistics of this (or the first)
            process; default: copies of the model's.
        parameters: theta_0 instead of the model's own.
        loss: What the client minimises.

    Returns:
        (theta_0 - theta_K) / (lr K) by parameter name; the gradient for one step.

    Raises:
        InputError: The images cannot be spread over the shards.

    Source: Geiping et al., "Inverting Gradients", section 6 (federated averaging),
        https://arxiv.org/abs/2003.14053.
    """
    gradient = client_gradient(
        model,
        images,
        labels,
        local,
        create_graph=create_graph,
        placement=placement,
        buffers=buffers,
        loss=loss,
    )
    start = trainable_parameters(model) if parameters is None else parameters
    if not create_graph:
        start = {name: p.detach() for name, p in start.items()}
    return local_sgd(start, local, gradient)


def client_gradient(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    local: LocalTraining,
    *,
    create_graph: bool = False,
    placement: Placement = ONE_PROCESS,
    buffers: Mapping[str, torch.Tensor] | None = None,
    loss: Loss = DEFAULT_LOSS,
) -> StepGradient:
    """The gradient of a client's loss at each of its local steps, see `unrolled_update`."""
    steps = images_of_steps(len(images), local, placement.shards)
    parts = own_parts(placement)
    moving = _copies(dict(model.named_buffers())) if buffers is None else buffers

    def gradient(current: Parameters, step: int) -> Sequence[torch.Tensor]:
        if not create_graph:
            # Without the cut, memory would grow with the number of steps.
            current = {name: p.detach().requires_grad_() for name, p in current.items()}
        pieces = steps[step]
        n_step = sum(map(n_selected, pieces))
        total: list[torch.Tensor] | None = None
        for index in parts:
            piece = pieces[index]
            with dropout_masks(placement.dropout_seed, step, index, images.device):
                share = _weighted_gradient(
                    model,
                    loss,
                    # Every process moves buffers of its own; the first one's are shared.
                    {**(moving if index == parts[0] else _copies(moving)), **current},
                    list(current.values()),
                    images[piece],
                    labels[piece],
                    n_selected(piece) / n_step,
                    create_graph,
                )
            total = share if total is None else _add(total, share, 1.0)
        assert total is not None
        return total if placement.reduce is None else placement.reduce(total)

    return gradient


def _copies(tensors: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _weighted_gradient(
    model: nn.Module,
    client_loss: Loss,
    state: Mapping[str, torch.Tensor],
    parameters: Sequence[torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    weight: float,
    create_graph: bool,
) -> list[torch.Tensor]:
    """Gradient of weight x (the client's loss); zero for parameters that are not used."""
    loss = client_loss(torch.func.functional_call(model, dict(state), (images,)), labels)
    if weight != 1:
        loss = weight * loss
    gradients = torch.autograd.grad(
        loss, list(parameters), create_graph=create_graph, allow_unused=True
    )
    return [
        torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)
    ]


@contextlib.contextmanager
def dropout_masks(seed: int | None, step: int, shard: int, device: torch.device) -> Iterator[None]:
    """Draw the dropout masks of one step and shard from a seed of their own.

    Args:
        seed: None leaves torch's random numbers as they are.
        step: Number of the local step, from 0.
        shard: Index of the process; so that several processes and one process that
            plays them all draw the same masks.
        device: Device that the model runs on.
    """
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + 1_000_003 * step + 7_919 * shard)
        yield
