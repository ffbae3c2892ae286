"""What may leave a site with a task's result: an allow-list, everything else stays.

A result is made anew from what is allowed. Headers, meta data and keys that nobody looked at
do not travel with it, whoever put them there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# Names and scores of a METRICS result: as many as an evaluation has, too few to hold an image.
MAX_METRICS = 64
MAX_NAME = 128
# Characters of the names of a result's scores and parts, all together: a line or two per score.
MAX_TEXT = 2048
MAX_INTEGER = 2**63 - 1
_NAME = re.compile(r"[\w .:/@-]+")


class NotAllowedError(ValueError):
    """A result holds something that no rule allows; the message says what."""


def is_round(value: Any) -> bool:
    """Whether a value is the number of a round."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    return bool(whole and 0 <= int(value) < 2**31)


def add_to_digest(found: Any, value: Any) -> None:
    """Feed a value to a hash: names, types, shapes and values."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            found.update(f"{name}:".encode())
            add_to_digest(found, value[name])
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(array_of(value))
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    else:
        found.update(json.dumps(value, default=str).encode())


def array_of(value: Any) -> np.ndarray:
    """A variable as an array of its own values: nothing is rounded.

    NumPy has no bfloat16; float32 holds all of its numbers.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    return np.asarray(value)


def mapping(data: Any) -> Mapping[str, Any]:
    """Data that have names.

    Raises:
        NotAllowedError: They have none.
    """
    if not isinstance(data, Mapping):
        raise NotAllowedError("the data are not a dictionary of variables")
    return data


def is_name(name: Any) -> bool:
    """Whether a variable or a score may be called so: by words, and not by a message."""
    return isinstance(name, str) and len(name) <= MAX_NAME and bool(_NAME.fullmatch(name))


def allowed_name(name: Any) -> str:
    """A name that may leave, see `is_name`.

    Raises:
        NotAllowedError: It may not.
    """
    if not is_name(name):
        raise NotAllowedError(
            f"a name is not made of at most {MAX_NAME} letters, digits, spaces and . : / @ -"
        )
    return str(name)


def variables(data: Any, shapes: Mapping[str, int] | None) -> dict[str, Any]:
    """The variables of an update: arrays of real numbers by the names of the global model.

    They come in its order where it is known: an order could say something, too.

    Args:
        data: What should be variables by name.
        shapes: Number of values of each variable of the global model; None where unknown.

    Raises:
        NotAllowedError: They are none, or none of the global model's.
    """
    found = {allowed_name(k): _variable(k, value, shapes) for k, value in mapping(data).items()}
    return {name: found[name] for name in (shapes or found) if name in found}


def _variable(name: str, value: Any, shapes: Mapping[str, int] | None) -> Any:
    tensor = isinstance(value, torch.Tensor)
    if not tensor and not isinstance(value, (np.ndarray, np.number, int, float)):
        raise NotAllowedError(f"the variable {name} is a {type(value).__name__}, not an array")
    array = array_of(value)
    if array.dtype.kind not in "iuf":
        raise NotAllowedError(f"the variable {name} is of type {array.dtype}, not real numbers")
    if shapes is not None and shapes.get(name) != array.size:
        raise NotAllowedError(
            f"the variable {name} of {array.size} values is none of the global model's"
        )
    return value if tensor else array


def scores(values: Any, what: str) -> dict[str, float | int | None]:
    """Scores by name, each of them one number.

    Args:
        values: What should be scores.
        what: What they are called, for messages.

    Raises:
        NotAllowedError: They are too many, or one is no number.
    """
    values = mapping(values)
    check_names(list(values), what)
    return {allowed_name(name): score(value, f"{what}: {name}") for name, value in values.items()}


def check_names(names: Sequence[Any], what: str) -> None:
    """Refuse more scores or parts than a result has, and names that could be a message.

    Args:
        names: Of all of them in one result; one may come several times.
        what: What they are called, for messages.

    Raises:
        NotAllowedError: They are too many, or together too long.
    """
    if len(names) > MAX_METRICS:
        raise NotAllowedError(f"{len(names)} {what} are more than {MAX_METRICS}")
    if sum(len(str(name)) for name in names) > MAX_TEXT:
        raise NotAllowedError(f"the names of the {what} have more than {MAX_TEXT} characters")


def score(value: Any, what: str) -> float | int | None:
    """One number, of eight bytes at most: an integer of Python could hold an image.

    Args:
        value: What should be a score; None stands for one that could not be computed.
        what: What it is called, for messages.

    Raises:
        NotAllowedError: It is something else.
    """
    if value is None:
        return None
    if isinstance(value, (np.ndarray, torch.Tensor)) and array_of(value).size == 1:
        value = array_of(value).item()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NotAllowedError(f"{what} is not one number")
    if abs(value) > (MAX_INTEGER if isinstance(value, int) else 1e300):
        raise NotAllowedError(f"{what} is not one number")
    return value
