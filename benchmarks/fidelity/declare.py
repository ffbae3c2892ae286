"""What a row of the comparison consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from benchmarks.fidelity.samples import Samples

# Trials of a row: images, batches or sentences, each under initial parameters of its own.
TRIALS = 8


@dataclass(frozen=True)
class Published:
    """What a paper or its code states.

    Attributes:
        value: The number.
        unit: "dB", or "share" of images, labels, tokens or cells.
        where: Table, equation, notebook or file.
        address: Of it.
        opened: Whether it was read there for this row; else it is quoted as the field quotes it.
        note: What else it says, such as a deviation, or of how many images it is.
    """

    value: float
    unit: str
    where: str
    address: str
    opened: bool = True
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """One of a row's repetitions.

    Attributes:
        number: Counted from 0; which images, which initial parameters, which start.
        samples: Where images and sentences come from.
        device: Where to compute.
        weights: Files of trained weights, by what rows call them.
    """

    number: int
    samples: Samples
    device: torch.device
    weights: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one trial gave.

    Attributes:
        value: In the published value's unit, the mean over the trial's images.
        details: What else was measured.
    """

    value: float
    details: Mapping[str, float] = field(default_factory=dict)


class Experiment(Protocol):
    """What a row runs."""

    @property
    def kind(self) -> str:
        """The samples that it takes, see `Samples`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Files of trained weights that it cannot do without."""

    @property
    def second(self) -> str:
        """The package that runs the same attack on the same gradient; empty: there is none."""

    def ours(self, trial: Trial) -> Outcome:
        """This project's attack."""


@runtime_checkable
class Compared(Protocol):
    """An experiment that a second implementation runs as well."""

    def beside(self, trial: Trial) -> Outcome:
        """The second implementation."""


@dataclass(frozen=True)
class Row:
    """A published attack or label rule at its published setting.

    Attributes:
        name: For `--only`.
        attack: The registered name, or "labels:RULE".
        setting: Model, initialisation, data, batch, iterations, restarts, weights, in words.
        published: What was published of it.
        experiment: What is run; None where another command runs it.
        seconds: Of one trial on one core of a quiet machine, about.
        differs: What our setting has otherwise than the published one.
        incomparable: Why the two values cannot be compared; empty where they can.
        below: Why ours is lower, should it be.
        gpu_hours: Of all trials on one GPU, about; 0: a processor suffices.
        command: What computes it; empty: `python -m benchmarks fidelity --only NAME`.
        trials: How many.
    """

    name: str
    attack: str
    setting: str
    published: Published
    experiment: Experiment | None
    seconds: float = 10.0
    differs: str = ""
    incomparable: str = ""
    below: str = ""
    gpu_hours: float = 0.0
    command: str = ""
    trials: int = TRIALS

    @property
    def run_by(self) -> str:
        """The command that computes the row."""
        if self.command:
            return self.command
        device = " --device cuda" if self.gpu_hours else ""
        return f"python -m benchmarks fidelity --only {self.name}{device}"
