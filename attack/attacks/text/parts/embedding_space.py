"""A client of token ids as one of embeddings, which can be optimised, and back to ids."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from core.data.specs import DataSpec
from core.models.architecture import GivenModel
from core.models.token_embedding import token_embedding
from core.target import Target

PREFIX = "model."


class Embedded(nn.Module):
    """A language model that is given embeddings in place of token ids.

    Args:
        model: Takes token ids.
        name: Of the layer that looks them up.
        scale: Of the embeddings: inputs are in this unit.
        token: Any that is no padding.
    """

    def __init__(self, model: nn.Module, name: str, scale: float, token: int = 0) -> None:
        super().__init__()
        self.model, self.name, self.scale, self.token = model, name, scale, token

    def forward(self, inputs: torch.Tensor) -> object:
        """The outputs for embeddings (N x T x width)."""
        layer = self.model.get_submodule(self.name)
        handle = layer.register_forward_hook(lambda module, given, output: inputs * self.scale)
        try:
            return self.model(inputs.new_full(inputs.shape[:2], self.token, dtype=torch.long))
        finally:
            handle.remove()


@dataclasses.dataclass(frozen=True)
class EmbeddingSpace:
    """Where an attack optimises.

    Attributes:
        target: The client as one of embeddings (N x T x width), in units of their spread; what it
            shared of the embedding itself is left out.
        vectors: tokens x width, every token's embedding in that unit.
    """

    target: Target
    vectors: torch.Tensor

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The tokens (N x T) whose embeddings have the largest cosine with these."""
        directions = nn.functional.normalize(self.vectors, dim=-1)
        return (embeddings.to(directions) @ directions.T).argmax(-1)


def embedding_space(target: Target) -> EmbeddingSpace:
    """The client of a target as one whose inputs are embeddings.

    Raises:
        InputError: The model looks up no token ids.
    """
    model = target.build_model()
    name, layer = token_embedding(model, target.data.shape[0])
    weight = layer.weight.detach()
    scale = float(weight.std())
    width = weight.shape[1]
    shared = {n: p for n, p in model.named_parameters() if p is not layer.weight}
    ones = (1.0,) * target.data.shape[0]
    data = DataSpec(
        name=target.data.name,
        shape=(target.data.shape[0], width),
        mean=(0.0,) * len(ones),
        std=ones,
        n_classes=target.data.n_classes,
        bounded=False,
    )
    embedded = dataclasses.replace(
        target,
        model=GivenModel(Embedded(model, name, scale, target.data.any_word)),
        data=data,
        state_dict={PREFIX + n: value for n, value in target.state_dict.items()},
        gradient={PREFIX + n: g for n, g in target.gradient.items() if n in shared},
    )
    return EmbeddingSpace(embedded, (weight / scale)[: target.data.n_tokens])
