"""The targets that are attacked at equal time: which, and how they are made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import InputError


@dataclass(frozen=True)
class Case:
    """A kind of target, of which there is one per image.

    Attributes:
        name: In records and tables.
        data: A built-in data set, or a word of `FOLDERS`, whose folder the user gives.
        arch: Architecture.
        width: Channels of the first stage; None for the architecture's own.
        batch: Images per target.
        trained: "" for the initial model; epochs of stage 1 as a number; or a word of
            `WEIGHTS`, whose file the user gives.
        train_mode: Whether BatchNorm takes the statistics of the batch.
        side: Of images in pixels, where the data has none of its own.
    """

    name: str
    data: str
    arch: str
    width: int | None
    batch: int
    trained: str = ""
    train_mode: bool = False
    side: int | None = None


# Data and weights that are not embedded, and what their words in the flags are.
FOLDERS = ("cifar10", "tiny-imagenet", "imagenet")
WEIGHTS = ("resnet20",)
CASES = (
    Case("ConvNet, batch 1", "photo-patches", "convnet", 32, 1),
    Case("ConvNet, batch 4", "photo-patches", "convnet", 32, 4),
    Case("ConvNet, trained, batch 1", "photo-patches", "convnet", 16, 1, trained="8"),
    Case("ResNet-18, batch 1", "cifar10", "resnet18", 16, 1),
    Case("ResNet-18, batch 4", "cifar10", "resnet18", 16, 4),
    Case("ResNet-18, batch 8", "cifar10", "resnet18", 16, 8),
    Case("ResNet-18, batch 4, train mode", "cifar10", "resnet18", 16, 4, train_mode=True),
    Case("ResNet-18, trained, batch 1", "photo-patches", "resnet18", 16, 1, trained="8"),
    Case("ResNet-18, trained, batch 4", "photo-patches", "resnet18", 16, 4, trained="8"),
    Case("ResNet-20 of CIFAR-10, batch 1", "cifar10", "resnet20", None, 1, trained="resnet20"),
    Case("ResNet-18, 64 px, batch 1", "tiny-imagenet", "resnet18", 16, 1, side=64),
    Case("ResNet-18, 224 px, batch 1", "imagenet", "resnet18", None, 1, side=224),
)


@dataclass(frozen=True)
class Source:
    """Where the data and weights of cases are that are not embedded.

    Attributes:
        folders: A folder of class folders by word of `FOLDERS`.
        weights: A checkpoint by word of `WEIGHTS`.
    """

    folders: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, case: Case) -> str:
        """The flag without which the case cannot be made; "" if it can."""
        if case.data in FOLDERS and case.data not in self.folders:
            return f"--folder {case.data}=DIR"
        if case.trained in WEIGHTS and case.trained not in self.weights:
            return f"--weights {case.trained}=FILE"
        return ""


def find_cases(text: str, source: Source) -> list[Case]:
    """The cases that `--cases` names.

    Args:
        text: Names joined by semicolons, for they have commas; or "all", which leaves out what
            the source lacks.
        source: Where data and weights are.

    Raises:
        InputError: A name is unknown, or what it needs is not given.
    """
    if text == "all":
        return [case for case in CASES if not source.lacks(case)]
    known = {case.name: case for case in CASES}
    chosen = []
    for name in (word.strip() for word in text.split(";")):
        if name not in known:
            raise InputError(f"--cases {name}: unknown; known are {'; '.join(known)}")
        if lacking := source.lacks(known[name]):
            raise InputError(f"--cases {name}: needs {lacking}")
        chosen.append(known[name])
    return chosen


def make_cases(
    cases: Sequence[Case], images: Sequence[int], source: Source, folder: Path
) -> list[tuple[Path, int]]:
    """Run stages 1 and 2 for every target that has no checkpoint yet.

    The images vary slowest, so that a run cut short has seen every case.

    Returns:
        Per target its checkpoint and which image of the case it is, counted from 0.
    """
    return [
        (_make(case, image, source, folder), image)
        for image, case in itertools.product(images, cases)
    ]


def _make(case: Case, image: int, source: Source, folder: Path) -> Path:
    path = folder / "targets" / f"{case.name}_i{image}.tar"
    if not path.exists():
        words = [*_data(case, source), *_model(case, source, folder / "models")]
        words += ["-b", str(case.batch), *([] if case.train_mode else ["--model-eval"])]
        extract(words, image, path, folder / "stage2" / path.stem)
    return path


def extract(words: Sequence[str], image: int, path: Path, made: Path) -> None:
    """Run stage 2 on one batch of the data and keep its checkpoint alone.

    Args:
        words: Further flags of stage 2.
        image: Which batch, counted from 0.
        path: Of the checkpoint.
        made: Folder for what stage 2 writes.
    """
    from gradients.command import run

    run([*words, "--target-idx", str(image), "-j", "1", "--cpu", "--results", str(made)])
    path.parent.mkdir(parents=True, exist_ok=True)
    next(made.glob("*-checkpoint.pth.tar")).replace(path)


def _data(case: Case, source: Source) -> list[str]:
    side = [] if case.side is None else ["--image-size", str(case.side)]
    return ["--data", source.folders.get(case.data, case.data), *side]


def _model(case: Case, source: Source, folder: Path) -> list[str]:
    arch = ["-a", case.arch, *([] if case.width is None else ["--width", str(case.width)])]
    if not case.trained:
        return arch
    if case.trained in WEIGHTS:
        return [*arch, "--pretrained", source.weights[case.trained]]
    made = folder / f"{case.data}-{case.arch}-{case.trained}"
    if not (made / "model_best.pth.tar").exists():
        from training.main_pytorch import run

        words = [*_data(case, source), *arch, "--epochs", case.trained, "-b", "32", "--lr", "0.05"]
        run([*words, "--overwrite", "--no-tensorboard", "--result-root", str(made)])
    return ["--pretrained", str(made / "model_best.pth.tar")]
