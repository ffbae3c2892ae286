"""An optimizer's state from a file: its tensors, checked; never its options.

`load_state_dict` would take over learning rate, momentum and whatever else a file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from core.errors import InputError

MAX_HISTORY = 1000
# What torch's optimizers keep: of a parameter's shape, of all parameters in one row, a list of
# such rows or of numbers, or a number.
_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_FLAT = ("d", "prev_flat_grad")
_FLAT_LISTS = ("old_dirs", "old_stps")
_NUMBER_LISTS = ("ro", "al")
_NUMBERS = ("step", "t", "H_diag", "prev_loss", "func_evals", "n_iter")


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Give an optimizer the saved state of another one over parameters of the same shapes.

    Args:
        optimizer: Keeps its own options.
        saved: What `state_dict` gave.

    Raises:
        InputError: It is not the state of such an optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not _same_numbers(saved.get("param_groups"), optimizer):
        raise InputError("its optimizer's state is that of other parameters")
    total = sum(p.numel() for p in parameters)
    for number, values in state.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise InputError(f"its optimizer's state is of a parameter {number!r:.40}")
        if not isinstance(values, Mapping):
            raise InputError("its optimizer's state is not by name")
        for name, value in values.items():
            if not _fits(name, value, parameters[number], total):
                raise InputError(f"its optimizer's {name!s:.40} is not what it should be")
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _same_numbers(groups: Any, optimizer: torch.optim.Optimizer) -> bool:
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return False
    return [group.get("params") for group in groups] == own


def _fits(name: str, value: Any, parameter: torch.Tensor, total: int) -> bool:
    if name in _LIKE_PARAMETER:
        return value is None or _is_real(value, tuple(parameter.shape))
    if name in _FLAT:
        return value is None or _is_real(value, (total,))
    if name in _FLAT_LISTS:
        return _is_short(value) and all(_is_real(each, (total,)) for each in value)
    if name in _NUMBER_LISTS:
        return value is None or (
            _is_short(value) and all(each is None or _is_number(each) for each in value)
        )
    return name in _NUMBERS and (value is None or _is_number(value))


def _is_short(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_HISTORY


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or _is_real(value, ())


def _is_real(value: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and tuple(value.shape) == shape
        and value.is_floating_point()
    )
