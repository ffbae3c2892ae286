"""What a client shares, kept apart from what it means to keep private."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from core.data.columns import Columns
from core.data.specs import DataSpec
from core.errors import InputError
from core.local_training import LocalTraining as LocalTraining
from core.losses import DEFAULT_LOSS, Loss, is_default
from core.models.architecture import Architecture
from core.models.building import load_parameters
from core.models.unchanged import in_mode

# How the names of BatchNorm's running statistics end.
RUNNING_STATISTICS = ("running_mean", "running_var")

# Mean and (biased) variance of one batch at every BatchNorm layer, by module name.
BatchStatistics = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, repr=False)
class Target:
    """All that an attacker sees.

    Attributes:
        model: What rebuilds the architecture: its name and settings, or a given module.
        data: Shape, normalisation and classes of the images.
        state_dict: Parameters and buffers before the client's update.
        gradient: Shared gradient by parameter name, in parameter order; parameters
            the client keeps to itself (frozen layers) are absent. After several
            local steps: (theta_0 - theta_K) / (lr K).
        train_mode: Whether the client ran the model in train mode (batch statistics
            in BatchNorm, active dropout).
        batch_size: Number of images behind the gradient.
        local: The client's local SGD.
        shards: Images per process of the client; BatchNorm statistics are each
            shard's own unless `synchronized`. Sums to `batch_size`.
        synchronized: Whether BatchNorm statistics are those of the whole batch.
        bn_statistics: Exact batch statistics, if shared: one entry for the whole
            batch (synchronized) or one per shard; None where unknown.
        defenses: What the client says it did to the gradient, as `name:param` words.
        dropout_seed: Seed of the client's dropout masks, where there was dropout; used by an
            attacker who is granted it only.
        running_after: BatchNorm's running statistics after the client's local training,
            by their names in `state_dict` (those of its first process, where statistics
            are asynchronous), as a client shares them that shares its whole state; None
            where it keeps them.
        loss: What the client minimises.
        clients: Numbers of the clients whose mean update this is, as secure aggregation shows it;
            each has an equal share of `batch_size`, in this order, and `local` is of each. Empty:
            one client's own update.
    """

    model: Architecture
    data: DataSpec
    state_dict: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]
    train_mode: bool
    batch_size: int
    local: LocalTraining = field(default_factory=LocalTraining)
    shards: tuple[int, ...] = ()
    synchronized: bool = True
    bn_statistics: tuple[BatchStatistics, ...] | None = None
    defenses: tuple[str, ...] = ()
    dropout_seed: int | None = None
    running_after: dict[str, torch.Tensor] | None = None
    loss: Loss = DEFAULT_LOSS
    clients: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shards:
            object.__setattr__(self, "shards", (self.batch_size,))
        check_parts(self.loss, max(len(self.shards), self.n_clients))
        if self.batch_size % self.n_clients or len(set(self.clients)) != len(self.clients):
            raise InputError(
                f"{self.batch_size} images of the clients {self.clients!s:.80} are not as many of "
                "each of several clients"
            )

    @property
    def n_clients(self) -> int:
        """How many clients' updates went into this one."""
        return max(1, len(self.clients))

    @property
    def images_per_client(self) -> int:
        """Images of each of the clients."""
        return self.batch_size // self.n_clients

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.data.shape))
        classes = f"{self.data.n_classes} classes, " if self.data.n_classes else ""
        loss = "" if is_default(self.loss) else f"loss {self.loss.name}, "
        mean = f"mean of {self.n_clients} clients, " if self.clients else ""
        return (
            f"Target of {self.batch_size} images ({shape}): {mean}{len(self.gradient)} tensors of "
            f"{self.model.name}, {classes}{loss}{self.local.steps} local step(s), "
            f"{'train' if self.train_mode else 'eval'} mode, defenses: "
            f"{', '.join(self.defenses) or 'none'}"
        )

    def build_model(self) -> torch.nn.Module:
        """The shared model with its parameters, in the mode the client used."""
        model = self.model.build()
        try:
            load_parameters(model, self.state_dict)
        except RuntimeError as error:
            raise InputError(
                f"the checkpoint's parameters do not fit {self.model.name} with "
                f"{self.data.n_classes} classes: {str(error).splitlines()[-1].strip()}"
            ) from None
        return in_mode(model, self.train_mode)


def check_parts(loss: Loss, parts: int) -> None:
    """Refuse a batch in several parts under a loss that no sum over them gives.

    Args:
        loss: What the client minimises.
        parts: Processes or groups that the batch is spread over.

    Raises:
        InputError: The loss is no mean over samples and there are several parts.
    """
    if parts > 1 and not loss.mean_over_samples:
        raise InputError(
            f"the loss {loss.name} is no mean over samples, so that a batch cannot be spread over "
            f"{parts} processes"
        )


@dataclass(frozen=True, repr=False)
class Truth:
    """What the client meant to keep private; no attack ever receives it.

    Attributes:
        images: N x C x H x W in [0, 1], or what else the model takes (see `DataSpec.shape`);
            N x T token ids of text.
        labels: N class indices, or what else the loss compares with (N x ...).
        mean_image: Mean of images that are not the client's (C x H x W in [0, 1]): what
            one would guess without any gradient; of text the T most frequent tokens. None where
            unknown.
        nearest_images: For each image the most similar one that is not the client's
            (N x C x H x W in [0, 1]): the best guess among known images. None where unknown.
        columns: Of a table, what its features stand for; None for all else.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mean_image: torch.Tensor | None = None
    nearest_images: torch.Tensor | None = None
    columns: Columns | None = None

    @property
    def inputs(self) -> torch.Tensor:
        """What the model was given, before its normalisation: the images."""
        return self.images

    @property
    def is_text(self) -> bool:
        """Whether inputs are token ids."""
        return not self.images.is_floating_point()

    @property
    def targets(self) -> torch.Tensor:
        """What the loss compared the outputs with: the labels."""
        return self.labels

    def __repr__(self) -> str:
        n, *shape = self.images.shape
        size = " x ".join(map(str, shape))
        return f"Truth of {n} images ({size}), labels {described(self.labels)}"


def described(labels: torch.Tensor) -> str:
    """Class indices as a list; of targets of another kind their shape."""
    if labels.dim() == 1:
        return str(labels.tolist())
    return f"of shape {' x '.join(map(str, labels.shape))}"
