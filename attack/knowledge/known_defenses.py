"""Attackers who know the defense and work around it.

An evaluation by an attacker who does not know the defense overrates it (Athalye et al.,
Obfuscated Gradients Give a False Sense of Security, ICML 2018,
https://arxiv.org/abs/1802.00420). For every defense of `gradients.defenses`, `adapt` says
what changes once the client's defense is known: how gradients are compared, and how far
the prior is trusted. Only what was shared is read, never the truth.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType

import torch

from attack.matching.clipping import SampleClipping
from attack.matching.objectives import Held, Objective, Tensors, along_rows
from attack.matching.replica import Replica
from attack.settings import InversionConfig
from core.models.building import DEFAULT_POOL_KERNEL
from core.registry import Registry
from core.target import Target

# Share of kept elements from which on the bounds on pruned ones count in full.
FEW_KEPT = 0.1
# Share of the mean squared element below which rounding noise makes no difference.
SIGNAL_FLOOR = 0.3
# Quantization to at most so many levels is treated as noise.
COARSE_LEVELS = 4
# Factor on the learning rate where a large pooling layer makes descents get stuck.
POOLED_RATE = 4.0
# Elements of per-sample gradients that are held at a time, at most.
MAX_HELD = 200_000_000
# How sharply the sign is replaced by a smooth step, relative to a tensor's mean magnitude.
SIGN_SOFTNESS = 0.5


@dataclass
class Adaptation:
    """What an attacker does about the defenses it was told of.

    Attributes:
        config: Hyper-parameters, changed where the defense asks for it.
        weights: Factor of every element (or of the whole tensor) in the comparison, per
            shared parameter; 0 leaves it out.
        through: What the defense does to a candidate's gradient, smoothly; applied before
            comparing.
        sample_norm: Norm to which the client clips the gradient of every image; None
            where it does not, or the candidates need not be clipped alike.
        restored: What was shared before the defense, by parameter name, where the attacker can
            compute it; None: what was shared is matched.
        notes: What was done, one sentence per defense.
    """

    config: InversionConfig
    weights: list[torch.Tensor]
    through: Callable[[Tensors], Tensors] | None = None
    sample_norm: float | None = None
    restored: dict[str, torch.Tensor] | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def none(cls, target: Target, config: InversionConfig) -> Adaptation:
        """Everything is compared as it was shared."""
        ones = [torch.ones((), device=g.device) for g in target.gradient.values()]
        return cls(config, ones)

    def matched(self, target: Target) -> Target:
        """The target with the gradient that candidates are compared with."""
        if self.restored is None:
            return target
        return dataclasses.replace(target, gradient=self.restored)

    def objective(self, inner: Objective) -> Objective:
        """The comparison of gradients that knows the defense.

        Args:
            inner: The objective without any adaptation.
        """
        if self.through is not None:
            inner = Through(inner, self.through)
        if all(w.numel() == 1 and float(w) == 1 for w in self.weights):
            return inner
        return ElementWeighted(inner, self.weights)

    def clipping(self, replica: Replica) -> SampleClipping | None:
        """What per-sample clipping does to a candidate; None where it need not be known."""
        if self.sample_norm is None:
            return None
        return SampleClipping(
            replica.model, replica.names, self.sample_norm, replica.batch_size, replica.client_loss
        )

    def keep_only(self, masks: list[torch.Tensor]) -> None:
        """Compare only where the masks are true."""
        self.weights = [w * m.to(w) for w, m in zip(self.weights, masks, strict=True)]


class ElementWeighted(Objective):
    """Another objective on gradients whose elements are weighted.

    Args:
        objective: The distance that is computed on the weighted gradients.
        weights: Per shared parameter, a factor or a tensor of the parameter's shape.
    """

    def __init__(self, objective: Objective, weights: list[torch.Tensor]) -> None:
        self.objective = objective
        self.weights = weights

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        return self.objective.distance(self._scale(gradient), self._scale(target))

    def value_and_seed(self, gradient: Tensors, target: Tensors) -> tuple[torch.Tensor, Tensors]:
        """The chain rule weights the inner objective's derivative once more."""
        value, seed = self.objective.value_and_seed(self._scale(gradient), self._scale(target))
        return value, self._scale(seed)

    def held(self) -> Held | None:
        """See `Objective.held`: the weights, and what the other objective holds."""
        inner = self.objective.held()
        if inner is None:
            return None
        return Held((ElementWeighted, *inner.kind), [*self.weights, *inner.tensors])

    def values_and_seeds_holding(
        self, gradients: Tensors, targets: Tensors, held: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `Objective.values_and_seeds_holding`; as in `value_and_seed`."""
        weights, rest = held[: len(gradients)], held[len(gradients) :]

        def scale(rows: Tensors) -> Tensors:
            # A factor of a whole tensor is one number per row.
            pairs = zip(weights, rows, strict=True)
            return [t * (w if w.dim() == t.dim() else along_rows(w, t)) for w, t in pairs]

        values, seeds = self.objective.values_and_seeds_holding(
            scale(gradients), scale(targets), rest
        )
        return values, scale(seeds)

    def _scale(self, tensors: Tensors) -> Tensors:
        self.weights = [w.to(t) for w, t in zip(self.weights, tensors, strict=True)]
        return [w * t for w, t in zip(self.weights, tensors, strict=True)]


class Through(Objective):
    """Another objective between the target and what the defense makes of a gradient.

    Args:
        objective: The distance that is computed on the transformed gradients.
        defense: A differentiable stand-in for the defense.
    """

    def __init__(self, objective: Objective, defense: Callable[[Tensors], Tensors]) -> None:
        self.objective = objective
        self.defense = defense

    def distance(self, gradient: Tensors, target: Tensors) -> torch.Tensor:
        """See `Objective.distance`."""
        return self.objective.distance(self.defense(gradient), target)

    def held(self) -> Held | None:
        """See `Objective.held`: what the stand-in holds, where that can be exchanged."""
        inner = self.objective.held()
        if inner is None or inner.tensors:
            return None
        if isinstance(self.defense, HoldsTensors):
            return Held((Through, type(self.defense), *inner.kind), self.defense.tensors())
        if _holds_nothing(self.defense):
            return Held((Through, self.defense, *inner.kind))
        return None

    def values_and_seeds_holding(
        self, gradients: Tensors, targets: Tensors, held: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """See `Objective.values_and_seeds_holding`; each row through its own stand-in."""

        def distance(gradient: Tensors, target: Tensors, own: Tensors) -> torch.Tensor:
            defense = self.defense
            if isinstance(defense, HoldsTensors):
                defense = defense.holding(own)
            return self.objective.distance(defense(gradient), target)

        rows = torch.func.vmap(torch.func.grad_and_value(distance))
        seeds, values = rows(gradients, targets, held)
        return values.double(), list(seeds)


def _holds_nothing(function: Callable[..., object]) -> bool:
    """Whether it is the same for every target: a plain function, which nothing is bound to."""
    if not isinstance(function, FunctionType):
        return False
    bound = (function.__closure__, function.__defaults__, function.__kwdefaults__)
    return all(each is None for each in bound)


class HoldsTensors(abc.ABC):
    """A stand-in for a defense that holds tensors of one target, which can be exchanged.

    Targets whose stand-ins are of one such class can be attacked at once.
    """

    @abc.abstractmethod
    def __call__(self, gradient: Tensors) -> Tensors:
        """What the defense makes of a candidate's gradient."""

    @abc.abstractmethod
    def tensors(self) -> Tensors:
        """What it holds."""

    @abc.abstractmethod
    def holding(self, tensors: Tensors) -> HoldsTensors:
        """The stand-in that holds these in their place."""


Step = Callable[[Adaptation, Target, list[float]], None]
_STEPS = Registry[Step]("the adaptation to")


def register_adaptation(name: str) -> Callable[[Step], Step]:
    """Make the decorated function the answer to the defense of that name.

    It is called with the adaptation so far, the target, and the numbers in the defense's
    word; a plugin that registers a defense may register the answer to it as well.

    Raises:
        ValueError: The name is taken.
    """

    def register(step: Step) -> Step:
        return _STEPS.add(name, step)

    return register


def adapt(target: Target, config: InversionConfig) -> Adaptation:
    """What to change about an attack, given the defenses that the target states.

    Args:
        target: What the client shared.
        config: The attack's hyper-parameters when it knows of no defense.
    """
    adaptation = Adaptation.none(target, config)
    for word in target.defenses:
        name, *values = word.split(":")
        step = _STEPS.get(name)
        if target.n_clients > 1:
            adaptation.notes.append(f"{word}: nothing is known against it in a mean of clients")
        elif step is None:
            adaptation.notes.append(f"{word}: nothing is known against it")
        else:
            step(adaptation, target, _numbers(values))
    if _pool_kernel(target) > DEFAULT_POOL_KERNEL:
        _rank_analysis(adaptation, target)
    return adaptation


def _numbers(values: list[str]) -> list[float]:
    found = []
    for value in values:
        try:
            found.append(float(value))
        except ValueError:
            found.append(math.nan)
    return found


def _tensors(target: Target) -> Tensors:
    return list(target.gradient.values())


# -- Scale ------------------------------------------------------------------------


@register_adaptation("clip")
def _clip(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """The direction survives clipping: compare directions, unless nothing was clipped."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in _tensors(target)))
    if norm < 0.999 * values[0]:
        adaptation.notes.append("clip: the update is shorter than the norm and was not clipped")
    else:
        _scale_free(adaptation, "clip")


def _scale_free(adaptation: Adaptation, defense: str) -> None:
    if adaptation.config.matching.objective == "L2":
        adaptation.config = adaptation.config.changed(objective="sim")
        adaptation.notes.append(f"{defense}: directions are compared instead of differences")
    else:
        adaptation.notes.append(f"{defense}: the objective does not depend on the scale")


# -- Noise ------------------------------------------------------------------------


@register_adaptation("gaussian")
def _gaussian(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    _white_noise(adaptation, target, values[0], "gaussian")


@register_adaptation("laplace")
def _laplace(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    _white_noise(adaptation, target, math.sqrt(2) * values[0], "laplace")


@register_adaptation("percentile-noise")
@register_adaptation("percentile")  # Its name in older files.
def _percentile(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """The noise follows from the shared values, whose percentile it has widened."""
    sigma0, percentile = values
    flat = torch.cat([g.detach().flatten().abs() for g in _tensors(target)]).double().cpu()
    rank = min(flat.numel(), max(1, math.ceil(flat.numel() * percentile / 100)))
    quantile = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(0.5 + percentile / 200)))
    widened = math.sqrt(1 + (quantile * sigma0) ** 2)
    std = sigma0 * float(flat.kthvalue(rank).values) / widened
    _white_noise(adaptation, target, std, "percentile-noise")


@register_adaptation("dp-sgd")
def _dp_sgd(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Clipping per sample and noise on the sum, of which the mean is shared.

    The gradient of the mean loss is another one than the mean of clipped gradients, by 0.08
    to 0.36 in cosine for two images and a trained network. Matching through the clipping
    gained 1.6 dB (batches of two) and 2.0 dB (of four) there without noise, on four batches
    each that it was not tuned on; with noise of 0.003 still 0.8 dB, and where noise drowns
    the signal nothing. With one image there is nothing to tell apart. Weighting the losses
    by the factors of clipping, without their derivative, did not converge.
    """
    _scale_free(adaptation, "dp-sgd")
    held = target.batch_size * sum(g.numel() for g in _tensors(target))
    if not target.local.shares_gradient or held > MAX_HELD:
        adaptation.notes.append("dp-sgd: the images' own gradients are too many to clip alone")
    elif target.batch_size > 1:
        adaptation.sample_norm = values[1]
        adaptation.notes.append("dp-sgd: every image of a candidate is clipped alone as well")
    _white_noise(adaptation, target, values[0] * values[1] / target.batch_size, "dp-sgd")


@register_adaptation("dp-batch")
def _dp_batch(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    _scale_free(adaptation, "dp-batch")
    _white_noise(adaptation, target, values[0] * values[1], "dp-batch")


def _white_noise(adaptation: Adaptation, target: Target, std: float, name: str) -> None:
    """The same noise everywhere asks for the same weight everywhere: nothing is changed.

    Of white noise the likeliest gradient is the nearest one, unweighted. What was tried did
    not help: weighting layers or elements by their signal share cost up to 13 dB, because
    faint layers carry signal that no other layer does. A prior that counts twice as much
    cost 10 dB with a BatchNorm network and 78 % noise, and gained 1 dB with a GroupNorm
    network and 81 to 99 %. Letting the balance rest at the objective that the truth would
    leave made no difference.
    """
    energy = sum(float(g.double().square().sum()) for g in _tensors(target))
    noise = std**2 * sum(g.numel() for g in _tensors(target))
    share = min(1.0, noise / max(energy, 1e-30))
    adaptation.notes.append(
        f"{name}: {share:.1%} of the shared energy is noise of the same size everywhere; all "
        "elements count the same, for neither weights nor a heavier prior help"
    )


# -- Missing elements -------------------------------------------------------------


@register_adaptation("prune")
def _prune(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    _kept(adaptation, target, "prune")


@register_adaptation("topk")
def _topk(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    _kept(adaptation, target, "topk")


def _kept(adaptation: Adaptation, target: Target, name: str) -> None:
    """Compare the kept elements, and of a candidate's others what exceeds the kept ones.

    A pruned element says only that it was smaller than the smallest one kept. Where few are
    kept, these many bounds count less, or they would outweigh the values.
    """
    shared = _tensors(target)
    kept = sum(int((g != 0).sum()) for g in shared) / sum(g.numel() for g in shared)
    whole = float(min(_smallest(g) for g in shared))
    bounds = [whole if name == "topk" else _smallest(g) for g in shared]
    excess = min(1.0, kept / FEW_KEPT)
    adaptation.weights = [
        w * torch.where(g != 0, 1.0, excess)
        for w, g in zip(adaptation.weights, shared, strict=True)
    ]
    adaptation.through = ThroughPruning([g != 0 for g in shared], bounds)
    adaptation.notes.append(f"{name}: the {kept:.1%} kept elements are compared, others bounded")


def _smallest(shared: torch.Tensor) -> float:
    """The smallest magnitude beside zero; infinite where there is none."""
    magnitudes = shared.detach().abs()
    occurring = magnitudes[magnitudes > 0]
    return float(occurring.min()) if occurring.numel() else math.inf


class ThroughPruning(HoldsTensors):
    """What pruning leaves of a gradient: kept elements, and of others the part too large.

    Args:
        kept: Per tensor, which elements were kept.
        bounds: Per tensor, what the others cannot exceed.
    """

    def __init__(self, kept: Tensors, bounds: Sequence[float | torch.Tensor]) -> None:
        self.kept = kept
        self.bounds = bounds

    def __call__(self, gradient: Tensors) -> Tensors:
        """Apply it to a candidate's gradient."""
        self.kept = [k.to(g.device) for k, g in zip(self.kept, gradient, strict=True)]
        return [
            torch.where(kept, g, g.sign() * (g.abs() - bound).clamp_min(0))
            for g, kept, bound in zip(gradient, self.kept, self.bounds, strict=True)
        ]

    def tensors(self) -> Tensors:
        """See `HoldsTensors.tensors`."""
        # In double precision: they are cast to that of the elements they are compared with.
        bounds = [torch.as_tensor(b, dtype=torch.float64) for b in self.bounds]
        return [*self.kept, *(b.to(k.device) for b, k in zip(bounds, self.kept, strict=True))]

    def holding(self, tensors: Tensors) -> ThroughPruning:
        """See `HoldsTensors.holding`."""
        n = len(self.kept)
        return ThroughPruning(tensors[:n], tensors[n:])


@register_adaptation("soteria")
def _soteria(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Leave out the columns of the last layer that were set to zero.

    Source: Balunovic et al., Bayesian Framework for Gradient Leakage, ICLR 2022,
    https://arxiv.org/abs/2111.04706, who leave out the whole layer.
    """
    from core.models.head import head_for

    name, _ = head_for(target.build_model(), target.data)
    masks = [torch.ones((), dtype=torch.bool, device=g.device) for g in _tensors(target)]
    weight = f"{name}.weight" if name else "weight"
    names = list(target.gradient)
    if weight in names:
        shared = target.gradient[weight]
        masks[names.index(weight)] = (shared != 0).any(0).expand_as(shared)
    adaptation.keep_only(masks)
    adaptation.notes.append("soteria: the masked columns of the last layer are left out")


@register_adaptation("freeze")
def _freeze(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    adaptation.notes.append("freeze: what is frozen is not shared, and nothing is compared with it")


# -- Coarse values ----------------------------------------------------------------


@register_adaptation("sign")
def _sign(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Take the candidate's signs as well, smoothly, at each tensor's mean magnitude."""
    adaptation.through = soft_signs
    adaptation.notes.append("sign: a candidate's gradient is reduced to smooth signs as well")


def soft_signs(gradient: Tensors) -> Tensors:
    """Mean magnitude times a smooth sign, tensor by tensor."""
    softened = []
    for g in gradient:
        mean = g.abs().mean().clamp_min(1e-30)
        softened.append(mean * torch.tanh(g / (SIGN_SOFTNESS * mean)))
    return softened


@register_adaptation("quantize")
def _quantize(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Rounding at random is noise of known size, another for every tensor.

    An element of size |g| below a step q has variance q |g| - g^2; on average over a tensor
    of small elements, q times the mean magnitude. Weights for it pay only where rounding
    drowns the signal; with more levels they cost more than they give.
    """
    if values and values[0] > COARSE_LEVELS:
        adaptation.notes.append("quantize: fine enough to be compared as it is")
        return
    shared = _tensors(target)
    signal = sum(float(g.double().square().sum()) for g in shared)
    signal /= sum(g.numel() for g in shared)
    noise = [math.sqrt(_rounding(g) + SIGNAL_FLOOR * signal) for g in shared]
    least = min(noise)
    adaptation.weights = [
        w * (least / max(n, 1e-30)) for w, n in zip(adaptation.weights, noise, strict=True)
    ]
    adaptation.notes.append("quantize: tensors are weighted by the inverse of their rounding noise")


def _rounding(shared: torch.Tensor) -> float:
    """Variance that rounding gave to an element of this tensor, on average."""
    step = _smallest(shared)
    return step * float(shared.abs().mean()) if math.isfinite(step) else math.inf


# -- The model itself -------------------------------------------------------------


def _pool_kernel(target: Target) -> int:
    """Kernel of the model's first pooling layer, as at 224 px, where its description says."""
    return int(target.model.describe().get("pool_kernel") or DEFAULT_POOL_KERNEL)


def _rank_analysis(adaptation: Adaptation, target: Target) -> None:
    """Pooling over more positions: the gradient says less of each, and descents get stuck.

    Nothing is transformed after the gradient, and the pooled model itself is inverted. Where
    images are optimised in scaled cosine coordinates, steps four times as long leave the
    local minima of a plain convolutional network: 26.9 instead of 18.9 dB on two photographs
    that the factor was not chosen on. On synthetic smooth images they gain nothing, on a narrow
    ResNet-18 they lose half a dB below the guesses, and signed steps in pixels do not profit.
    Smooth pooling that sharpens during the attack, several restarts at equal cost and a
    heavier prior did not help.
    """
    pooling = f"pooling over {_pool_kernel(target)} px is part of the model"
    config = adaptation.config
    if config.optimiser.coordinates.startswith("dct") and not config.optimiser.signed:
        adaptation.config = config.changed(lr=POOLED_RATE * config.optimiser.lr)
        pooling += f"; steps are {POOLED_RATE:g} times as long, to leave local minima"
    adaptation.notes.append(pooling)
