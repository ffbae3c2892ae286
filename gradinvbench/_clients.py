"""What a user says about a client, read alike wherever it is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from core.data.specs import DataSpec, per_channel
from core.errors import InputError
from core.models.token_embedding import token_embedding
from core.target import LocalTraining


def local_training(given: LocalTraining | str | None, n_images: int) -> LocalTraining:
    """Local training, from the words of it too; default: one step."""
    if isinstance(given, str):
        return LocalTraining.parse(given, n_images)
    return given or LocalTraining()


def is_bounded(bounds: tuple[float, float] | None) -> bool:
    """Whether inputs lie in [0, 1].

    Raises:
        InputError: Other bounds than these.
    """
    if bounds is not None and tuple(bounds) != (0, 1):
        raise InputError(
            f"bounds must be (0, 1) or None, not {bounds}; scale the inputs to [0, 1] and give "
            "mean= and std= of what the model expects"
        )
    return bounds is not None


def data_spec(
    shape: Sequence[int],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    class_names: Sequence[str],
    bounded: bool,
) -> DataSpec:
    """The description of inputs of that shape; the number of classes is still open.

    Raises:
        InputError: A normalisation that does not fit them.
    """
    channels = shape[0]
    return DataSpec(
        name="given images",
        shape=tuple(shape),
        mean=per_channel("mean", 0.0 if mean is None else mean, channels),
        std=per_channel("std", 1.0 if std is None else std, channels),
        n_classes=0,
        class_names=tuple(class_names),
        bounded=bounded,
    )


def token_spec(
    model: nn.Module,
    ids: torch.Tensor,
    class_names: Sequence[str],
    tokens: Sequence[str],
    pad: int | None = None,
) -> DataSpec:
    """The description of sentences of token ids; the number of classes is still open.

    Args:
        model: Takes them.
        ids: N x T.
        class_names: Names in the order of labels.
        tokens: The text of every token; may be empty.
        pad: The token id that fills up short sentences at their end.

    Raises:
        InputError: The model looks up no tokens, or not these.
    """
    n_tokens = token_embedding(model, ids.shape[1])[1].num_embeddings
    if int(ids.min()) < 0 or int(ids.max()) >= n_tokens:
        raise InputError(f"token ids must lie in 0..{n_tokens - 1}, the vocabulary of the model")
    if tokens and len(tokens) != n_tokens:
        raise InputError(f"{len(tokens)} tokens for a vocabulary of {n_tokens}")
    spec = DataSpec.of_tokens("given text", ids.shape[1], n_tokens, tokens, pad)
    words = spec.is_word(ids)
    if not bool(words[:, :2].all()) or bool((words[:, 1:] & ~words[:, :-1]).any()):
        raise InputError("padding stands behind the two or more tokens of a sentence alone")
    return dataclasses.replace(spec, class_names=tuple(class_names))
