"""The settings of an inversion by topic, each with its flag, its help and its limits.

The parser of stage 3, the checks and the sentences about wrong values are made from these
fields. A setting of one topic is read as `config.priors.tv`; where a configuration is made or
changed, the name alone says enough: `InversionConfig(tv=0.01, restarts=5)`,
`config.changed(iterations=800)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from core.errors import InputError
from core.settings import (
    Declared,
    SettingError,
    Value,
    complaint,
    declared,
    from_flags,
    is_given,
    setting,
)

OBJECTIVES = ("sim", "L2", "L2+L1", "layer-sim", "layer-L2")
TOTAL_VARIATIONS = ("anisotropic", "isotropic", "double-opponents", "norm")
OPTIMIZERS = ("Adam", "AdamW", "SGD", "LBFGS")
SCHEDULES = ("cosine", "cosine-published", "step", "constant")
# What is made of a client's several local steps.
UNROLL, ONE_STEP = "unroll", "one"
LOCAL_STEPS = (UNROLL, ONE_STEP)
STARTS = ("normal", "uniform", "zeros", "pattern", "prior")
# Those of which every restart has another.
RANDOM_STARTS = ("normal", "uniform", "pattern")
HVP_MODES = ("auto", "exact", "difference")
PRECISIONS = ("float32", "tf32", "bf16")
LAYER_WEIGHTS = re.compile(r"linear|exp|decay|(first|last):0*[1-9][0-9]*")


@dataclass(frozen=True)
class Topic:
    """Settings that belong together.

    Attributes:
        title: Of their flags in `--help`.
    """

    title: ClassVar[str]


@dataclass(frozen=True)
class MatchingSettings(Topic):
    """How the gradient of the images is compared with the shared one.

    Attributes:
        objective: The distance of two gradients, see `attack.matching.objectives`.
        layers: Weights of the layers, see `attack.matching.objectives.layer_weights`; None:
            all alike.
        gradient_weight: Factor of the objective.
        hvp: How to differentiate, see `attack.matching.matcher.GradientMatcher`.
        double: Compute in float64.
        joint_labels: Optimise the logits of the labels together with the images.
        local_steps: "unroll" the client's local steps, or match its update as "one" step's
            gradient of the whole batch, as the published attack does.
        known_masks: Draw the client's dropout masks from their seed, where the target holds it;
            otherwise every evaluation draws masks of its own.
        adaptive: Take the client's stated defenses into account, see
            `attack.knowledge.known_defenses`.
    """

    title: ClassVar[str] = "objective"

    objective: str = setting(
        "sim",
        "--gradient-loss-fun",
        choices=OBJECTIVES,
        listed=True,
        help="distance of two gradients",
    )
    layers: str | None = setting(
        None, "--layers", help="linear, exp, decay, first:K or last:K (default: all layers alike)"
    )
    gradient_weight: float = setting(1.0, "--grads-weight", help="weight of the objective")
    hvp: str = setting(
        "auto", "--hvp", choices=HVP_MODES, listed=True, help="how to differentiate the objective"
    )
    double: bool = setting(False, "--double", help="compute in float64")
    joint_labels: bool = setting(False, "--joint-labels", help="optimise the labels as well")
    local_steps: str = setting(
        UNROLL,
        "--local-steps",
        choices=LOCAL_STEPS,
        help="unroll the client's local steps, or match its update as one step's gradient of "
        "the whole batch (as published)",
    )
    known_masks: bool = setting(
        False,
        "--known-masks",
        help="draw the client's dropout masks, whose seed the target holds",
    )
    adaptive: bool = setting(
        False,
        "--adaptive",
        flag_default=None,
        help="take the client's defense into account (default: only with --attack auto)",
    )


@dataclass(frozen=True)
class PriorSettings(Topic):
    """What is known about images, as penalties.

    Attributes:
        tv: Factor of total variation.
        tv_kind: Which one, see `attack.priors.regularizers.TOTAL_VARIATIONS`.
        bn: Factor of the BatchNorm penalty (with `balance`: relative length of its step).
        exact_bn: Match the batch statistics of the target instead of running ones.
        bn_from_update: Match what the client's running statistics after its training
            say about its batch, see `attack.priors.shared_statistics`.
        features: Factor of the distance from the deep features that the last layer's
            gradient gives away.
        input_norm: Factor of the input's Euclidean norm.
        colour: Factor of the colour prior.
        patch: Factor of the patch prior.
        patch_size: Side of a patch in pixels.
        balance: Length of the regulariser's step relative to the objective's; None
            adds the weighted gradients as they are. Needs no tuning per model.
        balance_end: What `balance` falls to by the last iteration; None: it stays.
        balance_hold: Objective below which the balance does not fall: where the gradient
            is matched that well beside the prior, many images match it, and the prior
            alone tells them apart. 0: it always falls.
        keep_contrast: Let the priors not change the contrast of images that BatchNorm
            normalises by themselves (train mode, one image), see `attack.priors.contrast`.
        natural_scale: Scale such images, and those behind GroupNorm, to what photographs have,
            at the end, where the objective does not mind.
    """

    title: ClassVar[str] = "priors"

    tv: float = setting(0.1, "--TV", help="weight of total variation")
    tv_kind: str = setting(
        "anisotropic",
        "--tv-kind",
        choices=TOTAL_VARIATIONS,
        help=", ".join(TOTAL_VARIATIONS),
    )
    bn: float = setting(0.0, "--BN", help="weight of the BatchNorm statistics")
    exact_bn: bool = setting(
        False, "--exact-bn", help="the target's batch statistics, not running ones"
    )
    bn_from_update: bool = setting(
        False,
        "--bn-from-update",
        help="those that the client's running statistics after its training give away",
    )
    features: float = setting(0.0, "--features", help="weight of the last layer's features")
    input_norm: float = setting(0.0, "--input-norm", help="weight of the images' length")
    colour: float = setting(0.0, "--colour", help="weight of the colour prior")
    patch: float = setting(0.0, "--patch", help="weight of the patch prior (ViT)")
    patch_size: int = setting(16, "--patch-size", at_least=1, help="side of a patch in pixels")
    balance: float | None = setting(
        None,
        "--balance",
        help="step along the priors relative to the objective's, instead of fixed weights",
    )
    balance_end: float | None = setting(None, "--balance-end", help="what it falls to")
    balance_hold: float = setting(
        0.0, "--balance-hold", help="it stays while the objective is below"
    )
    keep_contrast: bool = setting(
        False, "--keep-contrast", help="priors do not fade single images in train mode"
    )
    natural_scale: bool = setting(
        False, "--natural-scale", help="where normalisation hides the scale, end at photographs'"
    )


@dataclass(frozen=True)
class OptimiserSettings(Topic):
    """What is optimised, and by which steps.

    Attributes:
        name: One of `OPTIMIZERS`.
        iterations: Number of iterations of the whole attack.
        betas: Of Adam.
        lr: The largest learning rate.
        lr_min: Learning rate at the end of the cosine schedule.
        schedule: See `attack.loop.schedules.learning_rate`. The command without `--attack`
            is the published tool's setting, and has its schedule.
        warmup: Iterations of linear growth of the learning rate.
        signed: Use only the sign of the image gradient.
        soft_sign: Use tanh(s g) / s of it instead, s falling linearly from 1 to 0.
        coordinates: "pixels" or "dct[:exponent]".
        box: Keep the images in the valid range.
        input_noise: Standard deviation, in learning rates, of the noise added to the
            images after each step; none in E2EGI's final stage.
        polish: Iterations of L-BFGS on the best iterate at the end.
    """

    title: ClassVar[str] = "optimisation"

    name: str = setting(
        "Adam", "--optim", choices=OPTIMIZERS, flat_name="optimizer", help=", ".join(OPTIMIZERS)
    )
    iterations: int = setting(15000, "--epochs", at_least=1, help="iterations")
    betas: tuple[float, float] = setting((0.9, 0.999))
    lr: float = setting(0.1, "--lr", above=0, help="largest learning rate")
    lr_min: float = setting(1e-3, "--lr-min", help="end of the cosine schedule")
    schedule: str = setting(
        "cosine",
        "--lr-schedule",
        choices=SCHEDULES,
        flag_default="cosine-published",
        help="cosine, cosine-published (its period is 10 iterations longer), step or constant",
    )
    warmup: int = setting(
        0, "--warmup", metavar="N", help="iterations in which the learning rate grows"
    )
    signed: bool = setting(
        True,
        "--signed",
        flag_default=None,
        help="sign of the image gradient only (default: with sim)",
    )
    soft_sign: bool = setting(
        False, "--soft-sign", help="tanh in place of the sign (with --no-signed)"
    )
    coordinates: str = setting("pixels", "--coordinates", help="pixels, dct or dct:EXPONENT")
    box: bool = setting(True, "--box", help="keep the images in the valid range")
    input_noise: float = setting(
        0.0, "--input-noise", help="noise after each step, in learning rates"
    )
    polish: int = setting(0, "--polish", help="final iterations of L-BFGS")


@dataclass(frozen=True)
class StartSettings(Topic):
    """Where the optimisation starts, and how often.

    Attributes:
        start: "normal", "uniform", "zeros" (mean colour), "pattern" (a tiled 4 x 4 patch)
            or "prior" (a given image).
        restarts: Number of starts.
        halving: Drop the worse half of the restarts at 1/8, 1/4 and 1/2 of the iterations; their
            races are shorter then.
        race: Number of starts that compete for the iterations of each restart, which are those
            of all of them together, see `attack.loop.race`; below 2: one start, no race.
    """

    title: ClassVar[str] = "starts"

    start: str = setting(
        "normal", "--start", choices=STARTS, help="normal, uniform, zeros, pattern, prior"
    )
    restarts: int = setting(1, "--n-seed", at_least=1, help="restarts")
    halving: bool = setting(False, "--halving", help="drop the worse restarts early")
    race: int = setting(
        0, "--race", metavar="N", help="starts that compete for the iterations of each restart"
    )


@dataclass(frozen=True)
class ConsensusSettings(Topic):
    """What several restarts have to do with each other.

    Attributes:
        combine: E2EGI's minimum-loss combinatorial optimisation of the restarts.
        combine_every: Iterations between two fusions in its middle stage (T-in).
        stages: Shares of E2EGI's initial, middle and final stage.
        group: Factor of the group consistency between restarts.
        group_start: Share of the iterations before it begins.
        group_every: Iterations between two updates of what it draws the restarts to.
        registration: Shift the restarts onto their mean first; Euclidean instead of
            squared distance, as GradInversion.
    """

    title: ClassVar[str] = "several restarts (E2EGI)"

    combine: bool = setting(False, "--MinCombine", help="fuse restarts by minimum loss")
    combine_every: int = setting(1000, "--T-in", help="iterations between two fusions")
    stages: tuple[float, float, float] = setting(
        (0.3, 0.3, 0.4),
        "--T-init-rate",
        "--total-T-in-rate",
        "--T-end-rate",
        help="share of the iterations: initial, middle and final stage",
    )
    group: float = setting(0.0, "--Group", help="weight of group consistency")
    group_start: float = setting(
        0.0, "--group-start", metavar="SHARE", help="share of the iterations before it begins"
    )
    group_every: int = setting(
        1, "--group-every", at_least=1, metavar="N", help="iterations between two renewals"
    )
    registration: bool = setting(False, "--registration", help="align restarts (GradInversion)")


@dataclass(frozen=True)
class StoppingSettings(Topic):
    """When the attack ends, and which iterate is its result.

    Attributes:
        smallest_loss: The result is the iterate of smallest objective, not the last.
        target_tv: Stop once the total variation of the inputs falls below; None: never.
        patience: Stop after so many iterations without improvement; 0: never.
        patience_share: The same as a share of all iterations: a tenth (0.1) of them, say; 0:
            never. Iterations after which the learning rate still falls tenfold ("step") or to
            less than a tenth (a cosine) do not count: a plateau at a large rate is no end.
        min_improvement: By which share of itself the smallest objective must fall to count
            as improved.
        time_budget: Stop after so many seconds; None: never.
    """

    title: ClassVar[str] = "stopping"

    smallest_loss: bool = setting(
        True, "--min-grads-loss", flag_default=False, help="keep the smallest loss"
    )
    target_tv: float | None = setting(
        None, "--target-tv", flag_default=0.28, off=0.0, help="stop below (0: never)"
    )
    patience: int = setting(
        0, "--patience", metavar="N", help="stop after N iterations without improvement (0: never)"
    )
    patience_share: float = setting(
        0.0,
        "--patience-share",
        at_least=0,
        metavar="SHARE",
        help="stop after this share of the iterations without improvement, once the learning "
        "rate has fallen (0: never)",
    )
    min_improvement: float = setting(
        0.0,
        "--min-improvement",
        at_least=0,
        metavar="SHARE",
        help="by which share the objective must fall to count as improved",
    )
    time_budget: float | None = setting(
        None, "--time-budget", metavar="SECONDS", help="stop after so many seconds"
    )


@dataclass(frozen=True)
class SpeedSettings(Topic):
    """What is sped up, see `attack.matching.acceleration`.

    Attributes:
        trace: Run the passes of the difference as plain lists of operators, which spares small
            networks the overhead of modules and of torch's automatic differentiation.
        compile: Compile those lists.
        cuda_graphs: Capture and replay them (CUDA only).
        precision: Of matrix products: "float32", "tf32" or "bf16".
        channels_last: Memory layout of images and convolutions.
        restarts_at_once: Restarts per batched call; 0: by the model's size and memory.
        images_at_once: Images per pass of the model, see `attack.matching.pieces`; 0: all.
    """

    title: ClassVar[str] = "speed (off by default: each moves the last digits)"

    trace: bool = setting(False, "--trace", help="passes as plain lists of operators")
    compile: bool = setting(False, "--compile", help="compile the two passes of the difference")
    cuda_graphs: bool = setting(False, "--cuda-graphs", help="capture and replay them (CUDA only)")
    precision: str = setting(
        "float32",
        "--precision",
        choices=PRECISIONS,
        listed=True,
        help="of matrix products, as long as the gradient stays the same",
    )
    channels_last: bool = setting(False, "--channels-last", help="memory layout on tensor cores")
    restarts_at_once: int = setting(
        0, "--restarts-at-once", at_least=0, metavar="N", help="per batched call (0: auto)"
    )
    images_at_once: int = setting(
        0, "--images-at-once", at_least=0, metavar="N", help="of a batch, to save memory (0: all)"
    )

    @property
    def traced(self) -> bool:
        """Whether passes are written down as graphs."""
        return bool(self.tracers)

    @property
    def tracers(self) -> list[str]:
        """Names of the settings that write passes down and are on."""
        return [name for name in ("trace", "compile", "cuda_graphs") if getattr(self, name)]

    @property
    def tracing_setting(self) -> str:
        """One of them in braces, for a message."""
        return "{compile}" if self.compile else f"{{{self.tracers[-1]}}}"

    @property
    def lowered(self) -> bool:
        """Whether products have fewer bits."""
        return self.precision != "float32"

    @property
    def changes_passes(self) -> bool:
        """Whether a pass is computed otherwise than plainly."""
        return self.traced or self.lowered or self.channels_last

    def check_device(self, device_type: str) -> None:
        """Refuse what a device cannot do.

        Raises:
            SettingError: Names the setting.
        """
        if device_type == "cuda":
            return
        here = f"needs a CUDA GPU, and this run is on {device_type}"
        if self.cuda_graphs:
            raise setting_error(f"{{cuda_graphs}} {here}; use {{compile}}")
        if self.precision == "tf32":
            raise setting_error(f"{{precision}} tf32 {here}; use bf16 or float32")


TOPICS: dict[str, type[Topic]] = {
    "matching": MatchingSettings,
    "priors": PriorSettings,
    "optimiser": OptimiserSettings,
    "starts": StartSettings,
    "consensus": ConsensusSettings,
    "stopping": StoppingSettings,
    "speed": SpeedSettings,
}
# Topic and declaration of every setting, by its name among all of them.
SETTINGS: dict[str, tuple[str, Declared]] = {
    each.flat_name: (topic, each) for topic, record in TOPICS.items() for each in declared(record)
}


def setting_error(sentence: str) -> SettingError:
    """An error about settings, in a sentence that holds their names in braces.

    Args:
        sentence: Such as "{signed} and {soft_sign}: choose one of them".
    """
    # An argument of the inversion beside its settings.
    names, flags = {"prior": "prior"}, {"prior": "--prior"}
    for flat, (topic, each) in SETTINGS.items():
        names[flat], flags[flat] = f"{topic}.{each.name}", each.flag
    return SettingError(sentence.format_map(names), sentence.format_map(flags))


@contextlib.contextmanager
def told_by_flag() -> Iterator[None]:
    """Within the block of a command, wrong settings are told by their flags."""
    try:
        yield
    except SettingError as error:
        raise InputError(error.in_flags) from None


@dataclass(frozen=True, init=False)
class InversionConfig:
    """Everything that determines an inversion beside the target and the seed.

    Attributes:
        matching: Settings of the matching loss.
        priors: Settings of the priors on the images.
        optimiser: What is optimised, and by which steps.
        starts: Where it starts, and how often.
        consensus: Settings of what several restarts share.
        stopping: When it ends, and which iterate is the result.
        speed: Settings of the speed-ups.

    Example:
        >>> config = InversionConfig(iterations=24000, tv_kind="isotropic", tv=0.01, restarts=5)
        >>> config.priors.tv
        0.01
    """

    matching: MatchingSettings
    priors: PriorSettings
    optimiser: OptimiserSettings
    starts: StartSettings
    consensus: ConsensusSettings
    stopping: StoppingSettings
    speed: SpeedSettings

    def __init__(
        self,
        *,
        matching: MatchingSettings | None = None,
        priors: PriorSettings | None = None,
        optimiser: OptimiserSettings | None = None,
        starts: StartSettings | None = None,
        consensus: ConsensusSettings | None = None,
        stopping: StoppingSettings | None = None,
        speed: SpeedSettings | None = None,
        **changes: Value,
    ) -> None:
        given = (matching, priors, optimiser, starts, consensus, stopping, speed)
        by_topic = _by_topic(changes)
        for (topic, kind), record in zip(TOPICS.items(), given, strict=True):
            changed = dataclasses.replace(record or kind(), **by_topic.get(topic, {}))
            object.__setattr__(self, topic, changed)

    def changed(self, **changes: Value) -> InversionConfig:
        """A copy with some settings changed, such as `config.changed(tv=0.01)`."""
        return InversionConfig(**{**self._topics(), **changes})

    def with_flags(self, values: Mapping[str, Any]) -> InversionConfig:
        """A copy with the settings that the given flags decide.

        Args:
            values: Values of flags under the names that argparse gives them.
        """
        return self.changed(**settings_of_flags(values, self))

    def _topics(self) -> dict[str, Any]:
        return {topic: getattr(self, topic) for topic in TOPICS}

    def to_flat(self) -> dict[str, Any]:
        """All settings by name, as plain values for a record."""
        return {
            flat: getattr(getattr(self, topic), each.name)
            for flat, (topic, each) in SETTINGS.items()
        }

    def validate(self) -> None:
        """Refuse unknown names, values of a wrong type and impossible numbers.

        Raises:
            SettingError: Names the setting to change.
        """
        for flat, value in self.to_flat().items():
            wrong = complaint(SETTINGS[flat][1], value)
            if wrong is not None:
                raise setting_error(f"{{{flat}}} {_literal(wrong)}")
        _check_names(self)
        _check_priors(self)
        _check_steps(self)
        _check_speed(self)


def settings_of_flags(values: Mapping[str, Any], base: InversionConfig) -> dict[str, Any]:
    """The settings that the given flags decide, by name.

    Args:
        values: Values of flags under the names that argparse gives them.
        base: Has the parts of a setting that are not given.
    """
    before = base.to_flat()
    return {
        flat: from_flags(each, values, before[flat])
        for flat, (_, each) in SETTINGS.items()
        if is_given(each, values)
    }


def _by_topic(changes: Mapping[str, Value]) -> dict[str, dict[str, Any]]:
    """Settings by name, sorted by topic.

    Raises:
        InputError: There is no setting of that name.
    """
    found: dict[str, dict[str, Any]] = {}
    for flat, value in changes.items():
        if flat not in SETTINGS:
            raise InputError(f"there is no setting {flat}; known are {', '.join(SETTINGS)}")
        topic, each = SETTINGS[flat]
        found.setdefault(topic, {})[each.name] = value
    return found


def _literal(text: str) -> str:
    """The text with braces that mean themselves."""
    return text.replace("{", "{{").replace("}", "}}")


def _check_names(config: InversionConfig) -> None:
    layers, coordinates = config.matching.layers, config.optimiser.coordinates
    if layers is not None and not LAYER_WEIGHTS.fullmatch(layers):
        raise setting_error(
            f"{{layers}}: unknown layer weights {_literal(layers)}; "
            "known: linear, exp, decay, first:K, last:K"
        )
    if not _are_coordinates(coordinates):
        raise setting_error(
            f"{{coordinates}} {_literal(coordinates)}: choose pixels, dct or dct:EXPONENT"
        )


def _are_coordinates(name: str) -> bool:
    kind, _, exponent = name.partition(":")
    try:
        return (kind == "pixels" and not exponent) or (
            kind == "dct" and float(exponent or 1) is not None
        )
    except ValueError:
        return False


def _check_priors(config: InversionConfig) -> None:
    priors = config.priors
    if priors.bn_from_update and priors.exact_bn:
        raise setting_error("{bn_from_update} and {exact_bn}: choose one of them")
    if priors.bn_from_update and priors.bn <= 0:
        raise setting_error("{bn_from_update} needs {bn}, the weight of the statistics")
    if priors.features and (config.matching.joint_labels or priors.balance is not None):
        raise setting_error(
            "{features} needs known labels and a fixed weight: no {joint_labels}, no {balance}"
        )


def _check_steps(config: InversionConfig) -> None:
    if config.consensus.combine and config.starts.restarts < 2:
        raise setting_error("{combine} fuses several restarts; give {restarts} 2 or more")
    if config.optimiser.signed and config.optimiser.soft_sign:
        raise setting_error("{soft_sign} replaces the sign; switch {signed} off (--no-signed)")


def _check_speed(config: InversionConfig) -> None:
    """Refuse choices that exclude each other."""
    speed, matching = config.speed, config.matching
    if matching.known_masks and speed.channels_last:
        raise setting_error("{known_masks} and {channels_last}: masks are drawn in another order")
    if matching.double and speed.lowered:
        raise setting_error(f"{{double}} and {{precision}} {speed.precision}: choose one of them")
    if speed.images_at_once and speed.changes_passes:
        raise setting_error(
            "{images_at_once}: not with {trace}, {compile}, {cuda_graphs}, {precision} or "
            "{channels_last}"
        )
    if not speed.traced:
        return
    name = speed.tracing_setting
    if matching.hvp == "exact":
        raise setting_error(f"{name} speeds up the difference of passes; not with {{hvp}} exact")
    if speed.restarts_at_once > 1:
        raise setting_error(f"{name} runs one restart per call; not with {{restarts_at_once}}")
