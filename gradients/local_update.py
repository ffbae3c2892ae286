"""The client's local training, from the model it received to the update it shares.

One implementation serves the client and the attacker: the client runs it once,
the attacker differentiates through it (`unrolled_update`, `create_graph=True`). Over many
steps the attacker keeps the graph of a few of them at a time (`gradients.recomputed_steps`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from core.errors import InputError
from core.local_training import LocalTraining
from core.losses import DEFAULT_LOSS, Loss
from core.processes.distributed import shard_sizes, shard_slice
from gradients.optimisers import Memory, clipped, optimiser_of
from gradients.recomputed_steps import recomputed

Parameters = dict[str, torch.Tensor]
# One per parameter; None where the loss does not depend on it.
Gradients = Sequence[torch.Tensor | None]
# Gradient of one local step at the given parameters, in their order.
StepGradient = Callable[[Parameters, int], Gradients]
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
# From so many steps of the optimiser on, they are recomputed instead of kept.
RECOMPUTED_FROM = 16


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
    """Run local training and return the update (theta_0 - theta_K) / (lr K).

    The update is summed from the steps' directions d_k, since theta_{k+1} =
    theta_k - lr_k d_k: the same value without subtracting nearly equal weights in
    float32. For K = 1 step of plain SGD it is the gradient itself (plus weight decay).

    As in `torch.optim`, a parameter without a gradient keeps its value and has no weight
    decay and no momentum in that step. FedProx's term gives every parameter a gradient.

    Args:
        parameters: theta_0; not changed.
        local: Steps, optimiser, clipping, schedule and FedProx's proximal term.
        gradient: Gradient of step k at theta_k. If it is differentiable, so is the
            result.

    Returns:
        The update by parameter name, in the order of `parameters`.

    Source: FedProx (Li et al. 2020), eq. 2, https://arxiv.org/abs/1812.06127.
    """
    start = Progress.at(list(parameters.values()))
    run = _Run(tuple(parameters), local, [p.detach() for p in start.current])
    return run.update(run.advance(start, gradient, 0, local.updates))


@dataclass
class Progress:
    """Where local training stands.

    Attributes:
        current: The parameters theta_k.
        memories: What the optimiser remembers of each.
        total: The sum of lr_k / lr times the directions so far, per parameter; None where
            it has not had a gradient.
    """

    current: list[torch.Tensor]
    memories: list[Memory]
    total: list[torch.Tensor | None]

    @staticmethod
    def at(parameters: list[torch.Tensor]) -> Progress:
        """Before the first step."""
        return Progress(parameters, [Memory()] * len(parameters), [None] * len(parameters))


@dataclass(frozen=True)
class _Run:
    """The optimiser's steps of one local training.

    Attributes:
        names: Of the parameters.
        local: The local training.
        anchor: theta_0, which FedProx ties the parameters to.
    """

    names: tuple[str, ...]
    local: LocalTraining
    anchor: Sequence[torch.Tensor]

    def advance(self, at: Progress, gradient: StepGradient, first: int, last: int) -> Progress:
        """Take the steps first, ..., last - 1 of the optimiser."""
        rates = self.local.learning_rates()
        for update in range(first, last):
            found = self._gradient(at.current, gradient, update)
            # Nobody looks at the parameters after the last step.
            at = self._step(at, found, rates[update], update + 1 < self.local.updates)
        return at

    def _gradient(self, current: list[torch.Tensor], gradient: StepGradient, k: int) -> Gradients:
        """What `torch.optim` finds in `grad` before step k."""
        named = dict(zip(self.names, current, strict=True))
        batches = range(k * self.local.accumulate, (k + 1) * self.local.accumulate)
        found = _mean([gradient(named, batch) for batch in batches])
        if self.local.proximal:
            drift = _add(current, self.anchor, -1.0)
            found = _add(filled(found, current), drift, self.local.proximal)
        if self.local.clip_norm is not None:
            found = clipped(found, self.local.clip_norm)
        return found

    def _step(self, at: Progress, gradients: Gradients, rate: float, moves: bool) -> Progress:
        optimiser, after = optimiser_of(self.local), Progress([], [], [])
        share = rate / self.local.lr
        for p, g, memory, total in zip(at.current, gradients, at.memories, at.total, strict=True):
            if g is not None:
                direction, memory = optimiser.step(p, g, memory)
                part = direction if share == 1 else share * direction
                total = part if total is None else total + part
                p = p + -rate * direction if moves else p
            after.current.append(p)
            after.memories.append(memory)
            after.total.append(total)
        return after

    def update(self, end: Progress) -> Parameters:
        """What is shared after the last step."""
        total, updates = filled(end.total, end.current), self.local.updates
        mean = total if updates == 1 else [t / updates for t in total]
        return dict(zip(self.names, mean, strict=True))


def _mean(batches: Sequence[Gradients]) -> Gradients:
    """The mean over batches; a parameter that only some of them use has a gradient."""
    if len(batches) == 1:
        return batches[0]
    used = [[g for g in one if g is not None] for one in zip(*batches, strict=True)]
    return [torch.stack(one).sum(0) / len(batches) if one else None for one in used]


def filled(gradients: Gradients, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros where there is no gradient."""
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, like, strict=True)]


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
    segments: int | None = None,
) -> Parameters:
    """The update a client would share for `images`, as a differentiable function of them.

    The model is not touched: parameters and buffers are passed functionally.

    Args:
        model: Architecture and theta_0, in the mode the client runs it in. Its
            parameters that do not require gradients are frozen.
        images: N x C x H x W, normalised.
        labels: N x ..., as the loss takes them; floating-point ones are differentiable too.
        local: The client's local training.
        create_graph: Keep the graph for derivatives of the update.
        placement: Groups of images, processes and dropout masks.
        buffers: Take the changes of the running statistics of this (or the first)
            process; default: copies of the model's.
        parameters: theta_0 instead of the model's own.
        loss: What the client minimises.
        segments: Into how many parts the steps are cut for the derivative; of one at a time
            the graph is kept, the others are computed again from where they began. More than
            one allows a first derivative only. 1 keeps everything, which a penalty on the
            forward passes needs. None: the root of their number from 16 steps on.

    Returns:
        (theta_0 - theta_K) / (lr K) by parameter name; the gradient for one step.

    Raises:
        InputError: The images cannot be spread over the shards.

    Source: Geiping et al., "Inverting Gradients", section 6 (federated averaging),
        https://arxiv.org/abs/2003.14053; the root of the number of steps: Chen et al.,
        "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174.
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
    if segments is None:
        segments = math.isqrt(local.updates) if local.updates >= RECOMPUTED_FROM else 1
    if segments <= 1:
        return local_sgd(start, local, gradient)
    return _recomputed_update(start, local, gradient, segments)


def _recomputed_update(
    parameters: Parameters, local: LocalTraining, gradient: ClientGradient, segments: int
) -> Parameters:
    """`local_sgd`, of whose graph one segment is kept at a time."""
    at = Progress.at(list(parameters.values()))
    run = _Run(tuple(parameters), local, [p.detach() for p in at.current])
    first = 0
    for size in shard_sizes(local.updates, min(segments, local.updates)):
        at = _recomputed_segment(run, at, gradient, first, first + size)
        first += size
    return run.update(at)


def _recomputed_segment(
    run: _Run, at: Progress, gradient: ClientGradient, first: int, last: int
) -> Progress:
    """The steps first, ..., last - 1, computed again when they are differentiated."""
    before, shape = _flat(at)
    # A second computation must see the buffers as the first did, and move them no more.
    buffers = _copies(gradient.buffers)
    after: list[_Shape] = []

    def steps(tensors: list[torch.Tensor], again: bool) -> list[torch.Tensor]:
        images, labels, *rest = tensors
        moving = _copies(buffers) if again else gradient.buffers
        mine = replace(gradient, images=images, labels=labels, buffers=moving, create_graph=again)
        found, found_shape = _flat(run.advance(_unflat(rest, shape), mine, first, last))
        after[:] = [found_shape]
        return found

    seeded = gradient.placement.dropout_seed is not None
    found = recomputed(steps, [gradient.images, gradient.labels, *before], seeded)
    return _unflat(found, after[0])


@dataclass(frozen=True)
class _Shape:
    """How the tensors of a `Progress` lie in a list.

    Attributes:
        counts: Steps that each parameter took part in.
        memories: Tensors that the optimiser remembers of each.
        totals: Whether there is a sum of directions of each.
    """

    counts: list[int]
    memories: list[int]
    totals: list[bool]


def _flat(at: Progress) -> tuple[list[torch.Tensor], _Shape]:
    shape = _Shape(
        [memory.count for memory in at.memories],
        [len(memory.tensors) for memory in at.memories],
        [total is not None for total in at.total],
    )
    remembered = [tensor for memory in at.memories for tensor in memory.tensors]
    return [*at.current, *remembered, *(t for t in at.total if t is not None)], shape


def _unflat(tensors: Sequence[torch.Tensor], shape: _Shape) -> Progress:
    rest = iter(tensors)
    current = [next(rest) for _ in shape.counts]
    memories = [
        Memory(count, tuple(next(rest) for _ in range(n)))
        for count, n in zip(shape.counts, shape.memories, strict=True)
    ]
    return Progress(current, memories, [next(rest) if known else None for known in shape.totals])


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
) -> ClientGradient:
    """The gradient of a client's loss at each of its local steps, see `unrolled_update`.

    Where no buffers are given, copies of the model's are moved.
    """
    steps = images_of_steps(len(images), local, placement.shards)
    moving = _copies(dict(model.named_buffers())) if buffers is None else buffers
    return ClientGradient(model, images, labels, steps, placement, moving, create_graph, loss)


@dataclass(frozen=True)
class ClientGradient:
    """The gradient of a client's loss at each of its local steps, see `unrolled_update`.

    Attributes:
        model: Architecture, in the mode the client runs it in.
        images: N x C x H x W, normalised.
        labels: N x ..., as the loss takes them.
        steps: The images of every step, per process.
        placement: Groups of images, processes and dropout masks.
        buffers: Take the changes of the running statistics.
        create_graph: Keep the graph for derivatives of the gradient.
        loss: What the client minimises.
    """

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    steps: Sequence[Sequence[Selection]]
    placement: Placement
    buffers: Mapping[str, torch.Tensor]
    create_graph: bool = False
    loss: Loss = DEFAULT_LOSS

    def __call__(self, current: Parameters, step: int) -> Gradients:
        """The gradient of one step; None for parameters that are not used."""
        if not self.create_graph:
            # Without the cut, memory would grow with the number of steps.
            current = {name: p.detach().requires_grad_() for name, p in current.items()}
        total: Gradients | None = None
        for index in own_parts(self.placement):
            with dropout_masks(self.placement.dropout_seed, step, index, self.images.device):
                share = self._part(current, step, index)
            total = share if total is None else _sum(total, share)
        assert total is not None
        return total if self.placement.reduce is None else self._reduced(total, current)

    def _part(self, current: Parameters, step: int, index: int) -> Gradients:
        """One process's part of a step."""
        piece = self.steps[step][index]
        weight = n_selected(piece) / sum(map(n_selected, self.steps[step]))
        # Every process moves buffers of its own; the first one's are shared. A graph that is
        # kept may hold a buffer, which later steps are not to change.
        shared = index == own_parts(self.placement)[0]
        buffers = self.buffers
        if self.create_graph or not shared:
            buffers = _copies(self.buffers)
        outputs = torch.func.functional_call(
            self.model, {**buffers, **current}, (self.images[piece],)
        )
        if shared and buffers is not self.buffers:
            for name, buffer in self.buffers.items():
                buffer.detach().copy_(buffers[name].detach())
        loss = self.loss(outputs, self.labels[piece])
        if not loss.requires_grad:
            raise InputError(
                f"the outputs of {type(self.model).__name__} do not depend on its parameters: its "
                "forward pass runs under torch.no_grad, or detaches what it computes"
            )
        if weight != 1:
            loss = weight * loss
        return torch.autograd.grad(
            loss, list(current.values()), create_graph=self.create_graph, allow_unused=True
        )

    def _reduced(self, mine: Gradients, current: Parameters) -> Gradients:
        """The sum over processes; None for parameters that none of them uses."""
        assert self.placement.reduce is not None
        found = self.placement.reduce(filled(mine, list(current.values())))
        return [
            None if own is None and not whole.any() else whole
            for own, whole in zip(mine, found, strict=True)
        ]


def _sum(left: Gradients, right: Gradients) -> Gradients:
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]


def _copies(tensors: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: tensor.clone() for name, tensor in tensors.items()}


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
