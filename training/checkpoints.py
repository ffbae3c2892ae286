"""The checkpoints in a run's folder: their names say the epoch and the accuracy."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from core.errors import InputError
from core.storage import load_checkpoint

logger = logging.getLogger(__name__)

INITIAL, BEST = "model_init.pth.tar", "model_best.pth.tar"
_NAME = re.compile(r"checkpoint_epoch_(\d{4,})_acc1_[\d.]+\.pth\.tar")


def checkpoint_name(epoch: int, acc1: float | None) -> str:
    """The name of the checkpoint after `epoch` epochs with a validation accuracy in percent.

    Where there is no accuracy, the name keeps its published form and says 0.
    """
    acc1 = 0.0 if acc1 is None else acc1
    return f"checkpoint_epoch_{epoch:04d}_acc1_{acc1:.2f}.pth.tar"


def checkpoint_epoch(path: Path) -> int:
    """The number of finished epochs in a checkpoint's name; -1 for other files."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints of finished epochs in a folder, oldest first."""
    found = [path for path in root.glob("checkpoint_epoch_*.pth.tar") if checkpoint_epoch(path) > 0]
    return sorted(found, key=checkpoint_epoch)


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the most epochs in a folder, if there is one."""
    return next(reversed(checkpoints(root)), None)


def usable_checkpoint(root: Path) -> Path | None:
    """The latest checkpoint in a folder that is whole; damaged ones after it are named.

    Raises:
        InputError: There are checkpoints, and none of them is whole.
    """
    damaged: InputError | None = None
    for path in reversed(checkpoints(root)):
        try:
            load_checkpoint(path, "--resume")
        except InputError as error:
            logger.warning("%s; trying the checkpoint before it", error)
            damaged = damaged or error
        else:
            return path
    if damaged is not None:
        raise damaged
    return None


def remove_unfinished(root: Path) -> None:
    """Remove half-written files of a run that was killed while it saved."""
    for path in root.glob(".*.pth.tar.*"):
        path.unlink()
