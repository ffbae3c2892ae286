"""Is the model that a site received one that was made to leak? Said before anything is trained.

Every detector of `audit.detectors` scores the received model on the site's own images, alone or
against the model of the round before. What a score is worth is told by honest rounds that the
site makes by itself, with its images and its local training; the scores of all detectors are
judged together, so that the rate of false alarms is one for all.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

import torch
from torch import nn

from audit.data import SiteData, chosen
from audit.detectors import Received, detector_names, scores_of
from audit.detectors.calibration import joint_p_value, rounds_needed, threshold
from audit.detectors.honest import Samples, honest_scores
from audit.local import Client, told_training
from audit.record import DetectorSection, ReceivedSection
from audit.request import AuditRequest, AuditSettings, fitted_data, named_state
from audit.show.words import duration
from core.client import in_full_precision
from core.errors import InputError, first_line
from core.local_training import LocalTraining
from core.losses import Function, Loss, as_loss
from core.models.architecture import Architecture, GivenModel
from core.models.building import load_parameters
from core.models.state_files import State

# Of an audit's time.
SHARE = 0.02
# Images that a model is looked at with.
LOOKED_AT = 16


def look_at_request(request: AuditRequest) -> ReceivedSection:
    """What detectors say of the model that an update starts from."""
    client, settings = request.client, request.settings
    return look_at(
        client.architecture.build(), request.before, request.data, client, request.local.training,
        alpha=settings.alpha, budget=settings.budget, seed=settings.seed,
    )  # fmt: skip


def look_before_training(
    received: State,
    *,
    model: Architecture,
    data: SiteData,
    loss: str | Function | Loss | None = None,
    local: LocalTraining | str | None = None,
    previous: State | None = None,
    settings: AuditSettings | None = None,
) -> ReceivedSection:
    """What detectors say of a model that the site has not trained yet.

    Args:
        received: The model's parameters and buffers by name.
        model: Its architecture.
        data: The site's images: those that it will train on, and others.
        loss: What it will minimise; default: cross-entropy.
        local: How it will train, such as "sgd lr=0.1 batch-size=8".
        previous: The model of the round before.
        settings: Level, time and seed.

    Raises:
        InputError: One sentence on what does not fit the model.
    """
    settings, minimised = settings or AuditSettings(), as_loss(loss)
    module = in_full_precision(model.build())
    load_parameters(module, named_state("--global", received, module))
    earlier = None
    if previous is not None:
        earlier = GivenModel(module).build()
        load_parameters(earlier, named_state("--previous", previous, module))
    data = fitted_data(module, data, minimised)
    client = Client(GivenModel(module), data.spec, minimised, settings.seed)
    training = told_training(local, len(data.members.labels)).training
    return look_at(
        module, earlier, data, client, training,
        alpha=settings.alpha, budget=settings.budget, seed=settings.seed,
    )  # fmt: skip


def look_at(
    received: nn.Module,
    before: nn.Module | None,
    data: SiteData,
    client: Client,
    training: LocalTraining,
    *,
    alpha: float,
    budget: float,
    seed: int,
) -> ReceivedSection:
    """What detectors say of a received model.

    Args:
        received: With the parameters that the site received; left as it is.
        before: Of the round before; None where it is not at hand.
        data: The site's images.
        client: What computes an update.
        training: The site's local training.
        alpha: False alarms at most, of all detectors together.
        budget: Seconds of the whole audit.
        seed: Of every random number.
    """
    try:
        return _looked(received, before, data, client, training, alpha, SHARE * budget, seed)
    except InputError as error:
        return _nothing(before is not None, first_line(error))
    except (RuntimeError, ValueError):
        # What somebody else's code says may name files.
        return _nothing(before is not None, "the model or its loss takes no single images")


def _nothing(compared: bool, note: str) -> ReceivedSection:
    return ReceivedSection(compared, 0, None, None, False, (), note)


def _looked(
    received: nn.Module,
    before: nn.Module | None,
    data: SiteData,
    client: Client,
    training: LocalTraining,
    alpha: float,
    seconds: float,
    seed: int,
) -> ReceivedSection:
    samples = _samples(received, data, client)
    earlier = None if before is None else samples.view(before)
    scores = scores_of(Received(samples.view(received), earlier))

    def trained(model: nn.Module, generator: torch.Generator) -> nn.Module:
        return _after_round(model, data, client, training, generator)

    rounds = honest_scores(samples, trained, received, before, seed)
    known, limit = _afforded(rounds, rounds_needed(alpha), seconds)
    if limit:
        return _nothing(before is not None, limit)
    honest = {name: [each[name] for each in known] for name in detector_names()}
    p_value = joint_p_value(scores, honest)
    rules = {name: threshold(values, alpha) for name, values in honest.items()}
    return ReceivedSection(
        compared=before is not None,
        rounds=len(known),
        p_value=p_value,
        false_alarm=math.floor(alpha * (len(known) + 1) + 1e-9) / (len(known) + 1),
        suspicious=p_value <= alpha,
        detectors=tuple(
            DetectorSection(
                detector=name,
                score=scores[name] if math.isfinite(scores[name]) else None,
                threshold=rules[name].value if math.isfinite(rules[name].value) else None,
                alarm=rules[name].alarms(scores[name]),
            )
            for name in scores
        ),
    )


def _samples(received: nn.Module, data: SiteData, client: Client) -> Samples:
    """As many of the site's images as are looked at, members and others alike."""
    everyone = data.everyone
    step = -(-len(everyone.labels) // LOOKED_AT)
    parameter = next(received.parameters())
    inputs = data.spec.normalize(data.spec.placed(everyone.images[::step], parameter))
    targets = everyone.labels[::step]
    targets = targets.to(parameter.dtype) if targets.is_floating_point() else targets
    return Samples(inputs, targets, client.loss)


def _after_round(
    model: nn.Module,
    data: SiteData,
    client: Client,
    training: LocalTraining,
    generator: torch.Generator,
) -> nn.Module:
    """The model after the site's training on as many of its images as it has members."""
    everyone, n = data.everyone, len(data.members.labels)
    drawn = torch.randperm(len(everyone.labels), generator=generator)[:n]
    own = dataclasses.replace(client, architecture=GivenModel(model))
    update = own.update_of(chosen(everyone, drawn.numpy()), training)
    after = own.architecture.build()
    scale = training.lr * training.updates
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if name in update:
                parameter.sub_(scale * update[name].to(parameter))
    return after


def _afforded(
    rounds: Iterator[dict[str, float]], needed: int, seconds: float
) -> tuple[list[dict[str, float]], str]:
    """Honest rounds, as many as there is time for, and why there are none."""
    began = time.perf_counter()
    known = [next(rounds)]
    each = time.perf_counter() - began
    if needed * each > seconds:
        return [], (
            f"honest rounds to compare with would take {duration(needed * each)}, more than this "
            "audit has for it"
        )
    return [*known, *itertools.islice(rounds, needed - 1)], ""
