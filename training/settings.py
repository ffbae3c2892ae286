"""What a training is asked to do, as typed records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.clipping import PER_SAMPLE, clipping_word
from core.errors import InputError
from core.models.building import DEFAULT_POOL_KERNEL

IID, DIRICHLET = "iid", "dirichlet"


@dataclass(frozen=True)
class Federation:
    """Clients that train together, and what each does to its update.

    Attributes:
        clients: How many.
        local_steps: Batches that a client trains on between two rounds; 1 is FedSGD.
        rounds_per_epoch: Rounds that count as an epoch; None: until the clients have gone
            through as many images as there are.
        split: "iid", or "dirichlet:ALPHA".
        defense: Words of transformations of every update, as `--defense` of stage 2 takes them.
        error_feedback: Name of what the clients do with what a defense drops; None: nothing.
    """

    clients: int
    local_steps: int = 1
    rounds_per_epoch: int | None = None
    split: str = IID
    defense: str = ""
    error_feedback: str | None = None

    @property
    def alpha(self) -> float | None:
        """Parameter of a Dirichlet split; None: every client's images are alike."""
        kind, _, value = self.split.partition(":")
        return float(value) if kind == DIRICHLET else None

    def check(self) -> None:
        """Refuse a split that does not exist.

        Raises:
            InputError: Names the flag.
        """
        kind, _, value = self.split.partition(":")
        try:
            right = self.split == IID or (kind == DIRICHLET and 0 < float(value) < math.inf)
        except ValueError:
            right = False
        if not right:
            raise InputError(f"--split {self.split}: must be iid or dirichlet:ALPHA, ALPHA > 0")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        scheme: Name of the scheme, for records.
        epochs: Passes over the data.
        batch_size: Images per step over all processes.
        lr: Initial learning rate.
        momentum: Of SGD.
        weight_decay: L2 penalty.
        lr_schedule: "step" (x0.1 every `lr_step` epochs) or "cosine" (to zero).
        lr_step: Epochs between drops of the step schedule.
        warmup: Epochs of linear increase before the schedule.
        accumulate: Parts that a process' shard of a batch is computed in.
        workers: Loading processes over all processes.
        seed: Seed of every random number of the run.
        dp: Whether gradients are clipped and noised.
        dp_clipping: "per-sample" or "batch" (no guarantee).
        noise_multiplier: Of the noise, in clipping norms.
        max_norm: Largest Euclidean norm of one sample's gradient.
        delta: Delta of the (epsilon, delta) guarantee.
        synchronized: Whether BatchNorm statistics are those of the whole batch.
        amp: None, "bf16" or "fp16" mixed precision.
        channels_last: Memory layout of images and weights.
        compile: Whether the model is compiled.
        save_every: Epochs between checkpoints that are kept; the latest always is.
        tensorboard: Whether scalars are written for TensorBoard, if it is installed.
        federation: The clients that train together; None: all images in one place.
    """

    scheme: str = "None"
    epochs: int = 90
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_schedule: str = "step"
    lr_step: int = 30
    warmup: int = 0
    accumulate: int = 1
    workers: int = 4
    seed: int = 0
    dp: bool = False
    dp_clipping: str = PER_SAMPLE
    noise_multiplier: float = 0.01
    max_norm: float = 1.0
    delta: float = 1e-5
    synchronized: bool = True
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    save_every: int = 10
    tensorboard: bool = True
    federation: Federation | None = None

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainingConfig:
        """What a checkpoint or record holds; fields that it lacks keep their defaults."""
        names = {field.name for field in dataclasses.fields(TrainingConfig)}
        known = {name: value for name, value in values.items() if name in names}
        if "dp_clipping" in known:
            known["dp_clipping"] = clipping_word(known["dp_clipping"])
        if known.get("federation") is not None:
            known["federation"] = Federation(**known["federation"])
        return TrainingConfig(**known)

    @property
    def called(self) -> str:
        """What a line of progress calls the training: its scheme, where it has one."""
        unnamed = "DP-SGD" if self.dp else "training"
        return unnamed if self.scheme == "None" else self.scheme

    @property
    def per_sample(self) -> bool:
        """Whether this is DP-SGD (differentially private SGD) proper."""
        return self.dp and self.dp_clipping == PER_SAMPLE

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch (counted from 0)."""
        if epoch < self.warmup:
            return self.lr * (epoch + 1) / (self.warmup + 1)
        if self.lr_schedule == "step":
            return self.lr * 0.1 ** (epoch // self.lr_step)
        progress = (epoch - self.warmup) / max(1, self.epochs - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class DataSettings:
    """Which images.

    Attributes:
        data: Folder, `.json` list or built-in name; or, as `module:function`, what gives the
            user's own samples.
        root: Where the files of a built-in set lie, or the paths of a list start.
        name: Of the data set where `data` is a folder.
        image_size: Side in pixels; None for the data set's own.
        split_seed: Of a held-out validation part.
        tokens: Of a sentence of text.
        shortest: Tokens of the shortest one, which is padded; None: all have as many.
    """

    data: str = "photo-patches"
    root: str | None = None
    name: str | None = None
    image_size: int | None = None
    split_seed: int = 0
    tokens: int = 16
    shortest: int | None = None


@dataclass(frozen=True)
class ModelSettings:
    """Which architecture, and what it starts from.

    Attributes:
        arch: Name of the architecture.
        stem: "imagenet", "cifar", or "auto" for the one that fits the images.
        width: Channels of the first stage; None for the architecture's own.
        norm: "batch", "group", or "auto": group where samples must not mix.
        pool_kernel: Kernel of the first max-pooling layer, as at 224 px.
        bn_groups: Groups of asynchronous BatchNorm on one process; None for one group.
        bn_backend: "auto", "own", "torch" or "apex": whose synchronized BatchNorm.
        pretrained: "torchvision", or a file of parameters to start from.
        builder: Function that builds a module of the user's own, as `module:function`; None
            for `arch`.
    """

    arch: str = "resnet18"
    stem: str = "auto"
    width: int | None = None
    norm: str = "auto"
    pool_kernel: int = DEFAULT_POOL_KERNEL
    bn_groups: int | None = None
    bn_backend: str = "auto"
    pretrained: str | None = None
    builder: str | None = None


@dataclass(frozen=True)
class RunSettings:
    """One run of the command.

    Attributes:
        root: Folder of checkpoints and records.
        data: Which images.
        model: Which architecture.
        training: How it is trained.
        loss: Name of a ready loss, or `module:function`; None for cross-entropy.
        resume: Checkpoint to continue from, "auto" for the latest, empty for none.
        overwrite: Whether an earlier run's results are discarded.
        start_epoch: Epochs that count as done; 0 for what the checkpoint says.
        evaluate: Whether the model is validated only.
        tf32: Whether float32 products may use TF32.
        print_freq: Steps between renewals of the progress bar.
        plugin: Module that is imported first.
        flags: The command line by flag, for the checkpoints.
    """

    root: Path
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingConfig = TrainingConfig()
    loss: str | None = None
    resume: str = ""
    overwrite: bool = False
    start_epoch: int = 0
    evaluate: bool = False
    tf32: bool = True
    print_freq: int = 10
    plugin: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
