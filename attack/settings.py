"""The hyper-parameters of an inversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

import torch

from attack.loop.schedules import SCHEDULES
from attack.matching.acceleration import PRECISIONS, Acceleration
from attack.matching.matcher import HVP_MODES
from attack.matching.objectives import OBJECTIVES, layer_weights
from attack.priors.coordinates import make_coordinates
from attack.priors.regularizers import TOTAL_VARIATIONS
from core.errors import InputError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "LBFGS": torch.optim.LBFGS,
}

STARTS = ("normal", "uniform", "zeros", "pattern", "prior")
# Those of which every restart has another.
RANDOM_STARTS = ("normal", "uniform", "pattern")


# Flags that are not spelled like their setting.
FLAG_NAMES = {"gradient_weight": "grads-weight", "tv": "TV", "bn": "BN", "group": "Group"}


def _check_numbers(config: InversionConfig) -> None:
    """Refuse NaN and infinity: they would only show as an attack that finds nothing."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            flag = FLAG_NAMES.get(field.name, field.name.replace("_", "-"))
            raise InputError(f"--{flag} {value}: must be a finite number")
    if config.patch_size < 1:
        raise InputError("--patch-size must be at least 1")


def _check_acceleration(config: InversionConfig) -> None:
    """Refuse choices that exclude each other."""
    if config.double and config.precision != "float32":
        raise InputError(f"--double and --precision {config.precision}: choose one of them")
    if not config.acceleration.traced:
        return
    flag = "--compile" if config.compile else "--cuda-graphs"
    if config.hvp == "exact":
        raise InputError(f"{flag} speeds up the difference of passes; not with --hvp exact")
    if config.restarts_at_once > 1:
        raise InputError(f"{flag} runs one restart per call; not with --restarts-at-once")


@dataclass(frozen=True)
class InversionConfig:
    """Everything that determines an inversion beside the target and the seed.

    Attributes:
        objective: Name in `attack.matching.objectives.OBJECTIVES`.
        layers: Layer weights, see `attack.matching.objectives.layer_weights`; None: all alike.
        iterations: Of the whole attack.
        optimizer: Name in `OPTIMIZERS`.
        betas: Of Adam.
        lr: Largest learning rate.
        lr_min: Where the cosine schedule ends.
        schedule: See `attack.loop.schedules.learning_rate`.
        warmup: Iterations of linear growth of the learning rate.
        signed: Use the sign of the image gradient only.
        soft_sign: Use tanh(s g) / s of it instead, s falling linearly from 1 to 0.
        gradient_weight: Factor of the objective.
        tv: Factor of total variation.
        tv_kind: Name in `attack.priors.regularizers.TOTAL_VARIATIONS`.
        bn: Factor of the BatchNorm penalty (with `balance`: relative length of its step).
        features: Factor of the distance from the deep features that the last layer's
            gradient gives away.
        input_norm: Factor of the input's Euclidean norm.
        colour: Factor of the colour prior.
        patch: Factor of the patch prior; `patch_size` pixels a patch.
        patch_size: Side of a patch.
        group: Factor of the group consistency between restarts.
        group_start: Share of the iterations before it begins.
        group_every: Iterations between two updates of what it draws the restarts to.
        registration: Shift the restarts onto their mean first; Euclidean instead of
            squared distance, as GradInversion.
        balance: Length of the regulariser's step relative to the objective's; None
            adds the weighted gradients as they are. Needs no tuning per model.
        balance_end: What `balance` falls to by the last iteration; None: it stays.
        balance_hold: Objective below which the balance does not fall: where the gradient
            is matched that well beside the prior, many images match it, and the prior
            alone tells them apart. 0: it always falls.
        coordinates: "pixels" or "dct[:exponent]".
        box: Keep the images in the valid range.
        input_noise: Standard deviation, in learning rates, of the noise added to the
            images after each step; none in E2EGI's final stage.
        start: "normal", "uniform", "zeros" (mean colour), "pattern" (a tiled 4 x 4 patch)
            or "prior" (a given image).
        restarts: Number of starts.
        restarts_at_once: Restarts per batched call; 0: by the model's size and memory.
        halving: Drop the worse half of the restarts at 1/8, 1/4 and 1/2 of the iterations; their
            races are shorter then.
        race: Number of starts that compete for the iterations of each restart, which are those
            of all of them together, see `attack.loop.race`; below 2: one start, no race.
        combine: E2EGI's minimum-loss combinatorial optimisation of the restarts.
        combine_every: Iterations between two fusions in its middle stage (T-in).
        stages: Shares of E2EGI's initial, middle and final stage.
        smallest_loss: The result is the iterate of smallest objective, not the last.
        target_tv: Stop once the total variation of the inputs falls below; None: never.
        patience: Stop after so many iterations without improvement; 0: never.
        time_budget: Stop after so many seconds; None: never.
        hvp: How to differentiate, see `attack.matching.matcher.GradientMatcher`.
        polish: Iterations of L-BFGS on the best iterate at the end.
        joint_labels: Optimise label logits together with the images.
        exact_bn: Match the batch statistics of the target instead of running ones.
        bn_from_update: Match what the client's running statistics after its training
            say about its batch, see `attack.priors.shared_statistics`.
        double: Compute in float64.
        adaptive: Take the client's stated defenses into account, see
            `attack.knowledge.known_defenses`.
        compile: Compile the passes of the difference, see `attack.matching.acceleration`.
        cuda_graphs: Capture and replay them (CUDA only).
        precision: Of matrix products: "float32", "tf32" or "bf16".
        channels_last: Memory layout of images and convolutions.
    """

    objective: str = "sim"
    layers: str | None = None
    iterations: int = 15000
    optimizer: str = "Adam"
    betas: tuple[float, float] = (0.9, 0.999)
    lr: float = 0.1
    lr_min: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    signed: bool = True
    soft_sign: bool = False
    gradient_weight: float = 1.0
    tv: float = 0.1
    tv_kind: str = "anisotropic"
    bn: float = 0.0
    features: float = 0.0
    input_norm: float = 0.0
    colour: float = 0.0
    patch: float = 0.0
    patch_size: int = 16
    group: float = 0.0
    group_start: float = 0.0
    group_every: int = 1
    registration: bool = False
    balance: float | None = None
    balance_end: float | None = None
    balance_hold: float = 0.0
    coordinates: str = "pixels"
    box: bool = True
    input_noise: float = 0.0
    start: str = "normal"
    restarts: int = 1
    restarts_at_once: int = 0
    halving: bool = False
    race: int = 0
    combine: bool = False
    combine_every: int = 1000
    stages: tuple[float, float, float] = (0.3, 0.3, 0.4)
    smallest_loss: bool = True
    target_tv: float | None = None
    patience: int = 0
    time_budget: float | None = None
    hvp: str = "auto"
    polish: int = 0
    joint_labels: bool = False
    exact_bn: bool = False
    bn_from_update: bool = False
    double: bool = False
    adaptive: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    precision: str = "float32"
    channels_last: bool = False

    @property
    def acceleration(self) -> Acceleration:
        """What is sped up, and how."""
        return Acceleration(self.compile, self.cuda_graphs, self.precision, self.channels_last)

    def validate(self) -> None:
        """Refuse unknown names and impossible numbers.

        Raises:
            InputError: With the flag to change.
        """
        choices: dict[str, tuple[str, Collection[str]]] = {
            "--gradient-loss-fun": (self.objective, OBJECTIVES),
            "--optim": (self.optimizer, OPTIMIZERS),
            "--tv-kind": (self.tv_kind, TOTAL_VARIATIONS),
            "--lr-schedule": (self.schedule, SCHEDULES),
            "--start": (self.start, STARTS),
            "--hvp": (self.hvp, HVP_MODES),
            "--precision": (self.precision, PRECISIONS),
        }
        for flag, (value, known) in choices.items():
            if value not in known:
                raise InputError(f"{flag} {value}: choose one of {', '.join(known)}")
        make_coordinates(self.coordinates, (1, 1), torch.device("cpu"), torch.float32)
        _check_numbers(self)
        if self.layers is not None:
            try:
                layer_weights(1, self.layers)
            except ValueError as error:
                raise InputError(f"--layers: {error}") from None
        if self.iterations < 1 or self.restarts < 1:
            raise InputError("--epochs and --n-seed must be at least 1")
        if self.lr <= 0:
            raise InputError(f"--lr {self.lr}: must be positive")
        if self.bn_from_update and self.exact_bn:
            raise InputError("--bn-from-update and --exact-bn: choose one of them")
        if self.bn_from_update and self.bn <= 0:
            raise InputError("--bn-from-update needs --BN, the weight of the statistics")
        if self.combine and self.restarts < 2:
            raise InputError("--MinCombine fuses several restarts; give --n-seed 2 or more")
        if self.features and (self.joint_labels or self.balance is not None):
            raise InputError("--features needs known labels and a fixed weight: no --joint-labels")
        if self.signed and self.soft_sign:
            raise InputError("--soft-sign replaces the sign; add --no-signed")
        if self.group_every < 1:
            raise InputError("--group-every must be at least 1")
        _check_acceleration(self)
