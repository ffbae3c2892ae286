"""How good an attack's images are over its iterations, and pictures on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attack.loop.schedules import stage_ends
from attack.metrics import assign, data_range, psnr, to_unit_range
from attack.settings import InversionConfig
from core.errors import InputError
from core.pictures import save_images
from core.reading import read_json
from core.records import fits
from core.storage import write_json

if TYPE_CHECKING:
    from attack.cli.report import Output

SNAPSHOTS_OF_A_CURVE = 20


class Curve:
    """Watches the attack from outside: PSNR over iterations, and pictures on the way.

    Args:
        output: Of the run.
    """

    def __init__(self, output: Output) -> None:
        run, config = output.run, getattr(output.attack, "config", None)
        # E2EGI's stages end with a picture, whatever the snapshots are.
        self.stages = stage_ends(config) if isinstance(config, InversionConfig) else []
        self.iterations = output.attack.iterations
        self.folder, self.picture_every = run.folder, run.showing.picture_every
        self.truth = output.truth if run.measuring.images else None
        # A continued run keeps the points of the interrupted one.
        self.file = run.folder / f"state-{output.key}-curve.json"
        self.points: list[dict[str, float]] = []
        if self.file.exists():
            self.points = self._read()

    def _read(self) -> list[dict[str, float]]:
        points: list[dict[str, float]] = read_json(self.file, "--root")
        if not fits(points, list[dict[str, float]]):
            raise InputError(f"--root: {self.file} holds no curve; remove it")
        return points

    def every(self, iterations: int | None) -> int:
        """Iterations between two snapshots; 0: none are taken."""
        if self.picture_every:
            return self.picture_every
        if self.truth is None or iterations is None:
            return 0
        return max(1, iterations // SNAPSHOTS_OF_A_CURVE)

    def __call__(self, iteration: int, images: torch.Tensor) -> None:
        """Take note of the batch as it stands (N x C x H x W in [0, 1], or others)."""
        if iteration in self.stages:
            number = self.stages.index(iteration) + 1
            save_images(
                self.folder / f"stage{number}.png",
                images,
                title=f"stage {number} of 3, iteration {iteration}",
            )
        every = self.every(self.iterations)
        if not every or iteration % every:
            return
        if self.truth is not None:
            bounds = data_range(self.truth.images)
            found, originals = (to_unit_range(x, bounds) for x in (images, self.truth.images))
            mean = float(psnr(found[assign(found, originals)], originals).mean())
            # Iterations after the last saved state are run again.
            earlier = [point for point in self.points if point["iteration"] < iteration]
            self.points = [*earlier, {"iteration": iteration, "psnr": mean}]
            write_json(self.file, self.points)
        if self.picture_every:
            name = f"progress_{iteration:06d}.png"
            save_images(self.folder / name, images, title=f"iteration {iteration}")
