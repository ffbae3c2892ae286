"""The cells that an entry is made of: trainings of victims, pieces of attacks, and its utility."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.leaderboard.protocol import INITIAL, Protocol, Setting, Victim
from benchmarks.run.cells import Cell, Input
from benchmarks.run.stages import STAGES, Stage, make_cell

# Images of a piece: what an interruption costs, against a second for its start.
PIECE = 16
PIECES = Stage(
    name="piece",
    script=("-m", "benchmarks.leaderboard.piece"),
    rooms=("core", "gradients", "attack", "benchmarks/leaderboard/piece.py"),
    outputs=lambda folder: {"results": str(folder)},
    record="record.json",
    distributed=False,
    imports=("torchvision", "attack.attacks", "gradients.client", "core.data.data_sets"),
)
ALL_STAGES: Mapping[str, Stage] = {**STAGES, PIECES.name: PIECES}
# Of every training of a protocol.
_TRAINING = {"lr-schedule": "cosine", "workers": 0, "save-every": 1000, "no-tensorboard": True}
_MODEL_FILES = {INITIAL: "model_init.pth.tar"}
_TRAINED_FILE = "model_best.pth.tar"


@dataclass(frozen=True)
class Candidate:
    """A defense that is measured.

    Attributes:
        defense: Words as `--defense` takes them; empty for none.
        threat: Name of the attacker.
        plugin: Module that registers the defense.
        sigma: Noise multiplier of DP-SGD beside it; None: no DP-SGD.
    """

    defense: str
    threat: str
    plugin: str | None = None
    sigma: float | None = None

    @property
    def flags(self) -> dict[str, Any]:
        """What the commands of both stages are told of it."""
        given = {"defense": self.defense or None, "plugin": self.plugin, "sigma": self.sigma}
        return {flag: value for flag, value in given.items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """Everything that is computed for an entry.

    Attributes:
        protocol: By which it is measured.
        candidate: What is measured.
    """

    protocol: Protocol
    candidate: Candidate

    def cells(self) -> list[Cell]:
        """All of them, without the victims that pieces need."""
        return [*self.trainings, *(cell for cells in self.pieces.values() for cell in cells)]

    @functools.cached_property
    def trainings(self) -> list[Cell]:
        """The federations that train under the defense, one per seed."""
        rules = self.protocol.utility
        flags = self._training_flags(rules.arch, rules.width, rules.epochs, rules.lr)
        flags |= {"batch-size": rules.batch_size, "clients": rules.clients}
        flags |= {"rounds-per-epoch": rules.rounds, **self.candidate.flags}
        if self.candidate.sigma is not None:
            flags["enable-dp"] = True
        return [make_cell(STAGES["train"], {**flags, "seed": seed}, {}) for seed in rules.seeds]

    @functools.cached_property
    def victims(self) -> dict[Victim, Cell]:
        """The trainings of the networks that are attacked; all entries share them."""
        return {victim: self._victim(victim) for victim in self.protocol.victims}

    @functools.cached_property
    def pieces(self) -> dict[Setting, list[Cell]]:
        """The attacks, by setting, in the order of the images."""
        return {setting: list(self._pieces(setting)) for setting in self.protocol.settings}

    def labels(self) -> dict[str, str]:
        """A name for people for every cell."""
        named = {cell.key: f"victim {victim.arch}" for victim, cell in self.victims.items()}
        named |= {cell.key: f"accuracy, seed {cell.config['seed']}" for cell in self.trainings}
        for setting, cells in self.pieces.items():
            for number, cell in enumerate(cells, 1):
                named[cell.key] = f"{setting.name}, part {number} of {len(cells)}"
        return named

    def _training_flags(self, arch: str, width: int, epochs: int, lr: float) -> dict[str, Any]:
        given = {"data": self.protocol.data, "arch": arch, "width": width, "epochs": epochs}
        return {**given, "lr": lr, **_TRAINING}

    def _victim(self, victim: Victim) -> Cell:
        flags = self._training_flags(victim.arch, victim.width, victim.epochs, victim.lr)
        flags |= {"batch-size": victim.batch_size, "seed": self.protocol.seed}
        return make_cell(STAGES["train"], flags, {})

    def _pieces(self, setting: Setting) -> Iterator[Cell]:
        protocol, candidate = self.protocol, self.candidate
        file = _MODEL_FILES.get(setting.state, _TRAINED_FILE)
        model = Input(self.victims[setting.victim], file)
        flags = {
            "data": protocol.data,
            "seed": protocol.seed,
            "images": protocol.images,
            "batch-size": setting.batch_size,
            "threat": candidate.threat,
            "members": ",".join(protocol.members),
            "evaluations": protocol.evaluations,
            **candidate.flags,
        }
        size = max(setting.batch_size, PIECE // setting.batch_size * setting.batch_size)
        for first in range(0, protocol.images, size):
            count = min(size, protocol.images - first)
            place = {"first": first, "count": count}
            yield make_cell(PIECES, {**flags, **place}, {"pretrained": model})
