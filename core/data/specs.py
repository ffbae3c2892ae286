"""The description of a data set that travels with every checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.data.columns import Columns
from core.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def per_channel(name: str, values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    """A normalisation as a user states it: one number for all channels, or one for each.

    Args:
        name: "mean" or "std", for messages; the second must be positive.
        values: As stated.
        channels: How many there are.

    Raises:
        InputError: Not as many finite numbers.
    """
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    numbers = numbers.expand(channels) if len(numbers) == 1 else numbers
    if len(numbers) != channels or not numbers.isfinite().all():
        raise InputError(f"{name} must be a number, or one for each of the {channels} channels")
    if name == "std" and float(numbers.min()) <= 0:
        raise InputError("std must be positive")
    return tuple(numbers.tolist())


@dataclass(frozen=True)
class DataSpec:
    """What a model was trained on, as far as an attacker needs it.

    Attributes:
        name: Data set, for file names and tables.
        shape: Of one image (C, H, W), volume (C, D, H, W), signal (C, L) or row of a table (F,);
            of a text its number of tokens (T,).
        mean: Per channel, of images in [0, 1]; of a table's row one per feature.
        std: Per channel, of images in [0, 1]; of a table's row one per feature.
        n_classes: Number of outputs per sample where targets are classes or labels, else 0.
        class_names: Names in the order of labels; may be empty.
        bounded: Whether values lie in [0, 1]. What has no bounds (a table, a signal) is
            neither boxed by an attack nor clamped.
        columns: Of a table whose features are encoded columns; None for all else.
        n_tokens: Size of the vocabulary where inputs are token ids (N x T, whole numbers, which
            have no normalisation); 0 where they are numbers.
        tokens: The text of every token, in the order of ids; may be empty.
        pad: The token id that fills up sentences shorter than T, at their end; None: none does.
    """

    name: str
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_classes: int
    class_names: tuple[str, ...] = ()
    bounded: bool = True
    columns: Columns | None = None
    n_tokens: int = 0
    tokens: tuple[str, ...] = ()
    pad: int | None = None

    @staticmethod
    def of_tokens(
        name: str,
        length: int,
        n_tokens: int,
        tokens: Sequence[str] = (),
        pad: int | None = None,
    ) -> DataSpec:
        """The description of sentences of that many token ids; the number of classes is open.

        Raises:
            InputError: `pad` is no token.
        """
        if pad is not None and not (isinstance(pad, int) and 0 <= pad < n_tokens):
            raise InputError(f"pad: a token id in 0..{n_tokens - 1}, not {pad!r:.40}")
        return DataSpec(
            name,
            (length,),
            (),
            (),
            0,
            bounded=False,
            n_tokens=n_tokens,
            tokens=tuple(tokens),
            pad=pad,
        )

    def is_word(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of these token ids (any shape) are of the sentences, and no padding."""
        return torch.ones_like(ids, dtype=torch.bool) if self.pad is None else ids != self.pad

    @property
    def words(self) -> torch.Tensor:
        """Every token id of the vocabulary but padding."""
        every = torch.arange(self.n_tokens)
        return every[self.is_word(every)]

    @property
    def any_word(self) -> int:
        """A token id that is no padding, for places whose token is unknown."""
        return 1 if self.pad == 0 else 0

    def placed(self, inputs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Inputs on a parameter's device, in its precision unless they are token ids."""
        return inputs.to(like.device, None if self.n_tokens else like.dtype)

    def text(self, ids: torch.Tensor) -> str:
        """What a sentence of T token ids reads; the ids themselves where tokens have no text."""
        ids = ids[self.is_word(ids)]
        if not self.tokens:
            return " ".join(map(str, ids.tolist()))
        return "".join(self.tokens[number] for number in ids.tolist())

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] (N x C x ...) to the network's input."""
        if self.n_tokens:
            return images
        return (images - self._channels(self.mean, images)) / self._channels(self.std, images)

    def denormalize(self, inputs: torch.Tensor) -> torch.Tensor:
        """The network's input (N x C x ...) to images in [0, 1] (not clamped)."""
        if self.n_tokens:
            return inputs
        return inputs * self._channels(self.std, inputs) + self._channels(self.mean, inputs)

    def clamp(self, images: torch.Tensor) -> torch.Tensor:
        """Images moved into [0, 1]; as they are where values have no bounds."""
        return images.clamp(0, 1) if self.bounded else images

    @staticmethod
    def _channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        numbers = torch.tensor(values, dtype=like.dtype, device=like.device)
        return numbers.view(1, -1, *[1] * (like.dim() - 2))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a record."""
        values = {
            key: list(v) if isinstance(v, tuple) else v
            for key, v in dataclasses.asdict(self).items()
        }
        # Said only where it is not so: files and records of images stay what they were.
        if self.bounded:
            del values["bounded"]
        if not self.n_tokens:
            del values["n_tokens"], values["tokens"]
        if self.pad is None:
            del values["pad"]
        del values["columns"]
        if self.columns is not None:
            values["columns"] = self.columns.to_list()
        return values

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
                bounded=bool(values.get("bounded", True)),
                n_tokens=int(values.get("n_tokens", 0)),
                tokens=tuple(values.get("tokens", ())),
                pad=int(values["pad"]) if values.get("pad") is not None else None,
                columns=Columns.from_list(values["columns"]) if "columns" in values else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint's data description is broken: {error!r}") from None
