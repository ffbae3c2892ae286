"""The site's learner: NVFlare's tasks answered by local training and validation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.learner_spec import Learner
from nvflare.app_common.app_constant import AppConstants, ModelName, ValidateType

from audit.updates import LocalUpdate
from core.errors import InputError
from core.storage import load_checkpoint, save_checkpoint
from federated.flare.site_training import (
    Scores,
    SiteSettings,
    SiteTraining,
    TrainingDiverged,
    TrainingStopped,
)
from federated.flare.withholding import WITHHELD, diverged_meta


class CXRLearner(Learner):
    """Trains and validates a chest X-ray classifier on a site's images.

    Keeps the global weights of the round, from which `GradInversionInverter` starts. Run
    it with NVFlare's `LearnerExecutor`.

    Args:
        data_root: Folder that the list's paths start from.
        dataset_json: The site's data list (decathlon format).
        aggregation_epochs: Passes over the training images per round.
        lr: Learning rate of the local SGD; a tenth after every 40 epochs.
        fedproxloss_mu: Weight of the FedProx term; 0 for none.
        analytic_sender_id: Component that streams scalars, if the job has one.
        batch_size: Images per local step.
        num_workers: Processes that load images.
        train_set: Section of the list to train on.
        valid_set: Section to validate on.
        test_set: Section to test on; may be absent.
        model_name: The network, see `federated.flare.networks`.
        num_class: Number of classes.
        cache_rate: Share of the images kept in memory.
        seed: Seed of the order in which a round visits the images.
        image_size: Side in pixels that images are resized to.
        optimizer: The optimiser and its settings but `lr`, such as "adamw weight-decay=0.01".
        model: The site's own module, `module:function` of the job's custom folder, in place of
            `model_name`.
        loss: Name of a loss, or `module:function`; cross-entropy if None.
        data: The site's own samples, `module:function`, in place of the list; see
            `federated.flare.site_training.SiteSettings`.

    Raises:
        InputError: Missing folder or list, or impossible numbers.
    """

    def __init__(
        self,
        data_root: str = "./dataset",
        dataset_json: str = "./dataset.json",
        aggregation_epochs: int = 1,
        lr: float = 1e-2,
        fedproxloss_mu: float = 0.0,
        analytic_sender_id: str = "analytic_sender",
        batch_size: int = 64,
        num_workers: int = 0,
        train_set: str = "training",
        valid_set: str = "validation",
        test_set: str = "testing",
        model_name: str = "resnet18",
        num_class: int = 2,
        cache_rate: float = 1.0,
        seed: int = 0,
        image_size: int = 224,
        optimizer: str = "sgd",
        model: str | None = None,
        loss: str | None = None,
        data: str | None = None,
    ) -> None:
        super().__init__()
        self.data_root = data_root
        self.dataset_json = dataset_json
        self.aggregation_epochs = aggregation_epochs
        self.lr = lr
        self.fedproxloss_mu = fedproxloss_mu
        self.analytic_sender_id = analytic_sender_id
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_set = train_set
        self.valid_set = valid_set
        self.test_set = test_set
        self.model_name = model_name
        self.num_class = num_class
        self.cache_rate = cache_rate
        self.seed = seed
        self.image_size = image_size
        self.optimizer = optimizer
        self.model = model
        self.loss = loss
        self.data = data
        self._settings = SiteSettings(
            data_root, dataset_json, model_name, num_class, image_size, batch_size,
            aggregation_epochs, lr, fedproxloss_mu, num_workers, train_set, valid_set, test_set,
            cache_rate, seed, optimizer, model, loss, data,
        )  # fmt: skip
        self.site: SiteTraining | None = None
        self.global_weights: dict[str, np.ndarray] | None = None
        self.current_round: int | None = None
        self.writer: Any = None
        self._best_score = -math.inf
        self._app_root = ""

    def initialize(self, parts: dict[str, Any], fl_ctx: FLContext) -> None:
        """Load the lists and build the network, once per run."""
        self._app_root = fl_ctx.get_prop(FLContextKey.APP_ROOT)
        self.writer = parts.get(self.analytic_sender_id)
        torch.backends.cudnn.deterministic = True
        self.site = site = SiteTraining(self._settings)
        self.log_info(
            fl_ctx,
            f"{len(site.train_images)} training, {len(site.valid_images)} validation and "
            f"{len(site.test_images)} test images; {site.model_name} on {site.device}",
        )

    def train(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """One round of local training: the weight difference."""
        site = self._ready()
        self.current_round = int(shareable.get_header(AppConstants.CURRENT_ROUND))
        weights = from_shareable(shareable).data
        try:
            change = site.train(weights, self.current_round, lambda: abort_signal.triggered)
            valid = site.evaluate(site.valid_images, lambda: abort_signal.triggered)
        except TrainingStopped:
            return make_reply(ReturnCode.TASK_ABORTED)
        except TrainingDiverged as error:
            return self._diverged(site, error, fl_ctx)
        self.global_weights = {name: np.array(weights[name]) for name in change}
        self._keep(site, valid)
        self._scalar("val_acc_local_model", valid.score)
        self.log_info(fl_ctx, f"round {self.current_round}: local model on validation: {valid}")
        dxo = DXO(DataKind.WEIGHT_DIFF, data=change)
        steps = site.steps_per_epoch * self.aggregation_epochs
        dxo.set_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, steps)
        dxo.set_meta_prop(AppConstants.CURRENT_ROUND, self.current_round)
        return dxo.to_shareable()

    def _diverged(self, site: SiteTraining, error: Exception, fl_ctx: FLContext) -> Shareable:
        """Nothing to send: a zero difference, so that the federation goes on."""
        self.log_warning(fl_ctx, f"round {self.current_round}: {error}", fire_event=False)
        meta = {**diverged_meta(str(error)), AppConstants.CURRENT_ROUND: self.current_round}
        return DXO(DataKind.WEIGHT_DIFF, data=site.no_change(), meta=meta).to_shareable()

    def local_update(self, change: dict[str, np.ndarray], bn_momentum: float) -> LocalUpdate:
        """What an attacker who knows this site's settings knows of the round's update.

        Args:
            change: The update that is about to leave the site, by variable.
            bn_momentum: Of the network's BatchNorm layers.

        Raises:
            InputError: No round was trained yet.
        """
        if self.global_weights is None or self.current_round is None:
            raise InputError("the learner has no global weights yet")
        site = self._ready()
        return site.local_update(change, self.global_weights, self.current_round, bn_momentum)

    def public_images(self) -> torch.Tensor:
        """Images that an attacker may know; P x C x ..., in [0, 1] where they have bounds."""
        return self._ready().public_images()

    def get_lr(self) -> list[float]:
        """Learning rate of the round, one per parameter group."""
        return [self._ready().learning_rate(self.current_round or 0)]

    def get_model_for_validation(self, model_name: str, fl_ctx: FLContext) -> Shareable:
        """The best local model, for cross-site validation.

        A site whose updates were withheld does not send its weights this way either.
        """
        if model_name != ModelName.BEST_MODEL:
            raise InputError(f"there is no local model {model_name!r}")
        if fl_ctx.get_prop(WITHHELD):
            self.log_warning(fl_ctx, "an update was withheld: the local model is not sent either")
            return make_reply(ReturnCode.EMPTY_RESULT)
        weights = load_checkpoint(f"{self._app_root}/best_local_model.pt")["model_weights"]
        data = {name: value.numpy() for name, value in weights.items()}
        return DXO(DataKind.WEIGHTS, data=data).to_shareable()

    def validate(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Scores of a model of the federation on this site's images."""
        site = self._ready()
        kind = shareable.get_header(AppConstants.VALIDATE_TYPE)
        owner = shareable.get_header(AppConstants.MODEL_OWNER) or "global model"
        site.load(from_shareable(shareable).data)
        try:
            if kind == ValidateType.BEFORE_TRAIN_VALIDATE:
                valid = site.evaluate(site.valid_images, lambda: abort_signal.triggered)
                self.log_info(fl_ctx, f"{owner} on validation: {valid}")
                metrics: dict[str, Any] = {MetaKey.INITIAL_METRICS: valid.score}
            elif kind == ValidateType.MODEL_VALIDATE:
                metrics = self._all_scores(site, abort_signal)
                self.log_info(fl_ctx, f"{owner}: {metrics}")
            else:
                return make_reply(ReturnCode.VALIDATE_TYPE_UNKNOWN)
        except TrainingStopped:
            return make_reply(ReturnCode.TASK_ABORTED)
        return DXO(DataKind.METRICS, data=metrics).to_shareable()

    def _all_scores(self, site: SiteTraining, abort_signal: Signal) -> dict[str, Any]:
        sections = {"train": site.train_images, "val": site.valid_images, "test": site.test_images}
        found = {
            name: site.evaluate(images, lambda: abort_signal.triggered)
            for name, images in sections.items()
            if len(images)
        }
        accuracy = {f"{name}_{score.name}": score.score for name, score in found.items()}
        return {**accuracy, **{f"{name}_auc": score.auc for name, score in found.items()}}

    def _keep(self, site: SiteTraining, valid: Scores) -> None:
        """Keep the local model, and the best one of all rounds."""
        state = {name: v.detach().cpu().clone() for name, v in site.model.state_dict().items()}
        content = {"model_weights": state, "round": self.current_round}
        save_checkpoint(content, f"{self._app_root}/local_model.pt")
        if not valid.score <= self._best_score:
            self._best_score = valid.score
            save_checkpoint(content, f"{self._app_root}/best_local_model.pt")

    def _scalar(self, name: str, value: float) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, self.current_round)

    def _ready(self) -> SiteTraining:
        if self.site is None:
            raise InputError("the learner is not initialised")
        return self.site
