"""Defense schemes: what a client changes about training to leak less.

A scheme is a frozen record in a registry. Another one, in or outside this package, is
a few lines:

    from training.schemes import Scheme, register_scheme

    register_scheme(Scheme("RA9", pool_kernel=9))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.errors import InputError
from core.models.building import DEFAULT_POOL_KERNEL
from core.registry import Registry

CUSTOM = "None"
BATCH_NORMS = ("synchronized", "asynchronous")


@dataclass(frozen=True)
class Scheme:
    """One defense scheme.

    Attributes:
        name: For `--scheme` and tables.
        batch_size: Images per step over all processes.
        batch_norm: "synchronized" (statistics of the whole batch) or "asynchronous"
            (each process its own).
        pool_kernel: Kernel of the first max-pooling layer, as at 224 px.
        dp: Whether training is differentially private: clipped and noised.

    Source: the schemes of "Reveal the Leaker and Block the Attacker: Defending Gradient
    Inversion Attacks on Federated Learning" (gradient heterogeneity); RA after Zhu and
    Blaschko, R-GAP, https://arxiv.org/abs/2010.07733; DP-SGD after Abadi et al.,
    https://arxiv.org/abs/1607.00133.
    """

    name: str
    batch_size: int = 128
    batch_norm: str = "synchronized"
    pool_kernel: int = DEFAULT_POOL_KERNEL
    dp: bool = False

    def __post_init__(self) -> None:
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch_norm must be one of {BATCH_NORMS}, not {self.batch_norm!r}")
        if self.batch_size < 1 or self.pool_kernel < 1:
            raise ValueError("batch_size and pool_kernel must be at least 1")

    def defaults(self) -> dict[str, Any]:
        """The command's flags that this scheme sets, unless they are given."""
        return {
            "batch_size": self.batch_size,
            "syncbn": self.batch_norm == "synchronized",
            "kernel_size_of_maxpool": self.pool_kernel,
            "enable_dp": self.dp,
        }


_SCHEMES = Registry[Scheme]("scheme", reserved=CUSTOM)


def register_scheme(scheme: Scheme) -> Scheme:
    """Make `--scheme NAME` known.

    Raises:
        ValueError: The name is taken.
    """
    return _SCHEMES.add(scheme.name, scheme)


def scheme_names() -> list[str]:
    """Every name that `--scheme` takes, in order of registration, `None` first."""
    return [CUSTOM, *_SCHEMES]


def get_scheme(name: str) -> Scheme:
    """The registered scheme of this name.

    Raises:
        InputError: There is none.
    """
    if name not in _SCHEMES:
        raise InputError(f"--scheme {name}: unknown; known are {', '.join(scheme_names())}")
    return _SCHEMES[name]


register_scheme(Scheme("pure"))
register_scheme(Scheme("RA", pool_kernel=19))
register_scheme(Scheme("DP-SGD", dp=True))
register_scheme(Scheme("GH", batch_size=384, batch_norm="asynchronous"))
