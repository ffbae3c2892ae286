"""The hyper-parameters of an inversion inside a federation: `config_inversion.json`.

The file has the published flat keys. What they say in the terms of the attacks of stage 3 is
said once, by `InversionSettings.config` and `InversionSettings.config_of`; the rest is the
audit's own: which method, where the start and the variables come from (`audit.inversion`),
the softening of ReLUs, the published attack's factors, and files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack.settings import OBJECTIVES, InversionConfig
from core.errors import InputError
from core.reading import read_json_object

OWN_METHODS = ("full", "bn", "published")
LABEL_RULES = ("auto", "recovered", "joint")
STARTS = ("prior", "grey", "random")
COORDINATES = ("auto", "principal", "grey", "channels")

# Published keys and what they are called here.
_RENAMED = {"lr": "learning_rate", "start_rand": "start"}
# Published keys that say nothing to our methods: the site's own training states them.
_IGNORED = frozenset(
    [
        *("checkpoint_file", "weights_file", "batchnorm_file", "criterion", "pretrained"),
        *("num_classes", "batch_size", "init_target_rand", "no_lr_decay", "save_every"),
        *("lr_local", "local_bs", "local_epoch", "local_num_images", "local_optim"),
    ]
)


@dataclass(frozen=True)
class InversionSettings:
    """What determines an inversion beside the update, the prior image and the seed.

    Attributes:
        method: "full" (match update, BatchNorm statistics and prior), "bn" (BatchNorm
            statistics and prior alone), "published" (the published attack as it was,
            a baseline), or the name of an attack of stage 3.
        iterations: Number of iterations of the whole attack.
        learning_rate: The largest one; cosine after a linear warm-up.
        warmup: Iterations of linear growth of the learning rate.
        objective: How the update is compared, a name in `attack.matching.objectives`.
        gradient_weight: Factor of that comparison.
        bn_weight: Factor of the distance of BatchNorm statistics.
        tv_weight: Factor of total variation.
        prior_weight: Factor of the squared distance from the prior image (with public images:
            of their normal distribution); only where a site has several images.
        smoothing: Width of the softened ReLUs at the start, 0 for none; see
            `attack.matching.smooth_relu`.
        smoothing_end: The same at the end.
        labels: "recovered" from the update, optimised "joint"ly with the images, or
            "auto": recovered where they can be (one image, or one local step).
        coordinates: "channels" (three values per pixel), "grey" (one), "principal" (whitened
            by public images) or "auto": principal for several images where there are
            public ones, else grey.
        start: "prior", "grey" (mean colour) or "random".
        start_noise: Standard deviation of noise on the start (network inputs), without
            which the images of a batch could not become different.
        restarts: Number of starts; the one of smallest loss is the result.
        grad_l2: Of the published attack: factor of its (inert) gradient term.
        original_bn_l2: Of the published attack: factor of its BatchNorm term.
        energy_l2: Of the published attack: factor of its (inert) noise.
        tv_l1: Of the published attack: factor of absolute total variation.
        tv_l2: Of the published attack: factor of Euclidean total variation.
        l2: Of the published attack: factor of the images' length.
        img_prior: File of the prior image; None where the caller brings it.
        save_path: Folder for reconstructions, relative to the site's workspace.
        model_name: The network, for callers that build it from here.
        resolution: Side of the images in pixels, likewise.
    """

    method: str = "full"
    iterations: int = 300
    learning_rate: float = 0.1
    warmup: int = 0
    objective: str = "sim"
    gradient_weight: float = 1.0
    bn_weight: float = 0.1
    tv_weight: float = 1e-3
    prior_weight: float = 0.1
    smoothing: float = 0.5
    smoothing_end: float = 0.01
    labels: str = "auto"
    coordinates: str = "auto"
    start: str = "prior"
    start_noise: float = 0.03
    restarts: int = 1
    grad_l2: float = 1e-3
    original_bn_l2: float = 1e-1
    energy_l2: float = 1e-1
    tv_l1: float = 0.0
    tv_l2: float = 1e-4
    l2: float = 1e-5
    img_prior: str | None = None
    save_path: str | None = None
    model_name: str | None = None
    resolution: int | None = None

    def validate(self) -> None:
        """Refuse unknown names and impossible numbers.

        Raises:
            InputError: With the key to change.
        """
        from attack.attacks import attack_names

        choices = {
            "method": (*OWN_METHODS, *attack_names()),
            "labels": LABEL_RULES,
            "start": STARTS,
            "coordinates": COORDINATES,
            "objective": OBJECTIVES,
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise InputError(f"{key} {getattr(self, key)!r}: choose from {', '.join(known)}")
        for key, least in (("iterations", 1), ("restarts", 1), ("warmup", 0)):
            if getattr(self, key) < least:
                raise InputError(f"{key} {getattr(self, key)}: must be at least {least}")
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate {self.learning_rate}: must be positive")
        self._validate_weights()

    def _validate_weights(self) -> None:
        if self.smoothing > 0 and self.smoothing_end <= 0:
            raise InputError("smoothing_end must be positive where smoothing is")
        ours = ("gradient_weight", "bn_weight", "tv_weight", "prior_weight")
        course = ("start_noise", "smoothing", "smoothing_end")
        published = ("grad_l2", "original_bn_l2", "energy_l2", "tv_l1", "tv_l2", "l2")
        for key in ours + course + published:
            if not 0 <= getattr(self, key) < float("inf"):
                raise InputError(f"{key} {getattr(self, key)}: must be a number not below 0")

    def config(self, *, statistics: bool, joint_labels: bool) -> InversionConfig:
        """The methods full and bn in the terms of the attacks of stage 3.

        Args:
            statistics: Whether the update's BatchNorm statistics are matched.
            joint_labels: Whether labels are optimised with the images.

        Raises:
            InputError: Nothing is left to compare candidates by.
        """
        gradient_weight = self.gradient_weight if self.method == "full" else 0.0
        if not statistics and gradient_weight == 0:
            raise InputError("method bn: the update holds no BatchNorm statistics to match")
        return InversionConfig(
            objective=self.objective,
            gradient_weight=gradient_weight,
            hvp="exact",
            joint_labels=joint_labels,
            tv=self.tv_weight,
            bn=self.bn_weight if statistics else 0.0,
            bn_from_update=statistics,
            iterations=self.iterations,
            lr=self.learning_rate,
            warmup=self.warmup,
            signed=False,
            restarts=self.restarts,
            restarts_at_once=1,
            # Losses of differently softened networks cannot be compared.
            smallest_loss=self.smoothing == 0,
        )

    def config_of(self, published: InversionConfig) -> InversionConfig:
        """A registered attack's published settings for as many iterations as are asked for."""
        return published.changed(iterations=self.iterations)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a record."""
        return dataclasses.asdict(self)


def load_inversion_settings(path: str | Path) -> InversionSettings:
    """Read `config_inversion.json`.

    Keys are those of `InversionSettings`. A file of the published attack loads too: `lr`
    is `learning_rate`, `start_rand` is `start`, and what it says of the site's training
    is passed over, since the site knows. Without the key "method" it is `full` that
    runs; the factors of the published attack are kept for "published".

    Raises:
        InputError: The file is missing or no JSON object, a key is unknown, or a value
            is impossible.
    """
    if not Path(path).exists():
        raise InputError(f"there is no inversion configuration {path}")
    content = read_json_object(path, what="inversion configuration")
    try:
        return settings_from_dict(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def settings_from_dict(content: Mapping[str, Any]) -> InversionSettings:
    """Settings from the keys of `config_inversion.json`, see `load_inversion_settings`.

    Raises:
        InputError: Names the key.
    """
    fields = {field.name: field for field in dataclasses.fields(InversionSettings)}
    values = {}
    for key, value in content.items():
        name = _RENAMED.get(key, key)
        if name in fields:
            values[name] = _converted(key, value, fields[name])
        elif key not in _IGNORED and not key.startswith(("_", "#")):
            raise InputError(f"unknown key {key!r}; known are {', '.join(sorted(fields))}")
    settings = InversionSettings(**values)
    settings.validate()
    return settings


def _converted(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    if key == "start_rand":
        return "random" if value else "prior"
    kind = str(field.type)
    if value is None and "None" in kind:
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind.startswith("str") and isinstance(value, str):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind.startswith("int") and number and float(value).is_integer():
        return int(value)
    if kind == "float" and number:
        return float(value)
    raise InputError(f"{key} {value!r}: must be of type {kind.removesuffix(' | None')}")
