"""Gaussian noise on a site's update, in proportion to the update itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO
from nvflare.apis.fl_context import FLContext

from core.errors import InputError
from federated.flare.withholding import FailClosedFilter
from federated.gate.allowed import array_of
from federated.gate.passage import WithheldError


class GaussianPrivacy(FailClosedFilter):
    """Adds zero-mean Gaussian noise to every variable of an update.

    The noise's standard deviation is `sigma0` times a percentile of the update's nonzero
    absolute values, all variables together. It is a calibrated perturbation without a
    guarantee: no epsilon follows from it.

    Source: Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning
        Unsafe?, 2022, section on Gaussian differential privacy,
        https://arxiv.org/abs/2202.06924.

    Args:
        sigma0: Noise level, relative to the percentile; 0 adds none.
        max_percentile: Percentile of the nonzero absolute values, 0 to 100.
        data_kinds: Kinds of data to filter; `["WEIGHT_DIFF", "WEIGHTS"]` if None.
        seed: For repeatable trials; fresh entropy if None, which protection needs.

    Raises:
        InputError: A negative level, or a percentile outside 0 to 100.
    """

    def __init__(
        self,
        sigma0: float = 0.1,
        max_percentile: float = 95,
        data_kinds: list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(data_kinds)
        if not _is_number(sigma0) or not 0 <= sigma0 < float("inf"):
            raise InputError(f"sigma0 {sigma0!r}: must be a number not below 0")
        if not _is_number(max_percentile) or not 0 <= max_percentile <= 100:
            raise InputError(f"max_percentile {max_percentile!r}: must lie between 0 and 100")
        self.sigma0 = sigma0
        self.max_percentile = max_percentile
        self.seed = seed
        self._rng = np.random.default_rng(seed)

    def setting(self) -> dict[str, Any]:
        """See `FailClosedFilter.setting`."""
        level = {"sigma0": self.sigma0, "max_percentile": self.max_percentile}
        return {**super().setting(), **level}

    def process_update(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        """See `FailClosedFilter.process_update`."""
        values = {name: array_of(value) for name, value in dxo.data.items()}
        sigma = self.sigma0 * percentile_of_nonzero(values, self.max_percentile)
        self.log_info(
            fl_ctx,
            f"Gaussian noise on {len(values)} variables: sigma {sigma:.4g} = sigma0 "
            f"{self.sigma0:g} x {self.max_percentile:g}th percentile of nonzero values",
        )
        if sigma > 0:
            noisy = {name: with_noise(v, sigma, self._rng) for name, v in values.items()}
            dxo.data = {name: _like(dxo.data[name], value) for name, value in noisy.items()}
        return dxo


def percentile_of_nonzero(values: Mapping[str, np.ndarray], percentile: float) -> float:
    """A percentile of the nonzero absolute values of all variables together.

    Args:
        values: Variables by name, any shapes.
        percentile: 0 to 100.

    Returns:
        The percentile; 0 if every value is zero, as in an update that says nothing.

    Raises:
        WithheldError: A value is not finite: no noise level follows from it.
    """
    every = np.concatenate([np.abs(v, dtype=np.float64).ravel() for v in values.values()])
    if not np.isfinite(every).all():
        raise WithheldError("the update holds values that are not finite")
    nonzero = every[every > 0]
    return float(np.percentile(nonzero, percentile)) if nonzero.size else 0.0


def with_noise(value: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """A variable plus zero-mean noise, of its own type: counts stay whole numbers.

    Args:
        value: Any shape, an array without dimensions included.
        sigma: Standard deviation of the noise.
        rng: Generator of the noise.
    """
    noisy = value + rng.normal(0.0, sigma, value.shape)
    if np.issubdtype(value.dtype, np.integer):
        noisy = np.rint(noisy)
    return np.asarray(noisy).astype(value.dtype)


def _like(old: Any, new: np.ndarray) -> Any:
    """A tensor where there was a tensor: federations exchange either."""
    return torch.from_numpy(new).to(old.device) if isinstance(old, torch.Tensor) else new


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
