"""What an attack returns."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from core.data.specs import DataSpec
from core.target import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(repr=False)
class Reconstruction:
    """The outcome of one attack on one target.

    Attributes:
        images: N x C x H x W in [0, 1], on the CPU; or signals (N x C x L), volumes
            (N x C x D x H x W) or rows of a table (N x F), in [0, 1] only if they are bounded.
        labels: N recovered class indices, or whatever the client's loss compares with.
        objective: The gradient loss of `images`.
        trace: One dictionary per printed iteration (iteration, objective, ...).
        seconds: Wall-clock time of the attack.
        iterations: Number of finished iterations.
        status: "finished", "target-tv", "patience", "time" or "diverged".
        details: Anything else worth recording, plain values.
        members: Of an ensemble, every attack's own result by its name.
        confidence: N x columns of a table's records: how sure the attack is of each cell, from
            0 to 1; None where it does not say.
        data: Of text, says what tokens read.
    """

    images: torch.Tensor
    labels: torch.Tensor
    objective: float
    trace: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    iterations: int = 0
    status: str = "finished"
    details: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Reconstruction] = field(default_factory=dict)
    confidence: torch.Tensor | None = None
    data: DataSpec | None = None

    @property
    def texts(self) -> list[str]:
        """The sentences that token ids read; empty of anything but text."""
        return [] if self.data is None else [self.data.text(ids) for ids in self.images]

    def __repr__(self) -> str:
        n, *shape = self.images.shape
        return (
            f"Reconstruction of {n} images ({' x '.join(map(str, shape))}), labels "
            f"{described(self.labels)}, objective {self.objective:.3g} after {self.iterations} "
            f"iterations in {self.seconds:.1f} s ({self.status})"
        )

    def plot(self, columns: int = 8) -> Figure:
        """Draw the images with their labels.

        Volumes are drawn as a row of slices, signals as lines, rows of a table as coloured
        squares.

        Args:
            columns: Images per row.
        """
        from core.pictures import image_grid

        captions = self.labels.tolist() if self.labels.dim() == 1 else None
        return image_grid(self.images, captions, columns=columns)

    def _repr_html_(self) -> str:
        """The summary and the images or sentences, as a notebook shows them."""
        if self.data is not None:
            lines = "".join(f"<li>{html.escape(text)}</li>" for text in self.texts)
            return f"<p>{html.escape(repr(self))}</p><ol>{lines}</ol>"
        from core.pictures import as_html

        return f"<p>{html.escape(repr(self))}</p>{as_html(self.plot())}"
