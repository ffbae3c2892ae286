"""Whether what a client shared belongs to the model that it is said to come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from core.errors import InputError, nearest


def check_update(
    shared: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], model: str
) -> None:
    """Refuse an update that nothing could have come from.

    Args:
        shared: What the client sent, by parameter name.
        parameters: Of the model that it received.
        model: What messages call it.

    Raises:
        InputError: Names the tensor that belongs to no parameter (and the nearest that there
            is), has another shape, or holds NaN or infinity.
    """
    if not shared:
        raise InputError(f"the update holds no parameter of {model}")
    for name, tensor in shared.items():
        if name not in parameters:
            raise InputError(
                f"the update names a parameter {name} that {model} has not; the nearest is "
                f"{nearest(name, parameters)}"
            )
        if tensor.shape != parameters[name].shape:
            raise InputError(
                f"the update of {name} has shape {tuple(tensor.shape)}, and {model} has it in "
                f"shape {tuple(parameters[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise InputError(f"the update of {name} is not finite (NaN or infinity)")
