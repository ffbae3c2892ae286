"""What a federation is asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HIGH_RISK_CLIENT = 9
# Settings that say what a site's own client is.
OWN = ("model", "loss", "data", "optimizer")


@dataclass(frozen=True)
class FederationSettings:
    """One federation, at any level of noise.

    Attributes:
        n_clients: Number of clients; one alone is the high-risk client.
        num_rounds: Rounds of the federation.
        min_clients: Updates that a round needs; None for all clients'.
        invert_clients: Numbers of the clients that measure leakage, between commas.
        batch_sizes: Images per local step, one per client between commas; None for the
            published ones.
        data_root: Folder of images; None for the phantoms.
        dataset_json_prefix: Lists are PREFIX + client + .json; None for the phantoms'.
        prior_file: Public image to start from and compare with.
        scale: Share of the phantoms' published numbers.
        image_size: Side in pixels.
        num_class: Number of classes.
        model_name: Network.
        lr: Local learning rate.
        local_epochs: Local epochs per round.
        seed: Of first weights and image order.
        rdlv_threshold: Relative data leakage value above which an update is withheld.
        frequency: Rounds between measurements.
        method: Of the inversion.
        iterations: Of the inversion.
        model: The sites' own module, `module:function`, in place of `model_name`.
        loss: Name of a loss, or `module:function`; None for cross-entropy.
        data: The sites' own samples, `module:function`, in place of the lists.
        optimizer: The sites' optimiser and its settings but `lr`; None for plain SGD.
    """

    n_clients: int = 1
    num_rounds: int = 100
    min_clients: int | None = None
    invert_clients: str = str(HIGH_RISK_CLIENT)
    batch_sizes: str | None = None
    data_root: Path | None = None
    dataset_json_prefix: str | None = None
    prior_file: Path | None = None
    scale: float = 1.0
    image_size: int = 32
    num_class: int = 2
    model_name: str = "cnn"
    lr: float = 0.01
    local_epochs: int = 1
    seed: int = 0
    rdlv_threshold: float = 1.0
    frequency: int = 1
    method: str = "full"
    iterations: int = 300
    model: str | None = None
    loss: str | None = None
    data: str | None = None
    optimizer: str | None = None

    @property
    def own(self) -> dict[str, str]:
        """What the sites' own client is, as far as it is said, by the components' arguments."""
        said = {name: getattr(self, name) for name in OWN}
        return {name: value for name, value in said.items() if value}
