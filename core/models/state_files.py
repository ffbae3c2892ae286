"""Parameters of a model from whatever file people keep them in.

Frameworks wrap a model before they save it, and each puts its parameters under another key.
What is read here is told apart by the names of the model that it is for.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core.array_files import read_arrays
from core.errors import InputError
from core.models.building import counts_batches, load_parameters
from core.reading import check_regular
from core.storage import load_checkpoint

State = dict[str, torch.Tensor]
# A state by name, or a list in the order of the model's state (Flower, NVFlare's NumPy models).
States = Mapping[str, torch.Tensor | np.ndarray] | Sequence[torch.Tensor | np.ndarray]

# What trainers call the entry that holds the parameters, the most telling first.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "parameters",
    "weights",
    "module",
)
# What wrappers put before every name: DataParallel, torch.compile, Opacus, Lightning and others.
PREFIXES = ("module.", "_orig_mod.", "_module.", "model.", "net.", "network.", "backbone.")
# How deep an entry with the parameters may lie.
_DEPTH = 3
_SHOWN = 3


def read_state(path: str | Path, flag: str) -> State:
    """Read the tensors of a model's state from a file. Nothing in it is run.

    Args:
        path: A file of `torch.save` (`.pt`, `.pth`, `.tar`, ...), a `.safetensors`, or NumPy
            arrays by name (`.npz`).
        flag: The flag or argument that the user gave it with, for messages.

    Returns:
        The tensors by the names they have in the file.

    Raises:
        InputError: It cannot be read, or holds no tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, flag)
    if path.suffix == ".npz":
        return _read_npz(path, flag)
    return state_in(load_checkpoint(path, flag), f"{flag}: {path}")


def state_in(content: Mapping[str, object], place: str = "the state") -> State:
    """The tensors of a model's state among what a program saved.

    Args:
        content: A state dictionary, or a dictionary that has one in it.
        place: Where it is from, for messages.

    Raises:
        InputError: There are no tensors in it.
    """
    found = next((state for state in _candidates(content, _DEPTH) if state), None)
    if found is None:
        raise InputError(f"{place} holds no model parameters")
    return found


def _candidates(content: Mapping[str, object], depth: int) -> Iterator[State]:
    """States in a dictionary: under the keys that trainers use, then the dictionary itself."""
    if depth:
        for key in STATE_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping):
                yield from _candidates(inner, depth - 1)
    tensors = {str(name): v for name, v in content.items() if isinstance(v, torch.Tensor)}
    if tensors:
        yield tensors
        return
    arrays = {str(name): v for name, v in content.items() if isinstance(v, np.ndarray)}
    yield {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _read_safetensors(path: Path, flag: str) -> State:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(
            f"{flag}: reading {path} needs the package safetensors: pip install safetensors"
        ) from None
    check_regular(path, flag, "safetensors file")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{flag}: {path} is no safetensors file ({error})") from None


def _read_npz(path: Path, flag: str) -> State:
    arrays = read_arrays(path, flag)
    if any(array.dtype.kind in "US" for array in arrays.values()):
        raise InputError(f"{flag}: {path} holds text, not a model's parameters")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def named(states: States, model_names: Sequence[str]) -> State:
    """A state by name; a list is in the order of the model's own.

    Args:
        states: Tensors or NumPy arrays, by name or in order.
        model_names: Names in the model's state, in order.

    Raises:
        InputError: A list of another length, or an entry that is no array.
    """
    if isinstance(states, Mapping):
        return {str(name): _tensor(str(name), value) for name, value in states.items()}
    names = [name for name in model_names if not counts_batches(name)]
    # Some programs leave the counters out of their lists, and some do not.
    names = list(model_names) if len(states) == len(model_names) else names
    if len(states) != len(names):
        raise InputError(
            f"a list of {len(states)} arrays is no state of a model that has {len(model_names)}"
        )
    return {name: _tensor(name, value) for name, value in zip(names, states, strict=True)}


def _tensor(name: str, value: object) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            raise InputError(f"{name} has no values: it lies on the device meta")
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} is no array of numbers but a {type(value).__name__}")
    return torch.from_numpy(np.array(array))


def renamed(state: State, model_names: Collection[str]) -> State:
    """A state under the model's own names: prefixes of wrappers are taken off or put on.

    Args:
        state: By the names of a file.
        model_names: Names in the model's state.

    Returns:
        The same tensors; unchanged where no prefix makes more of the names fit.
    """
    wanted = set(model_names)
    # A backbone's own file does not say which part of a larger model it is.
    parts = dict.fromkeys(f"{name.partition('.')[0]}." for name in model_names if "." in name)
    found = _renamings(state, [*PREFIXES, *(part for part in parts if part not in PREFIXES)])
    best = max(found, key=lambda names: len(wanted.intersection(names)))
    return dict(zip(best, state.values(), strict=True))


def _renamings(state: State, prefixes: Sequence[str]) -> list[list[str]]:
    """The names as they are, without the wrappers' prefixes, and either with one of `prefixes`."""
    names = list(state)
    found = [names]
    while True:
        shorter = [_without_prefix(name) for name in found[-1]]
        if shorter == found[-1] or len(set(shorter)) < len(names):
            break
        found.append(shorter)
    bases = [names] if found[-1] is names else [names, found[-1]]
    return found + [[prefix + name for name in base] for base in bases for prefix in prefixes]


def _without_prefix(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


@dataclass(frozen=True)
class Fit:
    """How a state fits a model.

    Attributes:
        state: What fits, by the model's names.
        missing: Names that the model has and the state has not.
        unexpected: Names that the state has and the model has not.
        other_shape: Names that both have, with both shapes.
    """

    state: State
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def sentence(self) -> str:
        """What does not fit, in a sentence with a few names."""
        parts = [
            _listed("are missing", self.missing, self.unexpected),
            _listed("are not the model's", self.unexpected, self.missing),
        ]
        for name, (given, own) in list(self.other_shape.items())[:1]:
            more = len(self.other_shape) - 1
            also = f" and {more} more differ" if more else ""
            parts.append(f"{name} has shape {given} where the model has {own}{also}")
        return "; ".join(filter(None, parts))


def _listed(what: str, names: Sequence[str], others: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    near = difflib.get_close_matches(names[0], others, n=1)
    hint = f" (nearest to {names[0]}: {near[0]})" if near else ""
    return f"{len(names)} names {what}: {shown}{hint}"


def fit(state: State, model: nn.Module) -> Fit:
    """Compare a state with a model; the model stays as it is.

    Args:
        state: By the names of a file.
        model: What it is meant for.
    """
    own = model.state_dict()
    given = renamed(state, own)
    both = [name for name in own if name in given]
    differing = {
        name: (tuple(given[name].shape), tuple(own[name].shape))
        for name in both
        if given[name].shape != own[name].shape
    }
    return Fit(
        state={name: given[name] for name in both if name not in differing},
        missing=tuple(n for n in own if n not in given and not counts_batches(n)),
        unexpected=tuple(name for name in given if name not in own and not counts_batches(name)),
        other_shape=differing,
    )


def load_fitting(model: nn.Module, found: Fit, place: str) -> tuple[str, ...]:
    """Load what fits into a model, in place.

    Args:
        model: Changed.
        found: See `fit`.
        place: Where it is from, for messages.

    Returns:
        Names that keep their values.

    Raises:
        InputError: No parameter of the model is there.
    """
    if not any(name in found.state for name, _ in model.named_parameters()):
        raise InputError(f"{place}: no parameter fits {type(model).__name__}: {found.sentence()}")
    own = model.state_dict()
    load_parameters(model, own | {n: v.to(own[n].dtype) for n, v in found.state.items()})
    return (*found.missing, *found.other_shape)
