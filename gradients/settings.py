"""What stage 2 is asked for, as typed records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradients.client import ClientSettings
from gradients.sums import Aggregation

DEFAULT_ARCH = "resnet18"


@dataclass(frozen=True)
class DataSettings:
    """Which images.

    Attributes:
        data: Folder, `.json` list or built-in name; or, as `module:function`, what gives the
            user's own samples.
        name: Of the data set where `data` is a folder; also for the file names.
        root: Where the files of a built-in set lie, or the paths of a list start.
        image_size: Side in pixels; None for the checkpoint's, else the data set's own.
        split_seed: Of a held-out validation part, as in training.
        workers: Threads that read images.
        tokens: Of a sentence of text.
        shortest: Tokens of the shortest one, which is padded; None: all have as many.
    """

    data: str
    name: str | None = None
    root: str | None = None
    image_size: int | None = None
    split_seed: int = 0
    workers: int = 4
    tokens: int = 16
    shortest: int | None = None


@dataclass(frozen=True)
class BatchSettings:
    """Which of the images are the client's.

    Attributes:
        size: Number of images of a client.
        index: Which batch of the data set.
        duplicates: Images per label; None for labels as they come.
    """

    size: int = 32
    index: int = 0
    duplicates: int | None = None


@dataclass(frozen=True)
class ModelSettings:
    """What is said of the model; None where nothing is said.

    Attributes:
        arch: Architecture; None for the checkpoint's, else `DEFAULT_ARCH`.
        pretrained: File of a trained model; None for an initial one.
        outlayer_state: How the last layer is initialised anew, or "None".
        stem: "imagenet" or "cifar"; None for the one that fits the images.
        width: Channels of the first stage.
        norm: "batch" or "group".
        pool_kernel: Kernel of the first max-pooling layer, as at 224 px.
        malicious: What a malicious server does to the model; empty for an honest one.
        double: Whether it computes in float64.
        builder: Function that builds a module of the user's own, as `module:function`; None
            for `arch`.
    """

    arch: str | None = None
    pretrained: str | None = None
    outlayer_state: str = "None"
    stem: str | None = None
    width: int | None = None
    norm: str | None = None
    pool_kernel: int | None = None
    malicious: str = ""
    double: bool = False
    builder: str | None = None


@dataclass(frozen=True)
class ExtractSettings:
    """One run of stage 2.

    Attributes:
        folder: Where results are written.
        data: The data set that the images are taken from.
        batch: Which of them are the client's.
        model: What is said of the model.
        client: What the client does with its batch.
        aggregation: Whose updates are summed, where the server sees no single one.
        id: First part of the file names.
        seed: Of the choice of images and of an initial model.
        rank_analysis: Whether R-GAP's rank analysis is printed and recorded.
        plugin: Module that is imported first.
        arguments: The command line by flag, for the record and the checkpoint.
    """

    folder: Path
    data: DataSettings
    batch: BatchSettings = BatchSettings()
    model: ModelSettings = ModelSettings()
    client: ClientSettings = field(default_factory=ClientSettings)
    aggregation: Aggregation = field(default_factory=Aggregation)
    id: str = "test"
    seed: int = 0
    rank_analysis: bool = False
    plugin: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images behind what the server sees: of all clients that take part."""
        return self.batch.size * len(self.aggregation.present)
