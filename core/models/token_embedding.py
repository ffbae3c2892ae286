"""The layer of a language model that looks token ids up, found by what it is given."""

from __future__ import annotations

import torch
from torch import nn

from core.errors import InputError, first_line
from core.models.unchanged import in_mode, unchanged


def probe(length: int) -> torch.Tensor:
    """A sentence of token ids (1 x T) that is neither positions nor the types of a segment."""
    return (torch.arange(1, length + 1) % 2)[None]


def token_embedding(model: nn.Module, length: int) -> tuple[str, nn.Embedding]:
    """The embedding that is given the token ids as they are, and its name in the model.

    Args:
        model: Takes token ids (N x T); left as it is.
        length: T, a number of tokens that it takes.

    Raises:
        InputError: No embedding is given them, or the model does not take them.
    """
    ids = probe(length)
    found: list[nn.Module] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given and torch.equal(given[0].cpu(), ids):
            found.append(module)

    layers = {m: name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    handles = [module.register_forward_pre_hook(note) for module in layers]
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), unchanged(model):
            in_mode(model, False)(ids.to(parameter.device))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise InputError(
            f"the model {type(model).__name__} does not take sentences of {length} token ids: "
            f"{first_line(error)}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError(
            f"the model {type(model).__name__} has no nn.Embedding that is given token ids"
        )
    layer = found[0]
    assert isinstance(layer, nn.Embedding)
    return layers[layer], layer
