"""Updates as the frameworks see them: differences of weights, in NumPy."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType

import numpy as np
import torch

from core.errors import InputError
from gradients.defenses import ClientView, Gradient

Arrays = dict[str, np.ndarray]


def length_of(client: ClientView) -> float:
    """Learning rate times local steps: theta_0 - theta_K is so many times the update."""
    return client.local.lr * client.local.updates


def difference(update: Gradient, client: ClientView) -> Arrays:
    """theta_K - theta_0, what a client of NVFlare shares as WEIGHT_DIFF."""
    length = length_of(client)
    return {n: (-length * g).detach().cpu().numpy().copy() for n, g in update.items()}


def update_of(shared: Mapping[str, np.ndarray], like: Gradient, client: ClientView) -> Gradient:
    """The inverse of `difference`, for those of the parameters that are there."""
    length = length_of(client)
    return {
        name: torch.as_tensor(np.asarray(shared[name]) / -length).to(g)
        for name, g in like.items()
        if name in shared
    }


@contextlib.contextmanager
def numpy_seeded(client: ClientView) -> Iterator[None]:
    """Within the block NumPy's global generator, which frameworks draw from, is the client's."""
    seed = int(torch.randint(2**31, (1,), generator=client.generator))
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def required(module: str, defense: str, extra: str) -> ModuleType:
    """Import a module of a framework.

    Raises:
        InputError: It is not installed here; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"--defense {defense} runs {module.split('.')[0]}'s own code, which is not installed "
            f"in this environment: pip install 'gradinvbench[{extra}]'"
        ) from None
