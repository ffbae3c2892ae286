"""The description of a data set that travels with every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataSpec:
    """What a model was trained on, as far as an attacker needs it.

    Attributes:
        name: Data set, for file names and tables.
        shape: Channels, height and width of one image.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        n_classes: Number of classes.
        class_names: Names in the order of labels; may be empty.
    """

    name: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_classes: int
    class_names: tuple[str, ...] = ()

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] (N x C x H x W) to the network's input."""
        return (images - self._channels(self.mean, images)) / self._channels(self.std, images)

    def denormalize(self, inputs: torch.Tensor) -> torch.Tensor:
        """The network's input (N x C x H x W) to images in [0, 1] (not clamped)."""
        return inputs * self._channels(self.std, inputs) + self._channels(self.mean, inputs)

    @staticmethod
    def _channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a record."""
        return {
            key: list(v) if isinstance(v, tuple) else v
            for key, v in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DataSpec:
        """The inverse of `to_dict`."""
        try:
            return DataSpec(
                name=str(values["name"]),
                shape=tuple(values["shape"]),
                mean=tuple(values["mean"]),
                std=tuple(values["std"]),
                n_classes=int(values["n_classes"]),
                class_names=tuple(values.get("class_names", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint's data description is broken: {error!r}") from None
