"""What a site with a Client API script tells the filters about its local training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from nvflare.apis.fl_component import FLComponent

from audit.updates import LocalUpdate
from core.errors import InputError
from federated.flare.site_training import SiteSettings, SiteTraining


class SiteDescription(FLComponent):
    """Stands in for a learner where the training script runs outside of NVFlare's classes.

    Give it the settings of `federated.flare.client`, and add a `GlobalModelTap`.

    Args:
        data_root: Folder that the list's paths start from.
        dataset_json: The site's data list.
        model_name: Name of the network.
        num_class: Number of classes.
        image_size: Side in pixels.
        batch_size: Images per local step.
        aggregation_epochs: Passes over the training images per round.
        lr: Learning rate of the first rounds.
        seed: Seed of the order in which a round visits the images.
        optimizer: The optimiser and its settings but `lr`.
        model: The site's own module, `module:function` of the job's custom folder, in place of
            `model_name`.
        loss: Name of a loss, or `module:function`; cross-entropy if None.
        data: The site's own samples, `module:function`, in place of the list. A round visits
            them in the order of `seed`.
    """

    def __init__(
        self,
        data_root: str | None = None,
        dataset_json: str | None = None,
        model_name: str = "cnn",
        num_class: int = 2,
        image_size: int = 32,
        batch_size: int = 64,
        aggregation_epochs: int = 1,
        lr: float = 1e-2,
        seed: int = 0,
        optimizer: str = "sgd",
        model: str | None = None,
        loss: str | None = None,
        data: str | None = None,
    ) -> None:
        super().__init__()
        self.data_root = data_root
        self.dataset_json = dataset_json
        self.model_name = model_name
        self.num_class = num_class
        self.image_size = image_size
        self.batch_size = batch_size
        self.aggregation_epochs = aggregation_epochs
        self.lr = lr
        self.seed = seed
        self.optimizer = optimizer
        self.model = model
        self.loss = loss
        self.data = data
        self._settings = SiteSettings(
            data_root=data_root, dataset_json=dataset_json, model_name=model_name,
            num_class=num_class, image_size=image_size, batch_size=batch_size,
            aggregation_epochs=aggregation_epochs, lr=lr, seed=seed, optimizer=optimizer,
            model=model, loss=loss, data=data,
        )  # fmt: skip
        self._site: SiteTraining | None = None
        self._weights: Mapping[str, np.ndarray] | None = None
        self._round = 0

    def observe(self, weights: Mapping[str, np.ndarray] | None, round_number: int) -> None:
        """Take note of the global model that a round starts from."""
        self._weights, self._round = weights, round_number

    def local_update(self, change: Mapping[str, np.ndarray], bn_momentum: float) -> LocalUpdate:
        """What an attacker who knows this site's settings knows of the round's update.

        Raises:
            InputError: No tap has seen the global weights.
        """
        if self._weights is None:
            raise InputError(
                "the global weights are unknown: add federated.flare.taps.GlobalModelTap"
            )
        return self._training().local_update(change, self._weights, self._round, bn_momentum)

    def public_images(self) -> torch.Tensor:
        """Images that an attacker may know; P x C x ..., in [0, 1] where they have bounds."""
        return self._training().public_images()

    def _training(self) -> SiteTraining:
        self._site = self._site or SiteTraining(self._settings)
        return self._site
