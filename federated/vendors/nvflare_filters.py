"""NVFlare's privacy filters, as they stand in a job's configuration."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from federated.vendors.differences import Arrays, difference, numpy_seeded, required, update_of
from gradients.defenses import ClientView, Defense, Gradient, register_defense
from gradients.defenses.base import require

FILTERS = "nvflare.app_common.filters"


class NVFlareFilter(Defense):
    """One of NVFlare's filters on the update of a client."""

    @abc.abstractmethod
    def vendor(self) -> Any:
        """A new object of NVFlare's class."""

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """What the filter leaves of the difference of weights."""
        with numpy_seeded(client):
            shared = _filtered(self.vendor(), difference(gradient, client), client)
        return update_of(shared, gradient, client)


def _filtered(vendor: Any, values: Arrays, client: ClientView) -> Arrays:
    from nvflare.apis.dxo import DXO, DataKind, MetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable

    steps = {MetaKey.NUM_STEPS_CURRENT_ROUND: client.local.updates}
    given = DXO(DataKind.WEIGHT_DIFF, data=values, meta=steps)
    # None: the filter leaves the update as it is.
    found = vendor.process_dxo(given, Shareable(), FLContext())
    filtered: Arrays = (found or given).data
    return filtered


@register_defense("nvflare-percentile")
@dataclass(frozen=True)
class Percentile(NVFlareFilter):
    """NVFlare's `PercentilePrivacy`: drop small differences of weights, cut large ones.

    Per local step, differences below the percentile of all magnitudes become zero, and larger
    ones are cut at gamma. It adds no noise and promises nothing.

    Args:
        percentile: Of the magnitudes of the difference per step.
        gamma: Largest magnitude that is shared, per step.

    Source: NVFlare, `nvflare.app_common.filters.percentile_privacy`, with its defaults; after
        Shokri and Shmatikov, "Privacy-Preserving Deep Learning",
        https://doi.org/10.1145/2810103.2813687.
    """

    percentile: float = 10.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        require(0 <= self.percentile <= 100, "the percentile must lie in [0, 100]")
        require(self.gamma > 0, "gamma must be positive")

    def vendor(self) -> Any:
        """`PercentilePrivacy`."""
        filters = required(f"{FILTERS}.percentile_privacy", self.word, "federated")
        return filters.PercentilePrivacy(self.percentile, self.gamma)


@register_defense("nvflare-svt")
@dataclass(frozen=True)
class SparseVector(NVFlareFilter):
    """NVFlare's `SVTPrivacy`: a noisy choice of elements, cut at gamma, with Laplacian noise.

    Args:
        fraction: Share of the elements that is uploaded.
        epsilon_choice: Budget of the choice (`epsilon`).
        noise_var: Budget of every uploaded element.
        gamma: Largest magnitude per step; the noise is in proportion.
        tau: Threshold of the choice.

    Source: NVFlare, `nvflare.app_common.filters.svt_privacy`, whose defaults these are; Li et al.,
        "Privacy-Preserving Federated Brain Tumour Segmentation",
        https://arxiv.org/abs/1910.00962.
    """

    fraction: float = 0.1
    epsilon_choice: float = 0.1
    noise_var: float = 0.1
    gamma: float = 1e-5
    tau: float = 1e-6

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "the fraction must lie in (0, 1]")
        positive = (self.epsilon_choice, self.noise_var, self.gamma)
        require(min(positive) > 0, "epsilon, noise_var and gamma must be positive")

    def vendor(self) -> Any:
        """`SVTPrivacy`."""
        filters = required(f"{FILTERS}.svt_privacy", self.word, "federated")
        return filters.SVTPrivacy(
            self.fraction, self.epsilon_choice, self.noise_var, self.gamma, self.tau
        )

    def accounted(self, gradient: Gradient, client: ClientView) -> float:
        """The epsilon that the filter's own accountant says one round of this update spends."""
        vendor = self.vendor()
        with numpy_seeded(client):
            _filtered(vendor, difference(gradient, client), client)
        return float(vendor.get_privacy_spent())


@register_defense("nvflare-exclude")
@dataclass(frozen=True)
class ExcludedVariables(NVFlareFilter):
    """NVFlare's `ExcludeVars`: variables whose names match are not shared.

    Args:
        pattern: Regular expression that is searched for in the names, without colons and commas.

    Source: NVFlare, `nvflare.app_common.filters.exclude_vars`; it has no default.
    """

    pattern: str = "bn"

    def vendor(self) -> Any:
        """`ExcludeVars`."""
        return required(f"{FILTERS}.exclude_vars", self.word, "federated").ExcludeVars(self.pattern)
