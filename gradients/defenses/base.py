"""The interface of a defense, and the registry behind `--defense`."""

from __future__ import annotations

import abc
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.architecture import Architecture
from core.registry import Registry
from training.transforms import ClientView

logger = logging.getLogger(__name__)
Gradient = dict[str, torch.Tensor]


class Defense(abc.ABC):
    """A transformation of the shared gradient.

    A subclass is a frozen dataclass whose fields are its parameters, in the order
    in which its word states them.
    """

    name: ClassVar[str]

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 (a hook that may stay empty)
        """Change the model before local training (freezing does)."""

    def architecture(self, given: Architecture) -> Architecture:
        """What rebuilds a model that `prepare` has changed.

        Args:
            given: What rebuilds it before.
        """
        return given

    @classmethod
    def changes_model(cls) -> bool:
        """Whether a model has other parameters under this defense."""
        return cls.architecture is not Defense.architecture

    def is_in(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether these parameters are of a model that it has changed."""
        return False

    def check_state(self, shapes: dict[str, Sequence[int]]) -> None:  # noqa: B027 (may stay empty)
        """Refuse, before anything is built, a file that `architecture` cannot belong to.

        Args:
            shapes: Of its parameters, by name.

        Raises:
            InputError: It cannot.
        """

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels to train on instead of the client's, which stay as they are.

        Args:
            client: Its model before local training, and its batch.

        Returns:
            N x ... each; labels may be probabilities.
        """
        return client.images, client.labels

    @abc.abstractmethod
    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """The gradient to share instead of `gradient`, which is left unchanged."""

    def largest_norm(self, norm: float) -> float:
        """The norm that no shared update exceeds, if none exceeds `norm` before."""
        return math.inf

    def epsilon(self, norm: float, rounds: int, delta: float) -> float | None:
        """The client's privacy budget after so many uses, if no update exceeds `norm`.

        Neighbours are any two updates of one client: what is hidden is all that it holds.

        Args:
            norm: L2 norm of the updates, before this defense; may be infinite.
            rounds: How often the client shares.
            delta: Probability that the bound fails.

        Returns:
            None where nothing is promised.
        """
        return None

    def images_of(self, client: ClientView, does: str) -> tuple[DataSpec, torch.Tensor]:
        """The client's images in [0, 1], and how they are described.

        Args:
            client: Its batch.
            does: What the defense does to images, for the message: "refines images".

        Raises:
            InputError: Inputs are no images, or nobody says how they are normalised.
        """
        spec = client.data
        if spec is None or client.images.dim() != 4 or not spec.bounded:
            raise InputError(f"--defense {self.word}: {does}, and these are none")
        return spec, spec.denormalize(client.images).detach()

    @property
    def word(self) -> str:
        """Name and parameters, as stored in a checkpoint and read by `parse_defenses`."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return ":".join([self.name, *(_plain(value) for value in values)])


class InputDefense(Defense):
    """A defense that changes what the client trains on, and nothing else."""

    def apply(self, gradient: Gradient, client: ClientView) -> Gradient:
        """What was computed from changed inputs is shared as it is."""
        return dict(gradient)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


Stated = TypeVar("Stated", bound=Defense)

_DEFENSES = Registry[type[Defense]]("defense")
# Names that defenses had before, which old files and scripts hold.
_FORMER: dict[str, str] = {}


def register_defense(name: str, *former: str) -> Callable[[type[Defense]], type[Defense]]:
    """Make `--defense name:...` create the decorated class.

    Args:
        name: Must not be taken.
        former: Names that it had before; still understood, with a sentence.

    Raises:
        ValueError: The name is registered already.
    """

    def register(kind: type[Defense]) -> type[Defense]:
        _DEFENSES.add(name, kind)
        _FORMER.update(dict.fromkeys(former, name))
        kind.name = name
        return kind

    return register


def defense_names() -> list[str]:
    """Every name that `--defense` knows."""
    return _DEFENSES.names()


def current_name(name: str) -> str:
    """The name of today of a defense that may be called by a former one."""
    return _FORMER.get(name, name)


def defense_class(name: str) -> type[Defense]:
    """The defense of that name.

    Raises:
        KeyError: There is none.
    """
    return _DEFENSES[name]


def parse_defenses(words: str) -> tuple[Defense, ...]:
    """Create defenses from words such as `clip:1,gaussian:0.01`.

    Args:
        words: Separated by commas; parameters after colons; omitted ones take
            their defaults.

    Raises:
        InputError: An unknown name, or a parameter that the defense cannot use.
    """
    return tuple(_create(word.strip()) for word in words.split(",") if word.strip())


def stated(words: Sequence[str], kind: type[Stated]) -> Stated:
    """The one defense of a kind among the words that a client states."""
    (word,) = [word for word in words if word.split(":")[0] == kind.name]
    (defense,) = parse_defenses(word)
    assert isinstance(defense, kind)
    return defense


# By the name of a field's type.
_CONVERT: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}


def _type_name(field: dataclasses.Field[Any]) -> str:
    # A string where the module does not evaluate annotations, else the type.
    return field.type if isinstance(field.type, str) else field.type.__name__


def _create(word: str) -> Defense:
    name, *values = word.split(":")
    if name != current_name(name):
        logger.warning("--defense %s: %s is called %s now", word, name, current_name(name))
        name = current_name(name)
    if name not in _DEFENSES:
        raise InputError(
            f"--defense {word}: unknown defense; known are {', '.join(defense_names())}"
        )
    kind: Any = _DEFENSES[name]
    fields = dataclasses.fields(kind)
    if len(values) > len(fields):
        raise InputError(f"--defense {word}: {name} takes at most {len(fields)} parameters")
    try:
        parsed = [_CONVERT[_type_name(f)](v) for f, v in zip(fields, values, strict=False)]
        numbers = [value for value in parsed if isinstance(value, float)]
        require(all(map(math.isfinite, numbers)), "a parameter must be a finite number")
        return cast(Defense, kind(*parsed))
    except (TypeError, ValueError) as error:
        raise InputError(f"--defense {word}: {error}") from None


def require(condition: bool, sentence: str) -> None:
    """Refuse a defense's parameter with a sentence that says what it must be."""
    if not condition:
        raise ValueError(sentence)


def apply_defenses(defenses: Sequence[Defense], gradient: Gradient, client: ClientView) -> Gradient:
    """Apply several defenses one after the other.

    Args:
        defenses: The defenses in the order in which they are applied.
        gradient: By parameter name.
        client: What the client knows about its own computation.

    Returns:
        The gradient to share.
    """
    for defense in defenses:
        gradient = defense.apply(gradient, client)
    return gradient


def encode_batch(
    defenses: Sequence[Defense], client: ClientView
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a client trains on after several defenses, one after the other.

    Args:
        defenses: The defenses in the order in which they are applied.
        client: Its model before local training, and its batch.
    """
    for defense in defenses:
        images, labels = defense.encode(client)
        client = dataclasses.replace(client, images=images, labels=labels)
    return client.images, client.labels


def normal_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers of the shape, type and device of `tensor`, drawn on the CPU."""
    noise = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(generator=generator)
    return noise.to(tensor.device)


def uniform_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers in [0, 1) of the shape, type and device of `tensor`, drawn on the CPU."""
    numbers = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(generator=generator)
    return numbers.to(tensor.device)
