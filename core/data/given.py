"""Data of the user's own code: inputs of any shape with targets of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset

from core.data.data_sets import DataSets
from core.data.specs import DataSpec, per_channel
from core.errors import InputError
from core.processes.distributed import derived_seed

# Inputs that are looked at to tell whether values lie in [0, 1].
_LOOKED_AT = 64
_TOLERANCE = 1e-4


@runtime_checkable
class Samples(Protocol):
    """Inputs with targets, such as a `torch.utils.data.Dataset` with a length."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Sequence[object]:
        """One input (C x ..., a tensor) and its target."""


@dataclass(frozen=True)
class GivenData:
    """What a function of the user's own gives to `--data module:function`.

    Attributes:
        train: Pairs of an input and its target; two tensors, of N inputs and N targets, will
            do. A client's batch is taken from these.
        validation: Likewise, not the client's; None: there are none.
        mean: Of the normalisation that the model expects; one number or one per channel.
        std: Its standard deviation.
        bounded: Whether inputs lie in [0, 1]; None: so if the first ones do.
        class_names: Names in the order of labels.
        name: For file names and tables.
        n_tokens: Size of the vocabulary, where inputs are token ids (T whole numbers each).
        tokens: The text of every token, in the order of ids; may be empty.
        pad: The token id that fills up sentences shorter than the longest, at their end.
    """

    train: Samples | tuple[torch.Tensor, torch.Tensor]
    validation: Samples | tuple[torch.Tensor, torch.Tensor] | None = None
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    bounded: bool | None = None
    class_names: Sequence[str] = ()
    name: str = "own-data"
    n_tokens: int = 0
    tokens: Sequence[str] = ()
    pad: int | None = None


class GivenSamples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The user's samples, normalised, as training and extraction read them.

    Args:
        samples: Pairs of an input and its target.
        spec: Shape and normalisation of the inputs.
        seed: Seed of random numbers that the user's code draws.
        place: Where they are from, for messages.
    """

    # Whatever the user's code reads, it reads in this process: it need not be picklable.
    in_memory = True

    def __init__(self, samples: Samples, spec: DataSpec, seed: int, place: str) -> None:
        self.samples, self.spec, self.seed, self.place = samples, spec, seed, place

    def target_like(self) -> torch.Tensor:
        """A target, for the shape and the type of an empty batch's."""
        return _pair(self.samples, 0, self.place)[1]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample of `key`: an index, or (epoch, index)."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(self.seed, epoch, index) % 2**63)
            given, target = _pair(self.samples, index, self.place)
        if given.shape != self.spec.shape:
            raise InputError(
                f"{self.place}: input {index} has shape {tuple(given.shape)} and the first one "
                f"{self.spec.shape}"
            )
        if (
            self.spec.n_tokens
            and not 0 <= int(given.min()) <= int(given.max()) < self.spec.n_tokens
        ):
            raise InputError(
                f"{self.place}: input {index} has token ids outside 0..{self.spec.n_tokens - 1}"
            )
        return self.spec.normalize(given[None])[0], target

    @property
    def labels(self) -> list[int]:
        """The class of every sample.

        Raises:
            InputError: Targets are no class indices.
        """
        targets = [_pair(self.samples, index, self.place)[1] for index in range(len(self))]
        if any(target.numel() != 1 or target.is_floating_point() for target in targets):
            raise InputError(f"{self.place}: its targets are no class indices")
        return [int(target) for target in targets]


def given_data(found: object, place: str) -> GivenData:
    """What the user's function returned, as `GivenData`.

    Args:
        found: `GivenData`; or samples; or a pair of them, for training and validation.
        place: Where it is from, for messages.

    Raises:
        InputError: None of these.
    """
    if isinstance(found, GivenData):
        return found
    if _are_samples(found):
        return GivenData(found)  # type: ignore[arg-type]
    if isinstance(found, tuple) and len(found) == 2 and all(map(_are_samples, found)):
        return GivenData(found[0], found[1])
    raise InputError(
        f"{place}: gives a {type(found).__name__}; expected are samples with a length whose "
        "items are (input, target), a pair of such (training, validation), two tensors, or "
        "gradinvbench.GivenData"
    )


def _are_samples(found: object) -> bool:
    """Whether these are N inputs with N targets: two tensors, or a data set."""
    if isinstance(found, tuple):
        return len(found) == 2 and all(isinstance(part, torch.Tensor) for part in found)
    return isinstance(found, Samples) and not isinstance(found, (torch.Tensor, str, dict))


def given_data_sets(found: object, seed: int, place: str) -> DataSets:
    """The user's own data as training and extraction read them; the number of classes is open.

    Args:
        found: See `given_data`.
        seed: Seed of random numbers that the user's code draws.
        place: Where they are from, for messages.

    Raises:
        InputError: They cannot be read as data.
    """
    given = given_data(found, place)
    spec = spec_of(given, place)
    train = GivenSamples(samples_of(given.train, place), spec, seed, place)
    others: Samples = () if given.validation is None else samples_of(given.validation, place)
    return DataSets(spec, train, train, GivenSamples(others, spec, seed, place))


def samples_of(given: Samples | tuple[torch.Tensor, torch.Tensor], place: str) -> Samples:
    """Samples from two tensors, or as they are.

    Raises:
        InputError: There are none, or inputs and targets differ in number.
    """
    if isinstance(given, tuple):
        if len(given[0]) != len(given[1]):
            raise InputError(f"{place}: {len(given[0])} inputs with {len(given[1])} targets")
        given = torch.utils.data.TensorDataset(*given)
    if len(given) == 0:
        raise InputError(f"{place}: holds no samples")
    return given


def spec_of(given: GivenData, place: str) -> DataSpec:
    """The description of the user's inputs, from the first ones; the number of classes is open.

    Args:
        given: The user's data.
        place: Where they are from, for messages.

    Raises:
        InputError: They cannot be inputs, or the normalisation does not fit them.
    """
    samples = samples_of(given.train, place)
    shown = [_pair(samples, i, place)[0] for i in range(min(_LOOKED_AT, len(samples)))]
    if not shown[0].is_floating_point():
        return _spec_of_tokens(given, shown[0], place)
    channels = shown[0].shape[0]
    inside = all(_is_inside(one) for one in shown)
    if given.bounded and not inside:
        raise InputError(f"{place}: is stated to lie in [0, 1] and does not")
    try:
        mean, std = (per_channel(n, getattr(given, n), channels) for n in ("mean", "std"))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return DataSpec(
        name=given.name,
        shape=tuple(shown[0].shape),
        mean=mean,
        std=std,
        n_classes=0,
        class_names=tuple(given.class_names),
        bounded=inside if given.bounded is None else given.bounded,
    )


def _spec_of_tokens(given: GivenData, first: torch.Tensor, place: str) -> DataSpec:
    if given.n_tokens < 2:
        raise InputError(
            f"{place}: whole numbers are read as token ids; give GivenData(n_tokens=...), the size "
            "of the vocabulary, or floating-point inputs"
        )
    spec = DataSpec.of_tokens(given.name, len(first), given.n_tokens, given.tokens, given.pad)
    return dataclasses.replace(spec, class_names=tuple(given.class_names))


def _is_inside(values: torch.Tensor) -> bool:
    return float(values.min()) >= -_TOLERANCE and float(values.max()) <= 1 + _TOLERANCE


def _pair(samples: Samples, index: int, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One input as floating-point numbers or token ids, and its target as a tensor."""
    item = samples[index]
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        raise InputError(f"{place}: item {index} is no pair of an input and its target")
    try:
        given, target = (torch.as_tensor(part) for part in item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{place}: item {index} holds no numbers ({error})") from None
    if given.dtype in (torch.int32, torch.int64) and given.dim() == 1 and len(given):
        return given.long(), target
    if not given.is_floating_point() or given.dim() < 1 or not given.isfinite().all():
        raise InputError(
            f"{place}: input {index} must be finite floating-point numbers of shape C x ... (or "
            "T token ids), not "
            f"{given.dtype} of shape {tuple(given.shape)}"
        )
    given = given if given.dtype == torch.float64 else given.float()
    return given, target
