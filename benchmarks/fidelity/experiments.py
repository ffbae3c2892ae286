"""What rows run: attacks on images, records and sentences, and label rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from attack.attacks.optimisation import make_attack
from attack.knowledge.labels import label_accuracy, recover_labels, recover_most_exactly
from attack.knowledge.requirements import Knowledge
from attack.metrics import evaluate, evaluate_text
from attack.reconstruction import Reconstruction
from benchmarks.fidelity.beside import Beside
from benchmarks.fidelity.beside_text import BreachingDecepticons
from benchmarks.fidelity.declare import Outcome, Trial
from benchmarks.fidelity.networks import CIFAR10_MEAN, CIFAR10_STD
from benchmarks.fidelity.samples import CIFAR10, IMAGENET, RUNNING, TABLE, TEXT, Images
from core.data.records import load_table
from core.data.specs import IMAGENET_MEAN, IMAGENET_STD, DataSpec
from core.errors import InputError
from core.losses import as_loss
from core.models.architecture import Architecture, GivenModel
from core.models.building import ModelSpec
from core.models.malicious import Imprinted
from core.models.state_files import fit, load_fitting, read_state
from core.processes.distributed import Process
from core.target import LocalTraining, Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.malicious_server import tamper
from gradients.malicious_text import tamper_with_text
from gradinvbench import share

# One value of an attack's setting.
Value = str | int | float | bool | tuple[float, ...] | None
# From a trial's reconstruction and truth to the published quantity.
Measure = Callable[["Case", Reconstruction], Outcome]
# Images of a malicious server's own; sentences, and long texts.
PUBLIC, PUBLIC_SENTENCES, PUBLIC_TEXTS = 2000, 500, 8
# Of the images of label rules, in pixels.
SIDE = 32
# Mean and standard deviation of a kind of images.
NORMALISATIONS = {CIFAR10: (CIFAR10_MEAN, CIFAR10_STD), IMAGENET: (IMAGENET_MEAN, IMAGENET_STD)}


class Case(NamedTuple):
    """What was shared in a trial, and of which images."""

    target: Target
    truth: Truth


def mean_psnr(case: Case, found: Reconstruction) -> Outcome:
    """PSNR in dB, the mean over the batch after one assignment; SSIM beside it.

    Where an attack diverged, grey stands for the pixels that are no numbers.
    """
    images = found.images.where(found.images.isfinite(), 0.5)
    measured = evaluate(images, found.labels, case.truth, metrics=("psnr", "ssim")).summary()
    return Outcome(_mean(measured, "psnr"), {"ssim": _mean(measured, "ssim"), **_objective(found)})


def recovered_exactly(case: Case, found: Reconstruction) -> Outcome:
    """The share of a batch above 60 dB."""
    rows = evaluate(found.images, found.labels, case.truth, metrics=("psnr",)).per_image
    values = [float(row["psnr"]) for row in rows]
    return Outcome(
        sum(value > 60 for value in values) / len(values),
        {"psnr": sum(values) / len(values), **_objective(found)},
    )


def alone_in_a_bin(case: Case, found: Reconstruction) -> Outcome:
    """PSNR of the images that no other shares an imprint block's bin with.

    Which these are follows from the images and the thresholds, not from what was found.
    """
    model = case.target.build_model()
    assert isinstance(model, Imprinted)
    with torch.no_grad():
        bins = (model.imprint[:2](case.target.data.normalize(case.truth.images)) > 0).sum(1)
    alone = (bins[:, None] == bins[None]).sum(1) == 1
    rows = evaluate(found.images, found.labels, case.truth, metrics=("psnr",)).per_image
    values = [float(row["psnr"]) for row, single in zip(rows, alone, strict=True) if single]
    return Outcome(sum(values) / len(values), {"alone": len(values) / len(alone)})


def _mean(summary: Mapping[str, Mapping[str, float | None]], name: str) -> float:
    mean = summary[name]["mean"]
    assert mean is not None
    return mean


def _objective(found: Reconstruction) -> dict[str, float]:
    return {"objective": float(found.objective)}


@dataclass(frozen=True)
class ImageAttack:
    """An attack on a batch of images.

    Attributes:
        attack: Its registered name.
        model: Architecture, for the data set's classes; its `image_size` is the images' side.
        settings: Of the attack, on top of its published ones.
        batch: Images of the client.
        labels: "given", "recovered" by the attack's own rule, or "optimised" with the images.
        local: Words of the client's local training; empty: one step.
        double: Share the gradient in float64.
        measure: The published quantity of a reconstruction.
        kind: Of the images, see `Samples`.
        weights: What the row calls a file of trained weights; empty: random ones.
        same: Beside an attack that runs on the same gradient; None: there is none.
    """

    attack: str
    model: ModelSpec
    settings: Mapping[str, Value] = field(default_factory=dict)
    batch: int = 1
    labels: str = "given"
    local: str = ""
    double: bool = False
    measure: Measure = mean_psnr
    kind: str = CIFAR10
    weights: str = ""
    same: Beside | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Experiment`."""
        return (self.weights,) if self.weights else ()

    @property
    def second(self) -> str:
        """See `Experiment`."""
        return self.same.package if self.same else ""

    def ours(self, trial: Trial) -> Outcome:
        """See `Experiment`."""
        case = self.case(trial)
        return self.measure(case, self.inverted(case, trial))

    def beside(self, trial: Trial) -> Outcome:
        """See `Experiment`."""
        assert self.same is not None
        case = self.case(trial)
        return self.measure(case, self.same(case.target, case.truth.labels, trial))

    def inverted(self, case: Case, trial: Trial) -> Reconstruction:
        """What our attack makes of a case."""
        optimised = {"joint_labels": self.labels == "optimised"} if self.labels != "given" else {}
        attack = make_attack(self.attack, {**self.settings, **optimised}, Knowledge())
        labels = case.truth.labels
        if self.labels == "recovered":
            labels = recover_labels(attack.label_rule, case.target)
        elif self.labels == "optimised":
            labels = torch.zeros_like(labels)
        return attack.reconstruct(
            case.target, labels=labels, device=trial.device, seed=trial.number
        )

    def case(self, trial: Trial) -> Case:
        """The update of the trial's batch."""
        side = self.model.image_size
        batch = trial.samples.images(self.kind, trial.number, self.batch, side)
        torch.manual_seed(trial.number)
        model, architecture = self._model(batch, trial)
        client = ClientSettings(
            local=LocalTraining.parse(self.local, self.batch) if self.local else LocalTraining(),
            train_mode=False,
            seed=trial.number,
        )
        spec = DataSpec(self.kind, (3, side, side), *NORMALISATIONS[self.kind], batch.n_classes)
        if self.double:
            model = model.double()
        process = Process(device=trial.device)
        target = share_update(
            model, architecture, spec, batch.images, batch.labels, client, process
        )
        assert target is not None
        return Case(target, Truth(batch.images, batch.labels))

    def _model(self, batch: Images, trial: Trial) -> tuple[nn.Module, Architecture]:
        """What the server sends, with its parameters, and how an attacker rebuilds it."""
        honest = dataclasses.replace(self.model, n_classes=batch.n_classes, malicious="")
        spec = dataclasses.replace(honest, malicious=self.model.malicious)
        model = honest.build().eval()
        if self.weights:
            load_weights(model, trial.weights, self.weights)
        if not spec.malicious:
            return model, spec
        side = self.model.image_size
        public = trial.samples.public(self.kind, trial.number, self.batch, side, PUBLIC)
        data = DataSpec(self.kind, (3, side, side), *NORMALISATIONS[self.kind], batch.n_classes)
        inputs = data.normalize(public.images)
        return tamper(model, spec, inputs, public.labels, self.batch), spec


def load_weights(model: nn.Module, files: Mapping[str, Path], name: str) -> None:
    """Trained parameters from the user's file.

    Raises:
        InputError: None was given, or it does not fit.
    """
    if name not in files:
        raise InputError(f"--weights {name}=FILE: this row needs trained weights")
    place = f"--weights {name}"
    found = fit(read_state(files[name], place), model)
    kept = load_fitting(model, found, place)
    if kept:
        raise InputError(f"{place}: {files[name]} has no {kept[0]} that fits")


@dataclass(frozen=True)
class Labels:
    """A label rule on random labels of an untrained network.

    Attributes:
        rule: Its registered name.
        network: From the number of classes to a network for 32 px images.
        batch: Images.
        classes: Labels are drawn from so many, each as likely.
        kind: Of the images.
    """

    rule: str
    network: Callable[[int], nn.Module]
    batch: int
    classes: int
    kind: str = CIFAR10
    needs: tuple[str, ...] = ()
    second: str = ""

    def ours(self, trial: Trial) -> Outcome:
        """See `Experiment`: the share of the labels, as a multiset."""
        images = trial.samples.images(self.kind, trial.number, self.batch, SIDE).images
        generator = torch.Generator().manual_seed(trial.number)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        torch.manual_seed(trial.number)
        model = self.network(self.classes).eval()
        target, _ = share(model, images, labels, mean=CIFAR10_MEAN, std=CIFAR10_STD)
        return Outcome(label_accuracy(recover_labels(self.rule, target), labels))


@dataclass(frozen=True)
class TextAttack:
    """An attack on sentences.

    Attributes:
        attack: Its registered name.
        model: Builds the language model.
        batch: Sentences.
        length: Tokens of each.
        metric: See `attack.metrics.text`.
        settings: Of the attack.
        same: Beside an attack that runs on the same gradient.
    """

    attack: str
    model: Callable[[], nn.Module]
    batch: int
    length: int
    metric: str
    settings: Mapping[str, Value] = field(default_factory=dict)
    same: Beside | None = None
    kind: str = TEXT
    needs: tuple[str, ...] = ()

    @property
    def second(self) -> str:
        """See `Experiment`."""
        return self.same.package if self.same else ""

    def ours(self, trial: Trial) -> Outcome:
        """See `Experiment`."""
        case = self.case(trial)
        attack = make_attack(self.attack, self.settings, Knowledge())
        found = attack.reconstruct(
            case.target,
            labels=None,  # type: ignore[arg-type]
            device=trial.device,
            seed=trial.number,
        )
        return self._measured(case, found.images)

    def beside(self, trial: Trial) -> Outcome:
        """See `Experiment`."""
        assert self.same is not None
        case = self.case(trial)
        found = self.same(case.target, case.truth.labels, trial)
        return self._measured(case, found.images.long())

    def case(self, trial: Trial) -> Case:
        """The update of the trial's sentences."""
        ids = trial.samples.sentences(trial.number, self.batch, self.length)
        torch.manual_seed(trial.number)
        model = self.model().eval()
        return Case(*share(model, ids, ids, loss=as_loss("next-token"), seed=trial.number))

    def _measured(self, case: Case, ids: torch.Tensor) -> Outcome:
        summary = evaluate_text(ids, None, case.truth, metrics=(self.metric,)).summary()
        return Outcome(_mean(summary, self.metric))


@dataclass(frozen=True)
class MaliciousTextAttack(TextAttack):
    """An attack on sentences of clients whose model a malicious server made.

    Attributes:
        malicious: What it did, in the words of `--malicious`.
        server: Another implementation of server and attack, from the same parameters and on the
            same sentences.
    """

    malicious: str = ""
    server: BreachingDecepticons | None = None

    @property
    def second(self) -> str:
        """See `Experiment`."""
        return self.server.package if self.server else super().second

    def beside(self, trial: Trial) -> Outcome:
        """See `Experiment`."""
        if self.server is None:
            return super().beside(trial)
        ids, public, model = self._parts(trial)
        found = self.server.attacked(model, ids, public, trial)
        truth = Truth(ids, ids)
        summary = evaluate_text(found.images, None, truth, metrics=(self.metric,)).summary()
        return Outcome(_mean(summary, self.metric))

    def case(self, trial: Trial) -> Case:
        """See `TextAttack.case`."""
        ids, public, honest = self._parts(trial)
        model = tamper_with_text(honest, self.malicious, public)
        sent = GivenModel(model, shape=(self.length,), malicious=self.malicious)
        return Case(*share(sent, ids, ids, loss=as_loss("next-token"), seed=trial.number))

    def _parts(self, trial: Trial) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
        """The client's sentences, the server's own and the honest model."""
        drawn = trial.number, self.batch, self.length
        ids = trial.samples.sentences(*drawn)
        most = PUBLIC_SENTENCES if self.length <= RUNNING else PUBLIC_TEXTS
        public = trial.samples.public_sentences(*drawn, most)
        torch.manual_seed(trial.number)
        return ids, public, self.model().eval()


@dataclass(frozen=True)
class RecordAttack:
    """TabLeak on the records of a table: how many points of accuracy above a guess.

    Attributes:
        attack: Its registered name.
        table: See `core.data.records`.
        network: From features and classes.
        batch: Records.
        settings: Of the attack.
        needs: The file of a table that comes with no package, as `--weights NAME=FILE` gives it.
        same: Beside an attack that runs on the same gradient and labels; None: there is none.
    """

    attack: str
    table: str
    network: Callable[[int, int], nn.Module]
    batch: int
    settings: Mapping[str, Value] = field(default_factory=dict)
    kind: str = TABLE
    needs: tuple[str, ...] = ()
    same: Beside | None = None

    @property
    def second(self) -> str:
        """See `Experiment`."""
        return self.same.package if self.same else ""

    def ours(self, trial: Trial) -> Outcome:
        """See `Experiment`: accuracy less that of guesses from the columns' distributions."""
        case = self.case(trial)
        attack = make_attack(self.attack, dict(self.settings), Knowledge())
        labels = recover_most_exactly(case.target)
        found = attack.reconstruct(
            case.target, labels=labels, device=trial.device, seed=trial.number
        )
        return above_a_guess(case, found)

    def beside(self, trial: Trial) -> Outcome:
        """See `Experiment`."""
        assert self.same is not None
        case = self.case(trial)
        labels = recover_most_exactly(case.target)
        return above_a_guess(case, self.same(case.target, labels, trial))

    def case(self, trial: Trial) -> Case:
        """The update of the trial's records, of an untrained network."""
        file = trial.weights.get(self.needs[0]) if self.needs else None
        if self.needs and file is None:
            raise InputError(f"--weights {self.needs[0]}=FILE: this row needs the file of records")
        train, _ = load_table(self.table, None if file is None else file.parent).split()
        batch = train.batch(self.batch, trial.number, 0)
        torch.manual_seed(trial.number)
        model = self.network(batch.columns.width, len(batch.class_names)).eval()
        return Case(*share(model, batch, seed=trial.number))


def above_a_guess(case: Case, found: Reconstruction) -> Outcome:
    """The share of right cells less that of guesses from the columns' distributions."""
    measured = evaluate(found.images, found.labels, case.truth, metrics=("record_accuracy",))
    accuracy = _mean(measured.summary(), "record_accuracy")
    guess = measured.baselines["marginal guess"]["record_accuracy"]["mean"]
    assert guess is not None
    return Outcome(accuracy - guess, {"accuracy": accuracy, "guess": guess})
