"""What goes into some layers of a model, summed into a penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def watch_layers(
    model: torch.nn.Module,
    names: Iterable[str],
    term: Callable[[str, torch.Tensor], torch.Tensor | None],
) -> Callable[[], torch.Tensor]:
    """Watch what goes into some layers.

    Args:
        model: Whose forward passes are watched until the result is called.
        names: Of the layers.
        term: A layer's name and its input to a summand; None to leave this pass out.

    Returns:
        Gives the sum over the layers and passes, and ends the watch.
    """
    terms: list[torch.Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found = term(name, inputs[0])
            if found is not None:
                terms.append(found)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]

    def total() -> torch.Tensor:
        for handle in handles:
            handle.remove()
        return torch.stack(terms).sum()

    return total


def smooth_norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm with a finite slope at 0."""
    return (x.square().sum() + torch.finfo(x.dtype).tiny).sqrt()
