"""What to do: the same update under defenses that a site can switch on, measured again.

Each kind of defense is tried from its weakest strength up to the first after which nothing is
found; of all kinds the one that costs the update the least comes next. An update under a defense
names it (`Target.defenses`), for attacks that adapt to what they know. "Nothing is found" is one
test of one attack: a leak that is found half of the time is missed half of the time under no
defense at all, so the p-value stands beside it, and a strength above the smallest is the safer one.

- running-statistics: BatchNorm's running statistics stay at the site.
- clip: the update is scaled down to a norm. An attack on its direction does not notice, at any
  norm, and one strength says so.
- shared-layers: only the last layers are shared, and no running statistics.
- noise: Gaussian, in units of the 95th percentile of the update's magnitudes (`percentile-noise`).
- batch-size: larger batches and so fewer local steps over the same images; needs training.
- dp-sgd: every image's gradient clipped and noised in training, with its epsilon.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from audit.decision import Verdict
from audit.record import RemedySection
from core.errors import InputError
from core.local_training import LocalTraining
from core.target import Target, Truth
from gradients.client import ClientSettings, generator, share_update, update_cosine
from gradients.defenses import ClientView, Clip, Defense, Freeze, Percentile
from gradients.defenses.clip import global_norm
from gradients.local_update import images_of_steps, n_selected
from gradients.private_gradient import PrivacySettings, gaussian_epsilon

# p-value and verdict of an update.
Measure = Callable[[Target], tuple[float, str]]
# The update of the same images under another local training, private or not.
Remake = Callable[[LocalTraining, PrivacySettings | None], Target]

NOISE, CLIP, SHARED_LAYERS = "noise", "clip", "shared-layers"
STATISTICS, BATCH_SIZE, DP_SGD = "running-statistics", "batch-size", "dp-sgd"
NOISE_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
NOISE_MULTIPLIERS = (0.03, 0.1, 0.3, 1.0, 3.0)
_CLIPPED_TO = 0.1


@dataclass(frozen=True, eq=False)
class Remedy:
    """An update under one defense at one strength.

    Attributes:
        kind: Of the defense.
        strength: See `RemedySection`.
        update: What an attack sees.
        cosine: Of it and the undefended update.
        epsilon: Of DP-SGD.
    """

    kind: str
    strength: float
    update: Target
    cosine: float
    epsilon: float | None = None


def find_remedies(
    target: Target,
    measure: Measure,
    *,
    remake: Remake | None = None,
    budget: float = math.inf,
    seed: int = 0,
    done: Sequence[RemedySection] = (),
) -> Iterator[RemedySection]:
    """Measure an update under defenses, each result as soon as it is there.

    Args:
        target: The update as an attack sees it, without these defenses.
        measure: The attack and the test that decides.
        remake: Trains on the same images in another way, see `remaking`; None: what needs it
            is left out.
        budget: Seconds; no measurement begins that would take longer than is left, judged by
            the longest so far.
        seed: Of noise.
        done: Results of an interrupted search, which are not measured again and not given.
    """
    began, longest = time.perf_counter(), 0.0
    known = {(result.defense, result.strength): result for result in done}
    waiting = [_Kind(kind, known) for kind in _kinds(target, remake, seed)]
    while waiting := [kind for kind in waiting if kind.next is not None]:
        kind = max(waiting, key=lambda each: each.next.cosine if each.next else -1.0)
        started = time.perf_counter()
        if kind.next is None or started - began + longest > budget:
            return
        result = _measured(kind.next, measure)
        longest = max(longest, time.perf_counter() - started)
        kind.advance(result)
        yield result


class _Kind:
    """The remedies of one kind, and the next of them that is to be measured.

    Args:
        remedies: From the weakest one on.
        known: Results of an interrupted search by kind and strength.
    """

    def __init__(
        self, remedies: Iterator[Remedy], known: dict[tuple[str, float], RemedySection]
    ) -> None:
        self._remedies, self._known = remedies, known
        self.next: Remedy | None = None
        self.advance(None)

    def advance(self, result: RemedySection | None) -> None:
        """Go on to the next strength, unless this one was enough."""
        while not (result and result.enough):
            self.next = next(self._remedies, None)
            if self.next is None:
                return
            result = self._known.get((self.next.kind, self.next.strength))
            if result is None:
                return
        self.next = None


def _measured(remedy: Remedy, measure: Measure) -> RemedySection:
    p_value, verdict = measure(remedy.update)
    return RemedySection(
        defense=remedy.kind,
        strength=remedy.strength,
        p_value=p_value,
        verdict=verdict,
        cosine=remedy.cosine,
        epsilon=remedy.epsilon,
        enough=verdict != Verdict.LEAKS.value,
    )


def _kinds(target: Target, remake: Remake | None, seed: int) -> list[Iterator[Remedy]]:
    kinds = [
        _without_statistics(target),
        _clipped(target, seed),
        _fewer_layers(target, seed),
        _noisy(target, seed),
    ]
    if remake is not None:
        kinds += [_larger_batches(target, remake), _private(target, remake)]
    return kinds


# -- Defenses of the update as it is --------------------------------------------------------


def _defended(
    kind: str, strength: float, target: Target, defense: Defense, seed: int, *, statistics: bool
) -> Remedy:
    view = ClientView(target.build_model(), torch.empty(0), torch.empty(0), generator(seed))
    gradient = defense.apply(target.gradient, view)
    update = dataclasses.replace(
        target if statistics else _kept_statistics(target),
        gradient=gradient,
        defenses=(*target.defenses, defense.word),
    )
    return Remedy(kind, strength, update, update_cosine(gradient, target.gradient))


def _kept_statistics(target: Target) -> Target:
    return dataclasses.replace(target, running_after=None, bn_statistics=None)


def _without_statistics(target: Target) -> Iterator[Remedy]:
    if target.running_after is not None or target.bn_statistics is not None:
        yield Remedy(STATISTICS, 1.0, _kept_statistics(target), 1.0)


def _clipped(target: Target, seed: int) -> Iterator[Remedy]:
    norm = _CLIPPED_TO * float(global_norm(target.gradient))
    # What is sent is the difference of weights, and its norm is what a site sets.
    strength = norm * target.local.lr * target.local.updates
    if norm > 0:
        yield _defended(CLIP, strength, target, Clip(norm), seed, statistics=True)


def _fewer_layers(target: Target, seed: int) -> Iterator[Remedy]:
    """Half of the layers, a quarter, ..., the last one."""
    layers = [m for m in target.model.skeleton().modules() if list(m.parameters(recurse=False))]
    kept = len(layers) // 2
    while kept:
        remedy = _defended(
            SHARED_LAYERS, float(kept), target, Freeze(str(kept)), seed, statistics=False
        )
        if 0 < len(remedy.update.gradient) < len(target.gradient):
            yield remedy
        kept //= 2


def _noisy(target: Target, seed: int) -> Iterator[Remedy]:
    for level in NOISE_LEVELS:
        yield _defended(NOISE, level, target, Percentile(level), seed, statistics=True)


# -- Other trainings --------------------------------------------------------------------------


def remaking(target: Target, members: Truth, seed: int = 0) -> Remake:
    """Trains a client's model on its images in other ways.

    Args:
        target: The client's update.
        members: The images, in the order of the client's, and their targets.
        seed: Of noise and dropout.
    """

    def remake(local: LocalTraining, privacy: PrivacySettings | None) -> Target:
        model = target.build_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in target.gradient)
        settings = ClientSettings(
            local=local, train_mode=target.train_mode, privacy=privacy, seed=seed,
            dropout_seed=seed, share_running=target.running_after is not None, loss=target.loss,
        )  # fmt: skip
        data = members.images, members.labels
        made = share_update(model, target.model, target.data, *data, settings)
        assert made is not None
        # Batch statistics are read from the running ones.
        return made if made.running_after else _kept_statistics(made)

    return remake


def _larger_batches(target: Target, remake: Remake) -> Iterator[Remedy]:
    """Batches of twice as many images, four times, ..., all."""
    n, local = target.batch_size, target.local
    size = max(n_selected(step) for (step,) in images_of_steps(n, local))
    while size < n:
        size = min(n, 2 * size)
        other = dataclasses.replace(
            local, batches=math.ceil(n / size), order=None, rates=None, accumulate=1
        )
        update = remake(other, None)
        cosine = update_cosine(update.gradient, target.gradient)
        yield Remedy(BATCH_SIZE, float(size), update, cosine)


def _private(target: Target, remake: Remake) -> Iterator[Remedy]:
    """DP-SGD in the site's own steps; none where layers or the loss mix the images."""
    for multiplier in NOISE_MULTIPLIERS:
        privacy = PrivacySettings(noise_multiplier=multiplier)
        try:
            update = remake(target.local, privacy)
        except InputError:
            return
        cosine = update_cosine(update.gradient, target.gradient)
        yield Remedy(DP_SGD, multiplier, update, cosine, epsilon_of(target, privacy))


def epsilon_of(target: Target, privacy: PrivacySettings) -> float:
    """Epsilon of one update by DP-SGD.

    An image takes part in one step per epoch, and what the other steps do is the same with any
    image in its place: as many Gaussian mechanisms as there are epochs, exactly. Nothing is
    gained by sampling, for a server knows that every image takes part.
    """
    steps = images_of_steps(target.batch_size, target.local)
    taken = torch.zeros(target.batch_size, dtype=torch.long)
    for (step,) in steps:
        taken[step] += 1
    return gaussian_epsilon(privacy.noise_multiplier, privacy.delta, int(taken.max()))
