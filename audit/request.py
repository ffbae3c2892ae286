"""What an audit is asked, read and checked before any long work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attack.attacks import attack_names
from audit.data import SiteData, chosen
from audit.local import Client, ToldTraining, completed, cosine, told_training
from audit.permutations import n_memberships, non_members_needed
from audit.received import received_model, state_after, target_of, without_masks
from audit.record import ReceivedSection
from audit.show.words import count
from core.client import fitted_targets, outputs_of, with_classes
from core.errors import InputError, nearest
from core.local_training import LocalTraining
from core.losses import Function, Loss, as_loss
from core.models.architecture import Architecture, GivenModel
from core.models.building import counts_batches, load_parameters
from core.models.state_files import State, fit
from core.models.unchanged import unchanged
from core.records import check_types
from core.target import Target, Truth
from gradients.client import has_active_dropout
from gradients.shared_update import SharedUpdate, Source, read_update
from gradients.update_target import gradient_of

AUTO = "auto"
# Cosine of an update and the members' training beyond which the two agree, or are opposed.
_OPPOSED = 0.5
# Sets of images that the members' gradient is compared with: 1 in 20 is best by chance.
_SETS = 19


@dataclass(frozen=True)
class AuditSettings:
    """How an audit is made.

    Attributes:
        attack: "auto", or a name in `attack.attacks`.
        iterations: Of an inversion; None: as many as the budget allows.
        plants: Planted images per setting of the power; None: as many as the budget allows.
        budget: Seconds for the whole audit.
        alpha: At most this share of audits without a leak says "leaks".
        seed: Of every random number.
        device: Device that runs the computation.
        membership: Whether membership and class representatives are measured.
        remedies: Whether the update is measured again under defenses, if it leaks.
        keep_images: Folder that reconstructions are kept in, at the site; None: none are.
        restarts: Of each class representative, at most.
        round_number: Of the federation, which the update is of; for the report alone.
    """

    attack: str = AUTO
    iterations: int | None = None
    plants: int | None = None
    budget: float = 7200.0
    alpha: float = 0.05
    seed: int = 0
    device: str = "cpu"
    membership: bool = True
    remedies: bool = True
    keep_images: Path | None = None
    restarts: int = 4
    round_number: int | None = None

    def __post_init__(self) -> None:
        # A job's file holds what it likes, and True would be one iteration.
        try:
            check_types(self)
        except InputError as error:
            raise InputError(f"settings of the audit: {error}") from None
        if self.attack != AUTO and self.attack not in attack_names():
            raise InputError(
                f"--attack {self.attack}: unknown; the nearest is "
                f"{nearest(self.attack, attack_names())}"
            )
        if not 0 < self.alpha < 1:
            raise InputError(f"--alpha {self.alpha}: must lie between 0 and 1")
        if not 0 < self.budget < float("inf"):
            raise InputError(f"--budget {self.budget}: must be positive and finite")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must be at least 0")
        if self.round_number is not None and self.round_number < 0:
            raise InputError(f"--round {self.round_number}: must not be negative")
        for name in ("iterations", "plants", "restarts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")


@dataclass(frozen=True)
class AuditRequest:
    """An audit that can be made: everything is read, fits together and was checked.

    Attributes:
        update: What lies between the two states.
        client: Simulates updates of the same model as an attacker does, without dropout.
        trains: The model as the site trains it.
        target: The update as an attack sees it.
        data: Members and non-members.
        local: The local training, and how it is known.
        settings: How the audit is made.
        rounds: Global models of the rounds in order, for the trajectory of losses.
        final: The federation's final model, whose membership and classes are measured; None: the
            last of the rounds that are known, see `trajectory`.
        single_site: A model of the site's images alone, after each of its rounds.
        warnings: What limits the audit, one sentence each.
        previous: What the site received a round before; None: that of `rounds` which stands before
            the received one, if both are among them.
        looked: What detectors said of the received model before anything was trained; None: they
            have not looked yet.
    """

    update: SharedUpdate
    client: Client
    trains: Architecture
    target: Target
    data: SiteData
    local: ToldTraining
    settings: AuditSettings
    rounds: tuple[State, ...] = ()
    final: State | None = None
    single_site: tuple[State, ...] = ()
    warnings: tuple[str, ...] = ()
    previous: State | None = None
    looked: ReceivedSection | None = None

    @cached_property
    def before(self) -> nn.Module | None:
        """The model of the round before; None where it is not at hand."""
        state, received = self.previous, self.target.state_dict
        if state is None:
            known = [number for number, each in enumerate(self.rounds) if _same(each, received)]
            state = self.rounds[known[0] - 1] if known and known[0] else None
        if state is None:
            return None
        model = self.client.architecture.build()
        load_parameters(model, state)
        return model

    @cached_property
    def trajectory(self) -> tuple[State, ...]:
        """Global models in order, the final one last, each once.

        That which the site received is one of them; it is the last where nothing else is known.
        """
        received = self.target.state_dict
        known = list(self.rounds)
        if self.final is None and not any(_same(state, received) for state in known):
            known.append(received)
        if self.final is not None and not (known and _same(known[-1], self.final)):
            known.append(self.final)
        return tuple(known)

    @cached_property
    def groups(self) -> np.ndarray:
        """Per image, members first, the class within which membership is permuted."""
        return self.data.groups(self.target.loss)

    @cached_property
    def is_member(self) -> np.ndarray:
        """Per image, members first, whether it is one."""
        n = len(self.data.members.labels)
        return np.arange(n + len(self.data.non_members.labels)) < n

    @cached_property
    def digest(self) -> str:
        """Of everything that decides the audit's numbers."""
        content = hashlib.sha256()
        final = [] if self.final is None else [self.final]
        previous = [] if self.previous is None else [self.previous]
        states = [self.update.before, self.update.change, *self.rounds, *final, *self.single_site]
        states += previous
        for state in states:
            for name, value in state.items():
                content.update(name.encode())
                content.update(_bytes(value))
        for samples in (self.data.members, self.data.non_members):
            content.update(_bytes(samples.images) + _bytes(samples.labels))
        values = {**dataclasses.asdict(self.settings), **self.target.data.to_dict()}
        values |= {"local": self.local.training.to_dict(), "loss": self.target.loss.describe()}
        # Where images are kept, on what they are computed and the round change no number.
        changes_nothing = ("keep_images", "device", "round_number")
        values = {k: v for k, v in values.items() if k not in changes_nothing}
        content.update(json.dumps(values, sort_keys=True).encode())
        return content.hexdigest()


def _same(one: State, other: State) -> bool:
    return all(name in one and torch.equal(one[name], value) for name, value in other.items())


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def make_request(
    global_state: Source,
    local_state: Source,
    *,
    model: nn.Module | Architecture,
    data: SiteData,
    loss: str | Function | Loss | None = None,
    local: LocalTraining | str | None = None,
    settings: AuditSettings | None = None,
    rounds: Sequence[State] = (),
    final: State | None = None,
    single_site: Sequence[State] = (),
    kind: str | None = None,
    previous: State | None = None,
) -> AuditRequest:
    """Read an update and check that it can be audited.

    Args:
        global_state: What the site received, see `gradients.shared_update.read_update`.
        local_state: What it produced: the model, or its difference.
        model: The architecture.
        data: Members and non-members.
        loss: What the site minimises; default: cross-entropy.
        local: What is known of its training, see `audit.local.told_training`.
        settings: How the audit is made.
        rounds: Global models of the rounds.
        final: The federation's final model.
        single_site: A model of the site's images alone, after each of its rounds.
        kind: Whether `local_state` holds "weights" or their "difference"; default: told apart.
        previous: What the site received a round before.

    Raises:
        InputError: One sentence on what cannot be used: states that are swapped, the same or of
            different models; data that the model does not take; too few non-members.
    """
    settings, chosen_loss = settings or AuditSettings(), as_loss(loss)
    told = told_training(local, len(data.members.labels))
    update = read_update(global_state, local_state, kind=kind)
    _check_one_model(update)
    _check_counters(update)
    architecture = (
        GivenModel(model, shape=data.spec.shape) if isinstance(model, nn.Module) else model
    )
    trains = received_model(architecture, update)
    module = without_masks(trains)
    data = fitted_data(module, data, chosen_loss)
    _check_level(data, chosen_loss, settings.alpha)
    client = Client(GivenModel(module), data.spec, chosen_loss, settings.seed)
    _check_order(update, client, data, told)
    local_told = completed(told, update, client, data.members)
    target = target_of(
        update, GivenModel(module), data.spec, chosen_loss, local_told.training,
        len(data.members.labels),
    )  # fmt: skip
    request = AuditRequest(
        update, client, GivenModel(trains), target, data, local_told, settings,
        rounds=tuple(named_state("--rounds", state, module) for state in rounds),
        final=None if final is None else named_state("--final", final, module),
        single_site=tuple(named_state("--single-site", state, module) for state in single_site),
        previous=None if previous is None else named_state("--previous", previous, module),
    )  # fmt: skip
    return dataclasses.replace(request, warnings=tuple(_warnings(request)))


# --- Two states -----------------------------------------------------------------------


def _check_one_model(update: SharedUpdate) -> None:
    known = [name for name in update.before if not counts_batches(name)]
    unknown = [name for name in update.unknown if not counts_batches(name)]
    if unknown:
        raise InputError(
            f"--global and --local are of different models: {unknown[0]} of --local is not in "
            f"--global, whose nearest is {nearest(unknown[0], known)}"
        )
    if not update.norm:
        raise InputError("--global and --local are the same: nothing was trained between them")


def _check_counters(update: SharedUpdate) -> None:
    """Batches are only ever counted up."""
    falls = [n for n, v in update.change.items() if counts_batches(n) and float(v.min()) < 0]
    if falls:
        raise InputError(
            f"--global and --local look swapped: {falls[0]} falls from --global to --local"
        )


def _check_order(update: SharedUpdate, client: Client, data: SiteData, told: ToldTraining) -> None:
    """Refuse two states of which the first is the one that was trained.

    It is so where the members' loss grows, a training of the members from the first state leads
    elsewhere than to the second, and one from the second leads to the first. A training that
    overshoots also climbs, but along its own steps.
    """
    before, after = client.architecture.build(), client.architecture.build()
    load_parameters(after, state_after(update, before))
    if _loss(after, data, client.loss) <= _loss(before, data, client.loss):
        return
    change = gradient_of(update, before, LocalTraining(lr=1.0))
    back = dataclasses.replace(client, architecture=GivenModel(after))
    forward = cosine(client.update_of(data.members, told.training), change)
    backward = -cosine(back.update_of(data.members, told.training), change)
    if forward < -_OPPOSED and backward > _OPPOSED:
        raise InputError(
            "--global and --local look swapped, or the members were not in this training: from "
            "--global to --local their loss grows, and their training leads the other way "
            f"(cosine {backward:.2f})"
        )


@torch.no_grad()
def _loss(model: nn.Module, data: SiteData, loss: Loss) -> float:
    """The members' mean loss; the model stays as it is."""
    dtype = next(model.parameters()).dtype
    labels = data.members.labels
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    with unchanged(model):
        inputs = data.spec.placed(data.members.images, next(model.parameters()))
        return float(loss(model(data.spec.normalize(inputs)), labels))


def named_state(flag: str, state: State, model: nn.Module) -> State:
    """Another model of the same kind by the model's names."""
    found = fit(state, model)
    if found.missing or found.unexpected or found.other_shape:
        raise InputError(f"{flag}: a model is not of the same kind: {found.sentence()}")
    return {**model.state_dict(), **found.state}


# --- The data --------------------------------------------------------------------------


def fitted_data(model: nn.Module, data: SiteData, loss: Loss) -> SiteData:
    """The data in the channels that the model takes, with the targets that the loss takes."""
    try:
        outputs = outputs_of(model, data.spec, data.members.images)
    except InputError:
        grey = data.as_grey() if data.spec.shape[0] > 1 else None
        if grey is None:
            raise
        data, outputs = grey, outputs_of(model, grey.spec, grey.members.images)
    members, others = (
        Truth(part.images, fitted_targets(loss, outputs, part.labels, len(part.images)))
        for part in (data.members, data.non_members)
    )
    return SiteData(members, others, with_classes(data.spec, loss, outputs))


def _check_level(data: SiteData, loss: Loss, alpha: float) -> None:
    """Refuse sets of images with which no test reaches its level, whatever leaks."""
    groups, n = data.groups(loss), len(data.members.labels)
    is_member = np.arange(len(groups)) < n
    ways = n_memberships(is_member, groups)
    # There are more ways than a floating-point number can be where a site has hundreds of images.
    if ways >= (1 - 1e-12) / alpha:
        return
    counts = {int(c): int(is_member[groups == c].sum()) for c in np.unique(groups)}
    needed = {c: non_members_needed(m, alpha) for c, m in counts.items() if m}
    easiest = min(needed, key=lambda c: (needed[c], c))
    of_class = f" of class {easiest}" if len(counts) > 1 else ""
    raise InputError(
        f"--data: {count(n, 'member')} against {count(len(groups) - n, 'non-member')} of their "
        "classes can give "
        f"p = {1 / ways:.2g} at best; {alpha:.0%} takes {needed[easiest]} non-members{of_class}"
    )


def _warnings(request: AuditRequest) -> Iterator[str]:
    if has_active_dropout(request.trains.build()):
        yield "The masks of dropout are not known: the attack reckons without dropout."
    if not request.update.certain:
        yield f"What was sent is taken for {request.update.looks_like}; the numbers do not tell."
    if request.local.training.order_assumed:
        yield (
            "Which images shared local steps is not told and differs between epochs: the attack "
            "reckons with the same batches in every epoch."
        )
    if request.local.estimated:
        names = ", ".join(request.local.estimated).replace("_", " ")
        yield f"Of the local training {names} was not told and is estimated."
    doubt = _members_in_doubt(request)
    if doubt:
        yield doubt
    twice = _on_both_sides(request.data)
    if twice:
        yield (
            f"{twice} of the members {'is' if twice == 1 else 'are'} also among the non-members: "
            "the test finds less than there is."
        )


def _on_both_sides(data: SiteData) -> int:
    """Members that are, to the bit, among the non-members as well."""
    others = {hash(sample.numpy().tobytes()) for sample in data.non_members.images}
    return sum(hash(sample.numpy().tobytes()) in others for sample in data.members.images)


def _members_in_doubt(request: AuditRequest) -> str:
    """Whether the members' gradient explains the update better than other images' does.

    It is compared with that of random sets of as many images of the same classes out of all,
    which would be as good if the members were any images: 1 in 20 is best by chance.
    """
    update, client, everyone = request.update, request.client, request.data.everyone
    change = gradient_of(update, client.architecture.build(), LocalTraining(lr=1.0))
    own = cosine(client.update_of(request.data.members, LocalTraining()), change)
    others = [
        cosine(client.update_of(chosen(everyone, places), LocalTraining()), change)
        for places in _other_sets(request)
    ]
    if own > max(others):
        return ""
    return (
        f"The members' gradient explains the update no better than other images' does (cosine "
        f"{own:.2f}, others up to {max(others):.2f}): they may not have been in this training."
    )


def _other_sets(request: AuditRequest) -> Iterator[np.ndarray]:
    """Places of random sets of images, as many of each class as there are members of it."""
    rng = np.random.default_rng((request.settings.seed, 17))
    members, groups = request.is_member, request.groups
    found = 0
    while found < _SETS:
        mask = members.copy()
        for group in np.unique(groups):
            mask[groups == group] = rng.permutation(members[groups == group])
        if (mask != members).any():
            found += 1
            yield np.flatnonzero(mask)
