"""What was extracted and how: one typed record, its writer and its reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import records, storage
from core.data.specs import DataSpec
from core.models.architecture import Description
from core.records import check_types, check_version
from core.target import LocalTraining, Target
from gradients.rank_analysis import LayerRank, ra_index

# A record without a version is of version 1 too: only the number was added.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TargetDescription:
    """What an attacker sees of an update, without the tensors.

    Attributes:
        model: The architecture, as plain values.
        data: The images' description.
        mode: "train" or "eval".
        batch_size: Images of the client.
        local: The client's local training.
        shards: Images per process.
        synchronized: Whether BatchNorm statistics are those of the whole batch.
        bn_statistics: For how many shards exact BatchNorm statistics are shared.
        defenses: Of the client, in order of application.
        dropout_seed: Of the dropout masks; None where there are none.
        running_after: Whether running statistics after the training are shared.
        gradient_norms: L2 norm of the shared gradient by parameter.
        gradient_norm: L2 norm over all parameters.
        clients: Numbers of the clients whose mean update it is; empty for one client's own.
    """

    model: Description
    data: DataSpec
    mode: str
    batch_size: int
    local: LocalTraining
    shards: tuple[int, ...]
    synchronized: bool
    bn_statistics: int
    defenses: tuple[str, ...]
    dropout_seed: int | None
    running_after: bool
    gradient_norms: Mapping[str, float]
    gradient_norm: float
    clients: tuple[int, ...] = ()

    def setting(self) -> dict[str, Any]:
        """Plain values without the gradient's norms.

        The mode is there twice, as a word and as a flag: records of stage 2 have held the one
        and records of stage 3 the other.
        """
        return {
            "model": dict(self.model),
            # The words of a vocabulary are in the checkpoint.
            "data": dataclasses.replace(self.data, tokens=()).to_dict(),
            "mode": self.mode,
            "train_mode": self.mode == "train",
            "batch_size": self.batch_size,
            "local_training": self.local.to_dict() | {"steps": self.local.steps},
            "shards": list(self.shards),
            "synchronized": self.synchronized,
            "bn_statistics": self.bn_statistics,
            "defenses": list(self.defenses),
            "dropout_seed": self.dropout_seed,
            "running_after": self.running_after,
            # Said of sums only: records of one client's update stay what they were.
            **({"clients": list(self.clients)} if self.clients else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON record."""
        return {
            **self.setting(),
            "n_gradients": len(self.gradient_norms),
            "gradient_norms": dict(self.gradient_norms),
            "gradient_norm": self.gradient_norm,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TargetDescription:
        """The inverse of `to_dict`."""
        local = {k: v for k, v in values["local_training"].items() if k != "steps"}
        return TargetDescription(
            model=values["model"],
            data=DataSpec.from_dict(values["data"]),
            mode=values["mode"],
            batch_size=values["batch_size"],
            local=LocalTraining.from_dict(local),
            shards=tuple(values["shards"]),
            synchronized=values["synchronized"],
            bn_statistics=values["bn_statistics"],
            defenses=tuple(values["defenses"]),
            dropout_seed=values.get("dropout_seed"),
            running_after=values.get("running_after", False),
            gradient_norms=values["gradient_norms"],
            gradient_norm=values["gradient_norm"],
            clients=tuple(values.get("clients", ())),
        )


def describe(target: Target) -> TargetDescription:
    """What a target is, without its tensors."""
    norms = {name: float(g.double().norm()) for name, g in target.gradient.items()}
    statistics = target.bn_statistics
    return TargetDescription(
        model=target.model.describe(),
        data=target.data,
        mode="train" if target.train_mode else "eval",
        batch_size=target.batch_size,
        local=target.local,
        shards=target.shards,
        synchronized=target.synchronized,
        bn_statistics=0 if statistics is None else len(statistics),
        defenses=target.defenses,
        dropout_seed=target.dropout_seed,
        running_after=target.running_after is not None,
        gradient_norms=norms,
        gradient_norm=sum(n**2 for n in norms.values()) ** 0.5,
        clients=target.clients,
    )


@dataclass(frozen=True)
class UpdatePrivacy:
    """What differential privacy promises of one update.

    Attributes:
        clipping: "per-sample" or "batch".
        noise_multiplier: Of the noise, in clipping norms.
        max_norm: Largest Euclidean norm of one sample's gradient.
        delta: Of the guarantee.
        epsilon: None without a guarantee.
    """

    clipping: str
    noise_multiplier: float
    max_norm: float
    delta: float
    epsilon: float | None


@dataclass(frozen=True)
class Measured:
    """What an extraction cost.

    Attributes:
        seconds: Of all but the writing.
        seconds_of_update: Of the client's local training and defenses.
        peak_memory_mib: Of the first process.
        processes: Of the client.
        indices: Of the client's images in the training images.
        update_cosine: Cosine between what is shared and the update before the defenses;
            None where the training itself is private, and of a sum.
        lone_elements: Of a sum's elements that are not zero, the share that one client alone
            contributed; None for one client's own update.
    """

    seconds: float
    seconds_of_update: float
    peak_memory_mib: float
    processes: int
    indices: tuple[int, ...]
    update_cosine: float | None = None
    lone_elements: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what was not measured is left out."""
        values = dataclasses.asdict(self) | {"indices": list(self.indices)}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Measured:
        """The inverse of `to_dict`; other keys are ignored."""
        names = [f.name for f in dataclasses.fields(Measured)]
        known = {name: values[name] for name in names if name in values}
        return Measured(**{**known, "indices": tuple(values["indices"])})


@dataclass(frozen=True)
class ExtractRecord:
    """One run of stage 2, as the JSON file beside the checkpoint holds it.

    Attributes:
        target: What the attacker sees.
        labels: True labels of the client's images.
        checkpoint: The gradient checkpoint's file.
        measured: What it cost.
        privacy: What differential privacy promises; None where it is not used.
        ranks: R-GAP's rank analysis by layer; empty where it was not asked for.
        arguments: The command line by flag.
        provenance: Versions, device and seed.
        schema_version: Of this description.
    """

    target: TargetDescription
    labels: tuple[int, ...]
    checkpoint: str
    measured: Measured
    privacy: UpdatePrivacy | None = None
    ranks: tuple[LayerRank, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the file holds them."""
        return {
            "schema_version": self.schema_version,
            **self.target.to_dict(),
            "arguments": dict(self.arguments),
            "labels": list(self.labels),
            "privacy": None if self.privacy is None else dataclasses.asdict(self.privacy),
            "rank_analysis": _ranks_to_dict(self.ranks),
            **self.measured.to_dict(),
            "checkpoint": self.checkpoint,
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ExtractRecord:
        """The inverse of `to_dict`, also for records without a version.

        Raises:
            InputError: It is one of a later version.
        """
        check_version(values, SCHEMA_VERSION, "the extraction")
        privacy = values.get("privacy")
        record = ExtractRecord(
            target=TargetDescription.from_dict(values),
            labels=tuple(values["labels"]),
            checkpoint=values["checkpoint"],
            measured=Measured.from_dict(values),
            privacy=None if privacy is None else UpdatePrivacy(**privacy),
            ranks=_ranks_from_dict(values.get("rank_analysis")),
            arguments=values.get("arguments", {}),
            provenance=values.get("provenance", {}),
        )
        check_types(record)
        return record


def _ranks_to_dict(ranks: tuple[LayerRank, ...]) -> dict[str, Any] | None:
    if not ranks:
        return None
    layers = [{**dataclasses.asdict(rank), "index": rank.index} for rank in ranks]
    return {"layers": layers, "maximum": ra_index(list(ranks))}


def _ranks_from_dict(values: Mapping[str, Any] | None) -> tuple[LayerRank, ...]:
    layers = [] if values is None else values["layers"]
    return tuple(
        LayerRank(**{name: value for name, value in layer.items() if name != "index"})
        for layer in layers
    )


def write_record(record: ExtractRecord, path: Path) -> None:
    """Write an extraction's record, atomically."""
    storage.write_record(path, record.to_dict())


def read_record(path: Path) -> ExtractRecord:
    """Read an extraction's record.

    Raises:
        InputError: There is none, or it is none of an extraction.
    """
    return records.read_record(path, "an extraction", ExtractRecord.from_dict)
