"""One client's round: train locally, protect the update, share it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from core.data.data_sets import derived_seed
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import DEFAULT_LOSS, Loss
from core.models.architecture import Architecture, GivenModel
from core.models.batch_norm import convert_batch_norm, explain_single_values
from core.models.checkpointed_blocks import refuse_reentrant_blocks
from core.models.kinds import Dropout
from core.models.unchanged import in_mode, unchanged
from core.processes.distributed import Process, shard_sizes
from core.target import (
    RUNNING_STATISTICS,
    BatchStatistics,
    LocalTraining,
    Target,
    check_parts,
)
from gradients.batch_statistics import (
    batch_norm_layers,
    collect_batch_statistics,
    merge_batch_statistics,
)
from gradients.defenses import ClientView, Defense, apply_defenses, encode_batch
from gradients.local_update import (
    Gradients,
    Parameters,
    Placement,
    StepGradient,
    client_gradient,
    dropout_masks,
    images_of_steps,
    local_sgd,
    trainable_parameters,
)
from gradients.private_gradient import PrivacySettings, private_gradient
from training.privacy import sum_over_processes

# Streams of random numbers that must not depend on each other.
_NOISE, _DEFENSES = 1, 2
TOO_FEW_VALUES = (
    "-b: train-mode BatchNorm cannot normalise a single value per channel; give every "
    "process more images, use larger ones, or --model-eval"
)


@dataclass(frozen=True)
class ClientSettings:
    """What a client does with a batch.

    Attributes:
        local: Its local SGD.
        train_mode: Batch statistics in BatchNorm, active dropout.
        shards: Images per process; empty: spread evenly.
        synchronized: BatchNorm statistics over all processes instead of each one's.
        privacy: Clipping and noise in every local step.
        defenses: Applied to the update, in order.
        seed: Seed of the noise and of the defenses.
        dropout_seed: Seed of the dropout masks.
        share_running: Share BatchNorm's running statistics as they are afterwards, as
            clients do that share their whole state.
        loss: What the client minimises.
    """

    local: LocalTraining = field(default_factory=LocalTraining)
    train_mode: bool = True
    shards: tuple[int, ...] = ()
    synchronized: bool = False
    privacy: PrivacySettings | None = None
    defenses: tuple[Defense, ...] = ()
    seed: int = 0
    dropout_seed: int = 0
    share_running: bool = True
    loss: Loss = DEFAULT_LOSS


def share_update(
    model: nn.Module,
    architecture: Architecture,
    data_spec: DataSpec,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: ClientSettings,
    process: Process | None = None,
    measured: dict[str, Any] | None = None,
) -> Target | None:
    """Compute what a client shares for a batch.

    Every process calls this with the whole batch and works on its own shard.

    Args:
        model: theta_0; frozen where a defense says so. Its precision is that of the
            computation.
        architecture: How an attacker rebuilds it.
        data_spec: Normalisation of the images.
        images: N x C x H x W in [0, 1], or what else the model takes.
        labels: N x ..., as the loss takes them.
        settings: What the client computes and what it does to the gradient.
        process: This process among the client's processes.
        measured: Takes what the defenses cost, for the record: `update_cosine` between
            what is shared and the update before them.

    Returns:
        What an attacker sees, on the CPU; None on all processes but the first.

    Raises:
        InputError: The batch cannot be spread over the processes, the privacy settings do
            not suit the model, or its checkpointed blocks have no gradient.
    """
    process = process or Process()
    given = isinstance(architecture, GivenModel)
    for defense in settings.defenses:
        defense.prepare(model)
        architecture = defense.architecture(architecture)
    if not trainable_parameters(model):
        raise InputError("every parameter of the model is frozen: there is nothing to share")
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model = in_mode(model.to(process.device), settings.train_mode)
    parameter = next(model.parameters())
    precision = parameter.dtype
    inputs = data_spec.normalize(data_spec.placed(images, parameter))
    labels = labels.to(process.device, precision if labels.is_floating_point() else None)
    if given:
        refuse_reentrant_blocks(model, inputs)
    numbers = generator(settings.seed, _DEFENSES)
    view = ClientView(model, inputs, labels, numbers, settings.loss, settings.local, data_spec)
    inputs, labels = encode_batch(settings.defenses, view)
    run = _Run(model, inputs, labels, settings, process)
    update = run.update()
    statistics = run.statistics()
    if not process.is_main:
        return None
    view = dataclasses.replace(view, images=inputs, labels=labels)
    shared = apply_defenses(settings.defenses, update, view)
    if measured is not None and settings.privacy is None:
        measured["update_cosine"] = update_cosine(shared, update)
    return Target(
        model=architecture,
        data=data_spec,
        state_dict=state,
        gradient={name: value.detach().cpu() for name, value in shared.items()},
        train_mode=settings.train_mode,
        batch_size=len(images),
        local=settings.local.as_told(len(images)),
        shards=run.shards,
        synchronized=run.synchronized,
        bn_statistics=statistics,
        defenses=_words(settings),
        dropout_seed=run.dropout_seed,
        running_after=run.running_after(),
        loss=settings.loss,
    )


def update_cosine(shared: Parameters, update: Parameters) -> float:
    """How much of the update's direction is left in what is shared (1: all of it).

    What is not shared counts as zero.
    """
    dot = sum(float((shared[name].double() * update[name].double()).sum()) for name in shared)
    squares = [
        sum(float(value.double().square().sum()) for value in tensors.values())
        for tensors in (shared, update)
    ]
    return dot / max((squares[0] * squares[1]) ** 0.5, 1e-30)


def _words(settings: ClientSettings) -> tuple[str, ...]:
    private = () if settings.privacy is None else (settings.privacy.word,)
    return (*private, *(defense.word for defense in settings.defenses))


def spread(n: int, local: LocalTraining, processes: int) -> tuple[int, ...]:
    """Images per process where every local batch is spread evenly over the processes.

    Args:
        n: Images of the client.
        local: Its local SGD.
        processes: Number of processes.
    """
    batches = [shard_sizes(size, processes) for size in shard_sizes(n, local.batches)]
    return tuple(map(sum, zip(*batches, strict=True)))


def resolve_shards(n: int, settings: ClientSettings, processes: int) -> tuple[int, ...]:
    """Images per process, or per simulated process where there is only one.

    Args:
        n: Images of the client.
        settings: May state the shards.
        processes: Processes of the client.

    Raises:
        InputError: The stated shards do not suit the batch or the processes.
    """
    stated = settings.shards
    if not stated:
        return spread(n, settings.local, processes)
    if sum(stated) != n or min(stated) < 1:
        raise InputError(f"--shards {_listed(stated)}: must be positive and sum to the batch, {n}")
    if processes > 1 and len(stated) != processes:
        raise InputError(f"--shards {_listed(stated)}: there are {processes} processes")
    even = spread(n, settings.local, len(stated))
    if settings.local.batches > 1 and stated != even:
        raise InputError(
            f"--shards {_listed(stated)}: several local batches are spread evenly: {_listed(even)}"
        )
    # One process with synchronized statistics is one group, however it is cut.
    return (n,) if processes == 1 and settings.synchronized else stated


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


class _Run:
    """A client's batch spread over its processes (or over groups inside one)."""

    def __init__(
        self,
        model: nn.Module,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        settings: ClientSettings,
        process: Process,
    ) -> None:
        self.inputs, self.labels = inputs, labels
        self.settings = settings
        self.shards = resolve_shards(len(inputs), settings, process.world_size)
        check_parts(settings.loss, len(self.shards))
        self.synchronized = settings.synchronized or len(self.shards) == 1
        draws = has_active_dropout(model) or draws_random_numbers(model, inputs)
        self.dropout_seed = settings.dropout_seed if draws else None
        self.part = process.rank if process.world_size > 1 else None
        self.steps = images_of_steps(len(inputs), settings.local, self.shards)
        self.model = model
        if self.part is not None and self.synchronized:
            # A copy: whatever runs on the first process alone must not wait for others.
            self.model = convert_batch_norm(copy.deepcopy(model), "synchronized")
        # They move during the local steps; the model's own stay as they were received.
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}

    def update(self) -> Parameters:
        """The update of all processes together, before defenses."""
        local, privacy = self.settings.local, self.settings.privacy
        reduce = None if self.part is None else sum_over_processes
        placement = Placement(self.shards, self.part, reduce, self.dropout_seed)
        batch = (self.model, self.inputs, self.labels, local)
        gradient: StepGradient
        if privacy is None:
            gradient = client_gradient(
                *batch, placement=placement, buffers=self.buffers, loss=self.settings.loss
            )
        else:
            noise = generator(self.settings.seed, _NOISE)
            gradient = private_gradient(
                *batch, privacy, noise, placement, self.buffers, self.settings.loss
            )
        # Without a terminal, and for a single step, no bar is shown.
        quiet = True if local.steps == 1 or self.part not in (None, 0) else None
        with (
            explain_single_values(TOO_FEW_VALUES),
            tqdm(total=local.steps, desc="local step", disable=quiet) as bar,
        ):

            def step(parameters: Parameters, index: int) -> Gradients:
                result = gradient(parameters, index)
                bar.update()
                return result

            start = {name: p.detach() for name, p in trainable_parameters(self.model).items()}
            return local_sgd(start, local, step)

    def running_after(self) -> dict[str, torch.Tensor] | None:
        """This process's running statistics after `update`; None where none moved."""
        moved = self.settings.train_mode and batch_norm_layers(self.model)
        if not (moved and self.settings.share_running):
            return None
        names = [name for name in self.buffers if name.endswith(RUNNING_STATISTICS)]
        return {name: self.buffers[name].detach().cpu() for name in names} or None

    def statistics(self) -> tuple[BatchStatistics, ...] | None:
        """Exact BatchNorm statistics of the batch, where there is one batch and BatchNorm."""
        one_batch = self.settings.local.batches == 1
        if not (self.settings.train_mode and one_batch and batch_norm_layers(self.model)):
            return None
        parts = range(len(self.shards)) if self.part is None else [self.part]
        measured = _gather([self._statistics_of(part) for part in parts], self.part is not None)
        if self.synchronized:
            return (merge_batch_statistics(measured, self.shards),)
        return tuple(measured)

    def _statistics_of(self, part: int) -> BatchStatistics:
        with dropout_masks(self.dropout_seed, 0, part, self.inputs.device):
            found = collect_batch_statistics(self.model, self.inputs[self.steps[0][part]])
        return {name: (mean.cpu(), var.cpu()) for name, (mean, var) in found.items()}


def _gather(mine: list[Any], over_processes: bool) -> list[Any]:
    """Concatenate every process's list of plain values, in the order of ranks."""
    if not over_processes:
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [item for part in everyone for item in part]


def has_active_dropout(model: nn.Module) -> bool:
    """Whether random masks (dropout, stochastic depth) are drawn in the model's mode."""
    from torchvision.ops import StochasticDepth

    kinds = (Dropout, StochasticDepth)
    return any(isinstance(m, kinds) and m.p > 0 and m.training for m in model.modules())


def draws_random_numbers(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether a pass draws random numbers: in functions, in attention, in layers of a user's own.

    Args:
        model: Run once in the mode it is in; nothing of it changes.
        inputs: N x ..., what the model takes; the first two are used.
    """
    device = inputs.device
    with torch.no_grad(), unchanged(model):
        before = _random_state(device)
        # A batch that is too small for BatchNorm is refused later, by the client's own pass.
        with contextlib.suppress(RuntimeError, ValueError):
            model(inputs[:2])
        return any(
            not torch.equal(a, b) for a, b in zip(before, _random_state(device), strict=True)
        )


def _random_state(device: torch.device) -> list[torch.Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def generator(*parts: int) -> torch.Generator:
    """A generator on the CPU whose seed is derived from several numbers."""
    return torch.Generator().manual_seed(derived_seed(*parts) % 2**63)
