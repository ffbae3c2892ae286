"""The privacy classes of other frameworks, as defenses: their own objects do the work.

    python training/get_gradients.py --plugin federated.vendors --defense nvflare-percentile:10:0.01

NVFlare's filters get an update as the difference of weights, with the number of local steps, as a
client's executor hands it over; Flower's mods get the messages around a client's training;
Opacus' optimiser gets the gradients of single images. Buffers such as BatchNorm's running
statistics are left out of what they see. A framework is imported when its defense is used.
"""

from federated.vendors import known as known
from federated.vendors.flower_mods import AdaptiveClipping, FixedClipping, LocalDp
from federated.vendors.nvflare_filters import ExcludedVariables, Percentile, SparseVector
from federated.vendors.opacus_optimiser import OpacusDp

__all__ = [
    "AdaptiveClipping",
    "ExcludedVariables",
    "FixedClipping",
    "LocalDp",
    "OpacusDp",
    "Percentile",
    "SparseVector",
]
