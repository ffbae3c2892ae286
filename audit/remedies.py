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
- noise: Gaussian, in units of the 95th percentile of the update's magnitudes
  (`percentile-noise`), which is the `sigma0` of NVFlare's filter `GaussianPrivacy`.
- batch-size: larger batches and so fewer local steps over the same images; needs training.
- dp-sgd: every image's gradient clipped and noised in training, with its epsilon.

Every strength is also given as a site sets it, in words with units (`RemedySection.setting`). Where
the time is over before a kind has come to its end, the next of its strengths is named as untried.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from audit.decision import Verdict
from audit.record import RemedySection, UntriedSection
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
        setting: The strength as a site sets it, in words with units.
        update: What an attack sees.
        cosine: Of it and the undefended update.
        epsilon: Of DP-SGD.
    """

    kind: str
    strength: float
    setting: str
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
    longest: float = 0.0,
) -> Iterator[RemedySection | UntriedSection]:
    """Measure an update under defenses, each result as soon as it is there.

    Where the budget ends the search, the next strength of every kind that has not come to its end
    comes last, as untried.

    Args:
        target: The update as an attack sees it, without these defenses.
        measure: The attack and the test that decides.
        remake: Trains on the same images in another way, see `remaking`; None: what needs it
            is left out.
        budget: Seconds; no measurement begins that would take longer than is left, judged by
            the longest so far.
        seed: Of noise.
        done: Results of an interrupted search, which are not measured again and not given.
        longest: Seconds that a measurement takes, as far as known before.
    """
    began = time.perf_counter()
    known = {(result.defense, result.strength): result for result in done}
    waiting = [_Kind(kind, known) for kind in _kinds(target, remake, seed)]
    while waiting := [kind for kind in waiting if kind.next is not None]:
        kind = max(waiting, key=lambda each: each.next.cosine if each.next else -1.0)
        if kind.next is None or time.perf_counter() - began + longest > budget:
            left = [each.next for each in waiting if each.next is not None]
            yield from (UntriedSection(remedy.kind, remedy.setting) for remedy in left)
            return
        result = _measured(kind.next, measure)
        longest = max(longest, result.seconds)
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
    began = time.perf_counter()
    p_value, verdict = measure(remedy.update)
    return RemedySection(
        defense=remedy.kind,
        strength=remedy.strength,
        setting=remedy.setting,
        p_value=p_value,
        verdict=verdict,
        cosine=remedy.cosine,
        epsilon=remedy.epsilon,
        enough=verdict != Verdict.LEAKS.value,
        seconds=time.perf_counter() - began,
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
    kind: str,
    strength: float,
    setting: str,
    target: Target,
    defense: Defense,
    seed: int,
    *,
    statistics: bool,
) -> Remedy:
    view = ClientView(target.build_model(), torch.empty(0), torch.empty(0), generator(seed))
    gradient = defense.apply(target.gradient, view)
    update = dataclasses.replace(
        target if statistics else _kept_statistics(target),
        gradient=gradient,
        defenses=(*target.defenses, defense.word),
    )
    return Remedy(kind, strength, setting, update, update_cosine(gradient, target.gradient))


def _scale(target: Target) -> float:
    """What is sent is the difference of weights: so many times the gradient of the target."""
    return target.local.lr * target.local.updates


def _kept_statistics(target: Target) -> Target:
    return dataclasses.replace(target, running_after=None, bn_statistics=None)


def _without_statistics(target: Target) -> Iterator[Remedy]:
    if target.running_after is not None or target.bn_statistics is not None:
        words = "BatchNorm's running means and variances stay at the site"
        yield Remedy(STATISTICS, 1.0, words, _kept_statistics(target), 1.0)


def _clipped(target: Target, seed: int) -> Iterator[Remedy]:
    whole = float(global_norm(target.gradient))
    norm, scale = _CLIPPED_TO * whole, _scale(target)
    if norm > 0:
        words = f"L2 norm of the update at most {norm * scale:.3g} (it is {whole * scale:.3g})"
        yield _defended(CLIP, norm * scale, words, target, Clip(norm), seed, statistics=True)


def _fewer_layers(target: Target, seed: int) -> Iterator[Remedy]:
    """Half of the layers, a quarter, ..., the last one."""
    modules = target.model.skeleton().named_modules()
    layers = [name for name, m in modules if list(m.parameters(recurse=False))]
    kept = len(layers) // 2
    while kept:
        words = (
            f"the last {kept} of {len(layers)} layers with parameters ({_names(layers[-kept:])})"
        )
        remedy = _defended(
            SHARED_LAYERS, float(kept), words, target, Freeze(str(kept)), seed, statistics=False
        )
        if 0 < len(remedy.update.gradient) < len(target.gradient):
            yield remedy
        kept //= 2


def _names(layers: Sequence[str]) -> str:
    """Of one layer or two; of more, where they begin."""
    return " and ".join(layers) if len(layers) < 3 else f"from {layers[0]} on"


def _noisy(target: Target, seed: int) -> Iterator[Remedy]:
    for level in NOISE_LEVELS:
        defense = Percentile(level)
        deviation = defense.noise_std(target.gradient) * _scale(target)
        words = (
            f"standard deviation {deviation:.3g} on every number of the update ({level:g} x its "
            f"95th percentile: sigma0 {level:g})"
        )
        yield _defended(NOISE, level, words, target, defense, seed, statistics=True)


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
    size = own = max(n_selected(step) for (step,) in images_of_steps(n, local))
    while size < n:
        size = min(n, 2 * size)
        other = dataclasses.replace(
            local, batches=math.ceil(n / size), order=None, rates=None, accumulate=1
        )
        update = remake(other, None)
        cosine = update_cosine(update.gradient, target.gradient)
        words = f"{size} images in a local step (now {own})"
        yield Remedy(BATCH_SIZE, float(size), words, update, cosine)


def _private(target: Target, remake: Remake) -> Iterator[Remedy]:
    """DP-SGD in the site's own steps; none where layers or the loss mix the images."""
    for multiplier in NOISE_MULTIPLIERS:
        privacy = PrivacySettings(noise_multiplier=multiplier)
        try:
            update = remake(target.local, privacy)
        except InputError:
            return
        cosine = update_cosine(update.gradient, target.gradient)
        epsilon = epsilon_of(target, privacy)
        words = (
            f"noise multiplier {multiplier:g}, clipping norm {privacy.max_norm:g} per image: "
            f"epsilon {epsilon:.3g} at delta {privacy.delta:g} for this update"
        )
        yield Remedy(DP_SGD, multiplier, words, update, cosine, epsilon)


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
