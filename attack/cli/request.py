"""What the command line of stage 3 asks for, as records that all below it work with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from attack.knowledge.requirements import Knowledge
    from core.target import Target, Truth


@dataclass(frozen=True)
class Measuring:
    """What is measured against the truth.

    Attributes:
        images: Compare the images by all metrics.
        one_to_one: One assignment for all metrics; else each takes its best match.
        information: Compute the gradient information ratio (GInfoR).
        lpips_weights: Folder of the LPIPS weights; None: where they are usually found.
    """

    images: bool = False
    one_to_one: bool = True
    information: bool = False
    lpips_weights: str | None = None


@dataclass(frozen=True)
class Showing:
    """What is shown and saved while the attack runs.

    Attributes:
        quiet: Print no progress and no tables.
        print_every: Iterations between two lines of progress.
        picture_every: Iterations between two pictures; 0: none.
        state_every: Iterations between two saves of the state.
    """

    quiet: bool = False
    print_every: int = 10
    picture_every: int = 0
    state_every: int = 500


@dataclass(frozen=True)
class AttackRun:
    """One run of stage 3.

    Attributes:
        checkpoint: The gradient checkpoint to invert.
        folder: Where the results go.
        knowledge: What the attacker knows.
        attack: Name of a published setting; None: the settings alone.
        settings: Settings by name: with an attack those that were given, else all.
        labels_only: Recover the labels by every rule, and end.
        model: Function that builds the client's own module, as `module:function`; None for one
            of our architectures.
        loss: The client's own loss, as `module:function`; None for a ready one.
        prior: File of the image to start from.
        spread: What several processes share: "batch" or "restarts".
        measuring: What is measured.
        showing: What is shown on the way.
        seed: Seed of every random number of the attack.
        plugin: Module to import first.
        arguments: The whole command line as plain values, for the record.
        beside: Further checkpoints that are inverted in the same way in the same process, and
            the folder of each one's results.
        at_once: Of them and this one, how many targets a batched run has; 0: all.
    """

    checkpoint: Path
    folder: Path
    knowledge: Knowledge
    attack: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels_only: bool = False
    model: str | None = None
    loss: str | None = None
    prior: str | None = None
    spread: str = "batch"
    measuring: Measuring = Measuring()
    showing: Showing = Showing()
    seed: int = 0
    plugin: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[tuple[Path, Path], ...] = ()
    at_once: int = 0

    def each(self) -> list[AttackRun]:
        """The run of every checkpoint by itself, this one's first."""
        alone = dataclasses.replace(self, beside=())
        others = [
            dataclasses.replace(
                alone,
                checkpoint=checkpoint,
                folder=folder,
                arguments={**self.arguments, "checkpoint": str(checkpoint)},
            )
            for checkpoint, folder in self.beside
        ]
        return [alone, *others]


@dataclass(frozen=True)
class Search:
    """A hyper-parameter search on a simulated checkpoint.

    Attributes:
        checkpoint: The simulated checkpoint.
        names: What to search, as argparse names the flags.
        iterations: Of a trial, where they are not searched.
        cpu: Do not use a GPU even if there is one.
        num_samples: Number of settings that are tried.
        max_concurrent: Trials at a time.
        gpus_per_trial: Share of a GPU reserved for a trial.
        min_t: Iterations before which no trial is stopped.
        max_t: Iterations after which every trial is stopped.
        verbose: Verbosity of Ray Tune, 0 to 3.
    """

    checkpoint: str
    names: tuple[str, ...]
    iterations: int
    cpu: bool
    num_samples: int
    max_concurrent: int
    gpus_per_trial: float
    min_t: int
    max_t: int
    verbose: int


def open_checkpoint(
    run: AttackRun, path: str | Path | None = None, flag: str = "--checkpoint"
) -> tuple[Target, Truth | None]:
    """Read a gradient checkpoint with the user's own code that the run names.

    Args:
        run: Names the model and the loss, where they are the user's own.
        path: Another file than the run's checkpoint.
        flag: The flag that it was given with, for messages.

    Raises:
        InputError: It cannot be read, or needs code that the run does not name.
    """
    from core.losses import as_function
    from core.models.own_model import model_builder
    from core.named_objects import named_object
    from gradients.checkpoint import load_target

    build = None if run.model is None else model_builder(run.model)
    loss = None if run.loss is None else as_function(named_object(run.loss, "--loss"), "--loss")
    return load_target(path or run.checkpoint, flag, build, loss)


def prior_images(path: str, target: Target) -> torch.Tensor:
    """The image of a file for every image of the batch: N x C x H x W in [0, 1]."""
    from core.pictures import read_image

    image = read_image(path, tuple(target.data.shape), "--prior")
    return image.expand(target.batch_size, *image.shape)
