"""What a site remembers of the global model, for the filters that check its answer."""

from __future__ import annotations

import numpy as np
import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from federated.flare.withholding import GLOBAL_WEIGHTS, ROUND


class GlobalModelTap(Filter):
    """A task data filter that keeps the global weights and the round in the site's context.

    When result filters run, NVFlare has forgotten the task's data. Sites with a
    `CXRLearner` need no tap: the learner keeps what the inverter needs.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Look at a task and let it pass unchanged."""
        try:
            dxo = from_shareable(shareable)
        except Exception as error:
            self.log_warning(fl_ctx, f"the task's data cannot be read ({error!r})")
            return shareable
        if dxo.data_kind == DataKind.WEIGHTS:
            kept = {name: _copy(value) for name, value in dxo.data.items()}
            fl_ctx.set_prop(GLOBAL_WEIGHTS, kept, private=True, sticky=True)
            number = shareable.get_header(AppConstants.CURRENT_ROUND)
            fl_ctx.set_prop(ROUND, number, private=True, sticky=True)
        return shareable


def _copy(value: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.array(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
