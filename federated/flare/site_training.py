"""A site's part of the federation: local training and validation on its own images.

Nothing here knows of NVFlare; `CXRLearner` and the client script are two ways to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from audit.updates import LocalUpdate
from core.client import fitted_targets, loss_named, outputs_of, own_data
from core.data.data_sets import DataSets
from core.data.list_files import Sample, load_datalist
from core.data.listed_images import ImageListDataset
from core.data.specs import DataSpec
from core.errors import InputError
from core.local_training import LocalTraining
from core.losses import Loss, Outputs, Targets, main_output, share_right
from core.models.architecture import Architecture
from core.models.own_model import own_architecture
from core.named_objects import called
from federated.flare.images import chest_spec
from federated.flare.networks import network_spec
from federated.flare.own_samples import OwnSamples

Weights = Mapping[str, np.ndarray]
Images = ImageListDataset | OwnSamples
# After this many local epochs the learning rate falls to a tenth, as published.
DECAY_EPOCHS, DECAY = 40, 0.1
EVALUATION_BATCH = 64
# What `optimizer` may state.
OF_OPTIMISER = (
    "optimizer",
    "momentum",
    "dampening",
    "nesterov",
    "betas",
    "eps",
    "amsgrad",
    "weight_decay",
    "clip_norm",
    "accumulate",
    "schedule",
    "step_size",
    "gamma",
    "min_lr",
)
MAX_PUBLIC = 200


@dataclass(frozen=True)
class SiteSettings:
    """What determines a site's local training.

    Attributes:
        data_root: Folder that the list's paths start from.
        dataset_json: The site's data list.
        model_name: The network, see `federated.flare.networks`.
        num_class: Number of classes.
        image_size: Side in pixels.
        batch_size: Images per local step; a smaller site takes what it has.
        aggregation_epochs: Passes over the images per round.
        lr: Learning rate of the first rounds.
        fedproxloss_mu: Weight of the proximal term; 0 for none.
        num_workers: Processes that load images; 0 loads in this one.
        train_set: Section of the list to train on.
        valid_set: Section to validate on.
        test_set: Section to test on; may be absent.
        cache_rate: Share of the images kept in memory.
        seed: Seed of the order in which a round visits the images.
        optimizer: The optimiser of a round and its settings but `lr`, such as
            "adamw weight-decay=0.01 clip-norm=1 schedule=cosine accumulate=2", see
            `LocalTraining.parse`. A schedule is of the steps of one round.
        model: The site's own module, `module:function` of the job's custom folder, in place of
            `model_name`.
        loss: Name of a loss in `core.losses`, or `module:function`; cross-entropy if None.
        data: The site's own samples, `module:function`, in place of the list; see
            `core.data.given.GivenData`.
    """

    data_root: str | None
    dataset_json: str | None
    model_name: str = "resnet18"
    num_class: int = 2
    image_size: int = 224
    batch_size: int = 64
    aggregation_epochs: int = 1
    lr: float = 1e-2
    fedproxloss_mu: float = 0.0
    num_workers: int = 0
    train_set: str = "training"
    valid_set: str = "validation"
    test_set: str = "testing"
    cache_rate: float = 1.0
    seed: int = 0
    optimizer: str = "sgd"
    model: str | None = None
    loss: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        for key in ("model", "loss", "data"):
            if not isinstance(getattr(self, key) or "", str):
                raise InputError(f"{key} {getattr(self, key)!r}: must be text")
        if self.data and not self.model:
            raise InputError(f"data {self.data}: your own samples need your own model")
        if not self.data:
            check_list(self.data_root, self.dataset_json)
        for key in ("batch_size", "aggregation_epochs"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} {getattr(self, key)}: must be at least 1")
        if self.lr <= 0 or self.fedproxloss_mu < 0:
            raise InputError("lr must be positive and fedproxloss_mu not below 0")
        _ = self.network, self.objective, self.optimiser

    @property
    def optimiser(self) -> LocalTraining:
        """The optimiser alone; the rest of the local training is that of this record."""
        return optimiser_of(self.optimizer)

    @cached_property
    def network(self) -> Architecture:
        """The network's architecture."""
        own = own_architecture(self.model or None, self.seed, "model")
        return own or network_spec(self.model_name, self.num_class, self.image_size)

    @property
    def objective(self) -> Loss:
        """What the site minimises."""
        return loss_named(self.loss or None, "loss")


def optimiser_of(words: str) -> LocalTraining:
    """The optimiser that `SiteSettings.optimizer` states.

    Raises:
        InputError: The words state something else than the optimiser.
    """
    try:
        stated = LocalTraining.parse(words + _batches_of(words))
    except InputError as error:
        raise InputError(f"optimizer {words!r}: {error}") from None
    # The batches of an epoch are known with the images only.
    own = {name: getattr(stated, name) for name in OF_OPTIMISER}
    usual = LocalTraining(batches=stated.accumulate, **own)
    if stated != usual:
        raise InputError(
            f"optimizer {words!r}: only {', '.join(OF_OPTIMISER)} are its settings; "
            "the others are arguments of their own"
        )
    return stated


def _batches_of(words: str) -> str:
    """An epoch of one step of the optimiser, if batches are accumulated."""
    found = [word.partition("=")[2] for word in words.split() if word.startswith("accumulate=")]
    return f" batches={found[0]}" if found and found[0].strip("0").isdigit() else ""


def check_list(data_root: str | None, dataset_json: str | None) -> None:
    """Refuse a folder or a list that is not there.

    Raises:
        InputError: Names the argument.
    """
    for key, value in {"data_root": data_root, "dataset_json": dataset_json}.items():
        if not isinstance(value, str):
            raise InputError(f"{key} {value!r}: must be a path")
    if not Path(str(data_root)).is_dir():
        raise InputError(f"data_root: there is no folder {data_root}")
    if not Path(str(dataset_json)).is_file():
        raise InputError(f"dataset_json: there is no file {dataset_json}")


@dataclass(frozen=True)
class Scores:
    """How well a network classifies a section.

    Attributes:
        accuracy: Share of images whose class is right; of findings or pixels, of those.
        auc: Area under the ROC curve; None where it is not defined.
        count: Number of images.
        loss: Mean loss, of networks whose outputs are right to a degree only; else None.
    """

    accuracy: float
    auc: float | None
    count: int
    loss: float | None = None

    @property
    def name(self) -> str:
        """What `score` is."""
        return "accuracy" if self.loss is None else "negative_loss"

    @property
    def score(self) -> float:
        """The larger, the better."""
        return self.accuracy if self.loss is None else -self.loss

    def __str__(self) -> str:
        if self.loss is not None:
            return f"loss {self.loss:.4g} ({self.count} samples)"
        auc = "undefined" if self.auc is None else f"{self.auc:.4f}"
        return f"accuracy {self.accuracy:.4f}, AUC {auc} ({self.count} images)"


class TrainingStopped(Exception):  # noqa: N818 -- an outcome, not a fault
    """Local training was told to stop before it was done."""


class TrainingDiverged(Exception):  # noqa: N818 -- an outcome, not a fault
    """Local training ended in weights that are not finite."""


class SiteTraining:
    """A site's network and images.

    Args:
        settings: What the site trains on, and how.
        device: Where to compute; a GPU if there is one.
    """

    def __init__(self, settings: SiteSettings, device: torch.device | None = None) -> None:
        self.settings = settings
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loss = settings.objective
        with torch.random.fork_rng(devices=[]):
            self.model = settings.network.build().to(self.device)

    @cached_property
    def own(self) -> DataSets | None:
        """The site's own samples; None where it has a list of images."""
        text = self.settings.data
        if not text:
            return None
        found = called(text, "data")
        return own_data(found, self.model, self.loss, self.settings.seed, f"data {text}")

    @cached_property
    def data(self) -> DataSpec:
        """Shape and normalisation of the samples."""
        if self.own is not None:
            return self.own.spec
        return chest_spec(self.settings.image_size, self.settings.num_class)

    @cached_property
    def train_images(self) -> Images:
        """The images that an attacker would like to see."""
        if self.own is not None:
            return OwnSamples(self.own.train, self.data)
        dataset = self._section(self.settings.train_set)
        if not len(dataset):
            raise InputError(f"{self.settings.dataset_json}: no {self.settings.train_set} images")
        if self.settings.model or self.settings.loss:
            self._check_fits(dataset)
        return dataset

    def _check_fits(self, dataset: ImageListDataset) -> None:
        """Refuse listed images that an own model or its loss does not take."""
        n = min(2, len(dataset))
        images = torch.stack([dataset.image(index) for index in range(n)])
        outputs = outputs_of(self.model, self.data, images)
        fitted_targets(self.loss, outputs, dataset.labels()[:n], n)

    @cached_property
    def valid_images(self) -> Images:
        """Images to validate on."""
        if self.own is not None:
            return OwnSamples(self.own.val, self.data)
        return self._section(self.settings.valid_set)

    @cached_property
    def test_images(self) -> Images:
        """Images to test on; none if the list has no such section, or there is no list."""
        if self.own is not None:
            return OwnSamples(None, self.data)
        return self._section(self.settings.test_set, optional=True)

    def _section(self, name: str, optional: bool = False) -> ImageListDataset:
        settings = self.settings
        assert settings.data_root is not None
        assert settings.dataset_json is not None
        try:
            samples = load_datalist(settings.dataset_json, name)
        except InputError:
            if not optional:
                raise
            samples = []
        _check_labels(samples, settings)
        return ImageListDataset(
            settings.data_root, samples, settings.image_size, self.data, settings.cache_rate
        )

    def public_images(self) -> torch.Tensor:
        """Images that an attacker may know: those for validation, the same at every site.

        Returns:
            P x C x ..., in [0, 1] where they have bounds.
        """
        return self.valid_images.images()[:MAX_PUBLIC]

    @property
    def model_name(self) -> str:
        """What messages call the network."""
        return self.settings.model or self.settings.model_name

    @property
    def batch_size(self) -> int:
        """Images per local step, at most all of them."""
        return min(self.settings.batch_size, len(self.train_images))

    @property
    def steps_per_epoch(self) -> int:
        """Local steps of one pass."""
        return -(-len(self.train_images) // self.batch_size)

    def local_training(self, round_number: int) -> LocalTraining:
        """A round's steps of the optimiser.

        Raises:
            InputError: The batches that are accumulated do not divide those of an epoch.
        """
        try:
            return dataclasses.replace(
                self.settings.optimiser,
                lr=self.learning_rate(round_number),
                epochs=self.settings.aggregation_epochs,
                batches=self.steps_per_epoch,
            )
        except InputError as error:
            raise InputError(f"optimizer {self.settings.optimizer!r}: {error}") from None

    def learning_rate(self, round_number: int) -> float:
        """Of a whole round: a step schedule over local epochs."""
        epochs = round_number * self.settings.aggregation_epochs
        return self.settings.lr * DECAY ** (epochs // DECAY_EPOCHS)

    def orders(self, round_number: int) -> tuple[tuple[int, ...], ...]:
        """The images in the order that each epoch of a round goes through them."""
        n, epochs = len(self.train_images), self.settings.aggregation_epochs
        rngs = [np.random.default_rng([self.settings.seed, round_number, e]) for e in range(epochs)]
        return tuple(tuple(int(i) for i in rng.permutation(n)) for rng in rngs)

    def load(self, weights: Weights) -> None:
        """Set the network to weights of the federation.

        Raises:
            InputError: Variables are missing or have other shapes: the federation trains
                another network than this site.
        """
        own = self.model.state_dict()
        missing = [name for name in own if name not in weights]
        if missing:
            raise InputError(
                f"the global model lacks {len(missing)} of {len(own)} variables of "
                f"{self.model_name}, such as {missing[0]}"
            )
        for name, value in own.items():
            given = torch.as_tensor(np.asarray(weights[name]))
            if given.numel() != value.numel():
                raise InputError(
                    f"the global model's {name} has shape {tuple(given.shape)}, "
                    f"{self.model_name} has {tuple(value.shape)}"
                )
            own[name] = given.reshape(value.shape).to(value.dtype)
        self.model.load_state_dict(own)

    def weights(self) -> dict[str, np.ndarray]:
        """The network as it is now, buffers included."""
        return {
            name: v.detach().cpu().numpy().copy() for name, v in self.model.state_dict().items()
        }

    def no_change(self) -> dict[str, np.ndarray]:
        """The update of a site that has nothing to send: zeros of every shape."""
        return {name: np.zeros_like(value) for name, value in self.weights().items()}

    def train(
        self, weights: Weights, round_number: int, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, np.ndarray]:
        """Train for one round.

        Args:
            weights: The global model.
            round_number: From 0; decides order and learning rate.
            stopped: Asked before every step.

        Returns:
            Local minus global weights, by name; arrays of the variables' own types.

        Raises:
            TrainingStopped: `stopped` said so.
            TrainingDiverged: There is nothing to send.
            InputError: The network does not fit.
        """
        self.load(weights)
        before = self.weights()
        fixed = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        step = _Step(self.model, self.local_training(round_number))
        self.model.train()
        for order in self.orders(round_number):
            for inputs, labels in self._batches(order):
                if stopped():
                    raise TrainingStopped
                inputs = inputs.to(next(self.model.parameters()))
                step.add(self._loss(inputs, labels, fixed))
        change = {name: np.asarray(v - before[name]) for name, v in self.weights().items()}
        broken = [name for name, value in change.items() if not np.isfinite(value).all()]
        if broken:
            raise TrainingDiverged(f"local training diverged: {broken[0]} is not finite; lower lr")
        return change

    def _loss(
        self, inputs: torch.Tensor, labels: torch.Tensor, fixed: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        outputs = self.model(inputs)
        loss = self.loss(outputs, self._targets(outputs, labels, inputs))
        if self.settings.fedproxloss_mu > 0:
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            drift = torch.stack([(p - fixed[name]).square().sum() for name, p in named]).sum()
            loss = loss + self.settings.fedproxloss_mu / 2 * drift
        return loss

    def _targets(
        self, outputs: Outputs, labels: torch.Tensor, inputs: torch.Tensor
    ) -> torch.Tensor:
        """What the loss compares the outputs with, in the inputs' precision."""
        fitted = self.loss.fitted(outputs, labels)
        return fitted.to(inputs.device, inputs.dtype if fitted.is_floating_point() else None)

    def _batches(self, order: tuple[int, ...]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        size = self.batch_size
        steps = [list(order[i : i + size]) for i in range(0, len(order), size)]
        return DataLoader(
            self.train_images,
            batch_sampler=steps,
            num_workers=self.settings.num_workers,
            collate_fn=_collate,
        )

    @torch.no_grad()
    def evaluate(self, images: Images, stopped: Callable[[], bool] = lambda: False) -> Scores:
        """Classify a section with the network as it is now, or find its loss.

        Raises:
            TrainingStopped: `stopped` said so.
        """
        self.model.eval()
        loader = DataLoader(images, EVALUATION_BATCH, collate_fn=_collate)
        if self.loss.targets is not Targets.CLASSES:
            return self._other_scores(loader, stopped)
        outputs, truths = [torch.zeros(0, self.data.n_classes)], [torch.zeros(0).long()]
        for inputs, labels in loader:
            if stopped():
                raise TrainingStopped
            found = main_output(self.model(inputs.to(self.device)))
            outputs.append(found.softmax(1).cpu())
            truths.append(labels.argmax(1) if labels.dim() > 1 else labels)
        return scores(torch.cat(outputs), torch.cat(truths))

    def _other_scores(
        self, loader: Iterable[tuple[torch.Tensor, torch.Tensor]], stopped: Callable[[], bool]
    ) -> Scores:
        """The share of findings or pixels that are right, or the loss where nothing is right."""
        count, right, total, has_right = 0, 0.0, 0.0, True
        for inputs, labels in loader:
            if stopped():
                raise TrainingStopped
            inputs = inputs.to(self.device)
            outputs = self.model(inputs)
            targets = self._targets(outputs, labels, inputs)
            shares = share_right(self.loss, outputs, targets)
            has_right = shares is not None
            right += 0.0 if shares is None else float(shares.sum())
            total += float(self.loss(outputs, targets)) * len(inputs)
            count += len(inputs)
        if has_right:
            return Scores(right / count if count else float("nan"), None, count)
        return Scores(float("nan"), None, count, total / count)

    def local_update(
        self, change: Weights, weights: Weights, round_number: int, bn_momentum: float = 0.1
    ) -> LocalUpdate:
        """What an attacker who knows this site's settings knows of an update.

        Args:
            change: What leaves the site, noise included.
            weights: The global model before.
            round_number: Round of the update.
            bn_momentum: Of the network's BatchNorm layers.
        """
        return LocalUpdate(
            model=self.settings.network,
            data=self.data,
            global_weights=_tensors(weights, self.model),
            weight_diff=_tensors(change, None),
            batch_size=self.batch_size,
            n_images=len(self.train_images),
            local_epochs=self.settings.aggregation_epochs,
            learning_rate=self.learning_rate(round_number),
            proximal=self.settings.fedproxloss_mu,
            bn_momentum=bn_momentum,
            batch_order=self.orders(round_number),
            optimiser=self.settings.optimiser,
            loss=self.loss,
            colour=self.own is not None,
        )


class _Step:
    """The steps of `torch.optim`'s optimiser, each of some batches.

    Args:
        model: Its parameters are changed.
        local: The optimiser, its schedule, clipping, and the batches of a step.
    """

    def __init__(self, model: nn.Module, local: LocalTraining) -> None:
        self._parameters, self._local = list(model.parameters()), local
        self._optimizer = local.torch_optimizer(self._parameters)
        self._rates = iter(local.learning_rates())
        self._batches = 0

    def add(self, loss: torch.Tensor) -> None:
        """Take a batch's loss into account, and step if the batches of a step are complete."""
        if self._batches == 0:
            self._optimizer.zero_grad()
        (loss / self._local.accumulate).backward()
        self._batches += 1
        if self._batches == self._local.accumulate:
            self._batches = 0
            self._step()

    def _step(self) -> None:
        if self._local.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._local.clip_norm)
        rate = next(self._rates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


def _collate(
    batch: list[tuple[torch.Tensor, int | torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.stack([image for image, _ in batch])
    return images, torch.stack([torch.as_tensor(label) for _, label in batch])


def scores(probabilities: torch.Tensor, labels: torch.Tensor) -> Scores:
    """Accuracy and, with two classes that both occur, the area under the ROC curve.

    Args:
        probabilities: N x n_classes; a row that is not finite, of a network that diverged,
            is a wrong answer, and there is no curve.
        labels: N class indices.
    """
    n = len(labels)
    finite = probabilities.isfinite().all(1)
    right = (probabilities.argmax(1) == labels) & finite
    accuracy = float(right.float().mean()) if n else float("nan")
    positive = labels == 1
    if probabilities.shape[1] != 2 or not 0 < int(positive.sum()) < n or not finite.all():
        return Scores(accuracy, None, n)
    ahead = probabilities[positive, 1][:, None] - probabilities[~positive, 1][None]
    return Scores(accuracy, float((ahead.sign() + 1).mean() / 2), n)


def _tensors(values: Weights, model: nn.Module | None) -> dict[str, torch.Tensor]:
    """Arrays as tensors; with a model, of its variables' shapes and types."""
    found = {name: torch.as_tensor(np.asarray(value)) for name, value in values.items()}
    if model is None:
        return found
    own = model.state_dict()
    return {name: found[name].reshape(v.shape).to(v.dtype) for name, v in own.items()}


def _check_labels(samples: list[Sample], settings: SiteSettings) -> None:
    for sample in samples:
        if sample.label >= settings.num_class:
            raise InputError(
                f"{settings.dataset_json}: {sample.image} has the label {sample.label}, "
                f"num_class is {settings.num_class}"
            )
