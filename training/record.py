"""What a training was and what came of it: one typed record, its writer and its reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import records, storage
from core.clipping import clipping_word
from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec
from core.records import check_types, check_version
from training.settings import TrainingConfig

# Version 1 is a record without a version.
SCHEMA_VERSION = 2
KIND, FILE = "training", "record.json"
RUNNING, FINISHED = "running", "finished"


@dataclass(frozen=True)
class EpochResult:
    """One line of `metrics.csv`.

    Attributes:
        epoch: Number of finished epochs.
        lr: Learning rate of SGD.
        train_loss: Mean loss over the epoch's samples.
        train_acc1: Share of samples classified correctly, in percent; None where targets are
            no classes or labels.
        val_loss: On the validation images.
        val_acc1: In percent.
        epsilon: Privacy budget spent; None without a guarantee.
        images_per_second: Over all processes, training only.
        seconds: Training and validation.
        val_acc5: Share of samples whose class is among the first five guesses, in percent; None
            in records of earlier versions.
    """

    epoch: int
    lr: float
    train_loss: float
    train_acc1: float | None
    val_loss: float
    val_acc1: float | None
    epsilon: float | None
    images_per_second: float
    seconds: float
    val_acc5: float | None = None


@dataclass(frozen=True)
class PrivacySpent:
    """What a differentially private training promises.

    Attributes:
        clipping: "per-sample" or "batch".
        noise_multiplier: Of the noise, in clipping norms.
        max_norm: Largest Euclidean norm of one sample's gradient.
        delta: Of the guarantee.
        epsilon: Budget spent; None without a guarantee.
        note: The guarantee in words.
        epsilon_rdp: The same by the accountant of Renyi's divergence.
        accountant: Name of the accountant behind `epsilon`.
        sample_rate: Probability that an image is in a batch.
        steps: Steps taken.
    """

    clipping: str
    noise_multiplier: float
    max_norm: float
    delta: float
    epsilon: float | None
    note: str
    epsilon_rdp: float | None = None
    accountant: str | None = None
    sample_rate: float | None = None
    steps: int | None = None

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PrivacySpent:
        """What a record of any version holds."""
        return PrivacySpent(**{**values, "clipping": clipping_word(values["clipping"])})


@dataclass(frozen=True)
class FederationRecord:
    """What the clients of a federation did.

    Attributes:
        clients: How many.
        images: Of every client.
        local_steps: Batches between two rounds.
        rounds: Rounds so far.
        split: How the images are spread over the clients.
        defense: Words of what every client does to its update; empty for nothing.
        error_feedback: What the clients do with what the defense drops; None: nothing.
        epsilon: Budget that the defense has spent, of all that a client holds; None where it
            promises nothing.
        delta: Of that promise.
    """

    clients: int
    images: tuple[int, ...]
    local_steps: int
    rounds: int
    split: str
    defense: str
    error_feedback: str | None
    epsilon: float | None
    delta: float


@dataclass(frozen=True)
class CheckpointNames:
    """The checkpoints in the run's folder.

    Attributes:
        initial: The untrained model.
        best: The model of the best validation accuracy; None before the first epoch.
        last: The latest model; None before the first epoch.
    """

    initial: str
    best: str | None = None
    last: str | None = None


@dataclass(frozen=True)
class TrainRecord:
    """One run of stage 1, as `record.json` holds it.

    Attributes:
        status: "running" or "finished".
        scheme: Name of the defense scheme.
        config: How it was trained.
        model: How the client's model is built, see `Architecture.describe`.
        data: The images' description.
        loss: What was minimised.
        n_train: Training images.
        n_val: Validation images.
        processes: Over all nodes.
        epochs_done: Epochs finished.
        initial_val_acc1: Validation accuracy before the first epoch, in percent.
        best_val_acc1: Best so far, in percent; None before the first epoch.
        final_val_acc1: Of the latest epoch, in percent.
        final_train_acc1: Of the latest epoch, in percent.
        privacy: What differential privacy promises; None where it is not used.
        federation: What the clients of a federation did; None where there are none.
        images_per_second: Median over epochs.
        seconds_per_epoch: Median over epochs.
        seconds: Of all epochs.
        history: One result per epoch.
        checkpoints: Their names.
        provenance: Versions, device and seed.
        schema_version: Of this description.
    """

    status: str
    scheme: str
    config: TrainingConfig
    model: Mapping[str, Any]
    data: DataSpec
    n_train: int
    n_val: int
    processes: int
    epochs_done: int
    initial_val_acc1: float | None
    best_val_acc1: float | None
    final_val_acc1: float | None
    final_train_acc1: float | None
    privacy: PrivacySpent | None
    images_per_second: float | None
    seconds_per_epoch: float | None
    seconds: float
    history: tuple[EpochResult, ...]
    checkpoints: CheckpointNames
    loss: str = "cross-entropy"
    federation: FederationRecord | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the file holds them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {
            "kind": KIND,
            "config": dataclasses.asdict(self.config),
            "model": dict(self.model),
            "data": self.data.to_dict(),
            "privacy": None if self.privacy is None else dataclasses.asdict(self.privacy),
            "federation": self.federation and dataclasses.asdict(self.federation),
            "history": [dataclasses.asdict(result) for result in self.history],
            "checkpoints": dataclasses.asdict(self.checkpoints),
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainRecord:
        """The inverse of `to_dict`, for this version of the schema and those before it.

        Raises:
            InputError: It is no record of a training, or one of a later version.
        """
        check_version(values, SCHEMA_VERSION, "the training")
        privacy, federation = values.get("privacy"), values.get("federation")
        read = {
            "config": TrainingConfig.from_dict(values["config"]),
            "model": _model(values["model"]),
            "data": DataSpec.from_dict(values["data"]),
            "privacy": None if privacy is None else PrivacySpent.from_dict(privacy),
            "federation": None if federation is None else FederationRecord(**federation),
            "history": tuple(EpochResult(**result) for result in values["history"]),
            "checkpoints": CheckpointNames(**values["checkpoints"]),
            "schema_version": SCHEMA_VERSION,
        }
        names = [f.name for f in dataclasses.fields(TrainRecord)]
        plain = {name: values[name] for name in names if name in values}
        record = TrainRecord(**{**plain, **read})
        check_types(record)
        return record


def _model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description of a model: one of ours as it would be built, or a module's own."""
    if "stem" not in values:
        return {"arch": str(values["arch"]), "builder": values["builder"]}
    return ModelSpec.from_dict(dict(values)).to_dict()


def write_record(record: TrainRecord, folder: Path) -> None:
    """Write a run's `record.json`, atomically."""
    storage.write_record(folder / FILE, record.to_dict())


def read_record(folder: Path) -> TrainRecord:
    """The record of the run in a folder.

    Raises:
        InputError: There is none, or it is not one of a training.
    """
    return records.read_record(folder / FILE, "a training run", _parsed)


def _parsed(values: Mapping[str, Any]) -> TrainRecord:
    if values.get("kind") != KIND:
        raise InputError("it is not the record of a training run")
    return TrainRecord.from_dict(values)
