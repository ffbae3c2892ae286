"""The client's model and loss, rebuilt by the attacker and spread over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from attack.matching.held_state import hold_buffers
from attack.matching.shared_parameters import check_update
from core.errors import InputError
from core.losses import Outputs, Targets, main_output
from core.models.kinds import BatchNorm
from core.models.unchanged import unchanged
from core.processes import distributed
from core.target import Target, check_parts
from gradients.local_update import Placement, dropout_masks, images_of_steps, unrolled_update

Tensors = list[torch.Tensor]
# Whole vectors of float32 in AVX-512.
_SAFE_CHANNELS = 16
Network = Callable[[torch.Tensor], Outputs]


class Replica:
    """The client's computation, rebuilt by the attacker for this process's images.

    Args:
        target: What the client shared.
        device: Device that runs the computation.
        dtype: Precision of the computation.
        joint: Labels are not known but optimised with the images: floating-point labels are
            the variables that stand in their place (see `core.losses.Loss.relaxed`).
        known_masks: The client's dropout masks are drawn from their seed; an attacker who is
            not granted that draws masks of his own in every evaluation.

    Attributes:
        model: The shared model, converted to the client's BatchNorm.
        names: Names of the shared parameters.
        target_gradient: The shared gradient, in that order.
        share: The slice of the batch that belongs to this process.
        sizes: Images per process.
        groups: Images per asynchronous BatchNorm group of this process; None where all
            images of all processes share one set of statistics.
        first_group: Index of the first of those groups among the client's shards.
        layout: Memory layout of images, activations and convolutions' weights.
        n_clients: Clients whose local steps are taken apart and whose updates are averaged.

    Raises:
        InputError: The batch cannot be spread over so many processes, or what was shared
            does not belong to the model.
    """

    def __init__(
        self,
        target: Target,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        joint: bool = False,
        known_masks: bool = False,
    ) -> None:
        self.batch_size, self.dtype, self.joint = target.batch_size, dtype, joint
        self.client_loss, self.data = target.loss, target.data
        check_parts(target.loss, distributed.world_size())
        self.names = list(target.gradient)
        # Read only: on the target's memory where device, type and layout agree.
        self.target_gradient = [g.detach().to(device, dtype) for g in target.gradient.values()]
        self.local = target.local
        self.n_clients = 1 if self.local.shares_gradient else target.n_clients
        # Synchronized shards share their statistics: one group. So do the images of one of several
        # clients, each of which takes its own local steps.
        groups = () if target.synchronized or self.n_clients > 1 else target.shards
        seed = target.dropout_seed if known_masks else None
        self.placement = Placement(shards=groups, dropout_seed=seed)
        self.sizes, self.groups, self.first_group = _share_out(target)
        self.share = distributed.shard_slice(self.sizes, distributed.rank())
        self.model = _convert_batch_norm(target, self.groups).to(device, dtype)
        for module in self.model.modules():
            if isinstance(module, BatchNorm):
                # Counting the attacker's passes means nothing, and transformed
                # functions may not write to a counter.
                module.num_batches_tracked = None
        if self.local.steps == 1:
            # Several steps run on copies, along which buffers move as the client's did.
            hold_buffers(self.model)
        shared = dict(self.model.named_parameters())
        check_update(target.gradient, shared, target.model.name)
        self.model.requires_grad_(False)
        self.parameters: Tensors = [shared[name].requires_grad_() for name in self.names]
        # Masks are drawn in the order of memory: the client's was the plain one.
        direct = seed is None and _convolves_faster_channels_last(self.model, device, dtype)
        self.lay_out(torch.channels_last if direct else torch.contiguous_format)
        if direct and not _runs(self.model, target.data.shape, torch.channels_last):
            self.lay_out(torch.contiguous_format)

    def lay_out(self, layout: torch.memory_format) -> None:
        """Lay out parameters and the shared gradient; images are to follow.

        The target keeps its own tensors: those of another layout are held twice from here on.
        """
        self.layout = layout
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        # Entries are paired in memory order; a checkpoint may hold any layout.
        for i, parameter in enumerate(self.parameters):
            self.target_gradient[i] = laid_out_as(self.target_gradient[i], parameter.detach())

    def optimises(self, labels: torch.Tensor) -> bool:
        """Whether these labels are variables, in which gradients are wanted too."""
        return self.joint and labels.is_floating_point()

    def targets_of(self, labels: torch.Tensor) -> torch.Tensor:
        """What the loss compares with: known labels as they are, or what variables stand for."""
        if self.optimises(labels):
            return self.client_loss.relaxed(labels)
        return labels.to(self.dtype) if labels.is_floating_point() else labels

    def loss(self, model: Network, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """This process's part of the client's mean loss.

        Args:
            model: The replica's model or its perturbed copy.
            inputs: n x C x H x W, normalised; this process's images.
            labels: n labels of these images, or the variables that stand for them.

        Returns:
            The sum over these images divided by the whole batch size: parts add up. A loss
            that is no mean over samples is of the whole batch.
        """
        labels = self.targets_of(labels)
        if not self.client_loss.mean_over_samples:
            return self.client_loss(model(inputs), labels)
        return self.client_loss.total(model(inputs), labels) / self.batch_size

    def variables_shape(self) -> tuple[int, ...]:
        """Of one sample's variables that are optimised in place of its labels."""
        if self.client_loss.targets in (Targets.CLASSES, Targets.LABELS) and self.data.n_classes:
            return (self.data.n_classes,)
        n = self.sizes[distributed.rank()]
        inputs = torch.zeros((n, *self.data.shape), dtype=self.dtype).to(self.parameters[0].device)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.no_grad():
            outputs = torch.func.functional_call(self.model, buffers, (inputs,))
        return tuple(main_output(outputs).shape[1:])

    @property
    def knows_masks(self) -> bool:
        """Whether every evaluation draws the client's dropout masks."""
        return self.placement.dropout_seed is not None

    def masks(self) -> contextlib.AbstractContextManager[None]:
        """Within the block one pass draws the masks of the client's one step, if they are known.

        Several steps draw those of each by themselves, see `update`.
        """
        seed = self.placement.dropout_seed if self.local.shares_gradient else None
        return dropout_masks(seed, 0, 0, self.parameters[0].device)

    def update(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        create_graph: bool,
        segments: int | None = None,
    ) -> Tensors:
        """The update after the client's local steps, one tensor per shared parameter.

        Args:
            inputs: N x C x H x W, normalised; the whole batch.
            labels: N labels, or the variables that stand for them.
            create_graph: Keep the graph for derivatives of the update.
            segments: See `gradients.local_update.unrolled_update`.
        """
        size = len(inputs) // self.n_clients
        updates = [
            unrolled_update(
                self.model,
                own,
                wanted,
                self.local,
                create_graph=create_graph,
                placement=self.placement,
                loss=self.client_loss,
                segments=segments,
            )
            for own, wanted in zip(
                inputs.split(size), self.targets_of(labels).split(size), strict=True
            )
        ]
        if self.n_clients == 1:
            return [updates[0][name] for name in self.names]
        return [torch.stack([update[name] for update in updates]).mean(0) for name in self.names]

    def pass_batches(self, inputs: torch.Tensor) -> None:
        """Pass every local step's batch through the model as it was received."""
        state = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        for own in inputs.split(len(inputs) // self.n_clients):
            for pieces in images_of_steps(len(own), self.local, self.placement.shards):
                for piece in pieces:
                    torch.func.functional_call(self.model, state, (own[piece],))


def laid_out_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor with another's strides."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _convolves_faster_channels_last(
    model: nn.Module, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether the CPU's convolutions read channels-last images without reordering them.

    oneDNN has such kernels for float32; `benchmarks.speed` measures what they give.
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return bool(layers) and not any(map(_breaks_channels_last, layers))


def _breaks_channels_last(layer: nn.Conv2d) -> bool:
    """Whether oneDNN may write outside of memory where it computes the weight's gradient.

    Torch 2.15 on an AMD EPYC with AVX-512 did, in float32 and channels last, for a kernel of 1,
    stride 2 and 2 to 12 channels of 112 px or more (timm's `repvgg_a0` has 3); it did not for 1
    or 16 channels, nor in the plain layout.
    """
    strided = max(layer.kernel_size) == 1 and max(layer.stride) > 1
    return strided and layer.in_channels < _SAFE_CHANNELS


def _runs(model: nn.Module, shape: tuple[int, ...], layout: torch.memory_format) -> bool:
    """Whether a model takes images of a layout; a `view` of its activations takes one alone."""
    parameter = next(model.parameters())
    images = torch.zeros((2, *shape), device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad(), unchanged(model):
            model.eval()
            model(images.contiguous(memory_format=layout))
    except RuntimeError:
        return False
    return True


def check_shares(target: Target, n_processes: int) -> None:
    """Refuse more processes than a batch can be shared out to.

    Args:
        target: What the client shared.
        n_processes: Processes that share its batch.

    Raises:
        InputError: Names `--nproc-per-node`.
    """
    if not target.train_mode or target.synchronized:
        if n_processes > target.batch_size:
            raise InputError(
                f"--nproc-per-node: {n_processes} processes for a batch of {target.batch_size}"
            )
    elif n_processes > len(target.shards):
        raise InputError(
            f"--nproc-per-node: {n_processes} processes, but the client's {len(target.shards)} "
            "asynchronous BatchNorm shards cannot be split further"
        )


def _share_out(target: Target) -> tuple[list[int], list[int] | None, int]:
    """Images per process, the BatchNorm groups of this process, and the first's index."""
    n_processes = distributed.world_size()
    check_shares(target, n_processes)
    if not target.train_mode or target.synchronized:
        return distributed.shard_sizes(target.batch_size, n_processes), None, 0
    counts = distributed.shard_sizes(len(target.shards), n_processes)
    groups = [list(target.shards[distributed.shard_slice(counts, r)]) for r in range(n_processes)]
    rank = distributed.rank()
    return [sum(group) for group in groups], groups[rank], sum(counts[:rank])


def _convert_batch_norm(target: Target, groups: list[int] | None) -> nn.Module:
    model = target.build_model()
    alone = groups is None and distributed.world_size() == 1
    # Unrolled local steps run each shard through plain BatchNorm by itself.
    if not target.train_mode or alone or not target.local.shares_gradient:
        return model
    from core.models.batch_norm import convert_batch_norm

    if groups is not None:
        return convert_batch_norm(model, "grouped", groups=groups)
    return convert_batch_norm(model, "synchronized")
