"""How a client trains between receiving a model and sharing its update."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import InputError
from core.processes.distributed import shard_sizes

SGD, ADAM, ADAMW = "sgd", "adam", "adamw"
OPTIMIZERS = (SGD, ADAM, ADAMW)
CONSTANT, STEP, COSINE = "constant", "step", "cosine"
SCHEDULES = (CONSTANT, STEP, COSINE)
# Whoever simulates a client allocates by them.
MAX_LOCAL_STEPS = 100_000

# The images of every local step.
Order = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LocalTraining:
    """The client's local training between receiving the model and sharing its update.

    What is shared is (theta_0 - theta_K) / (lr K), K being `updates`, whatever the optimiser
    and the schedule are: `lr` is the one stated here, not the mean of a schedule.

    Attributes:
        epochs: Passes over the local data ("local iterations" where there is one batch).
        batches: Batches per epoch; the images are split in order into this many.
        lr: Learning rate.
        momentum: SGD momentum.
        weight_decay: L2 penalty; AdamW's is decoupled from the gradient.
        proximal: mu of FedProx: the local loss has mu/2 |theta - theta_0|^2 added.
        bn_momentum: Momentum of BatchNorm's running statistics; None: each layer's own.
        order: Numbers of the images of every local step, where they are no even split in
            order: a data loader's last batch is short, and epochs may mix the images.
        optimizer: "sgd", "adam" or "adamw", as in `torch.optim`.
        dampening: Of SGD's momentum.
        nesterov: Whether SGD's momentum is Nesterov's.
        betas: Adam's decay of the first and the second moment.
        eps: Adam's summand beside the root of the second moment.
        amsgrad: Whether Adam divides by the largest second moment so far.
        clip_norm: The norm that a step's gradient is scaled down to, over all parameters, as
            by `torch.nn.utils.clip_grad_norm_`; None: no clipping.
        accumulate: So many batches make one step of the optimiser, with their mean gradient.
        schedule: "constant", "step" or "cosine", over the optimiser's steps, as
            `torch.optim.lr_scheduler.StepLR` and `CosineAnnealingLR` (T_max = K).
        step_size: Of the schedule "step": the optimiser's steps between two decays.
        gamma: Of the schedule "step": factor of every decay.
        min_lr: Of the schedule "cosine": the rate it falls to.
        rates: The learning rate of every step of the optimiser, in place of a schedule.
        order_known: Whether an attacker is told which images share which steps; see `as_told`.

    Raises:
        InputError: A value that cannot be used; the sentence names the attribute.

    Example:
        >>> LocalTraining.parse("adamw lr=1e-3 weight-decay=0.01 epochs=3")
    """

    epochs: int = 1
    batches: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    bn_momentum: float | None = None
    order: Order | None = None
    optimizer: str = SGD
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    clip_norm: float | None = None
    accumulate: int = 1
    schedule: str = CONSTANT
    step_size: int = 1
    gamma: float = 0.1
    min_lr: float = 0.0
    rates: tuple[float, ...] | None = None
    order_known: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_optimizer()
        self._check_schedule()
        _check_steps(self.steps)
        if self.order is not None and len(self.order) != self.steps:
            raise InputError(
                f"the order of the images has {len(self.order)} local steps, and {self.epochs} "
                f"epochs of {self.batches} batches have {self.steps}"
            )

    def _check_numbers(self) -> None:
        for name in ("epochs", "batches", "accumulate", "step_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"local training: {name} must be a whole number of at least 1")
        for name in ("lr", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise InputError(f"local training: {name} must be a positive number")
        for name in ("momentum", "weight_decay", "proximal", "dampening", "gamma", "min_lr"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < math.inf):
                raise InputError(f"local training: {name} must be a number that is not negative")
        momentum = self.bn_momentum
        if momentum is not None and not (_is_number(momentum) and 0 < momentum <= 1):
            raise InputError("local training: bn_momentum must lie in (0, 1]")
        if self.batches % self.accumulate:
            raise InputError(
                f"local training: accumulate {self.accumulate} does not divide the "
                f"{self.batches} batches of an epoch"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"local training: optimizer {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}"
            )
        if self.optimizer != SGD and (self.momentum or self.dampening or self.nesterov):
            raise InputError(
                f"local training: momentum, dampening and nesterov belong to sgd; "
                f"{self.optimizer} has betas"
            )
        if self.nesterov and (not self.momentum or self.dampening):
            raise InputError("local training: nesterov needs momentum and no dampening")
        if self.optimizer == SGD and self.amsgrad:
            raise InputError("local training: amsgrad belongs to adam and adamw")
        betas = self.betas
        if len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
            raise InputError("local training: betas must be two numbers in [0, 1)")

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"local training: schedule {self.schedule!r} is none of {', '.join(SCHEDULES)}"
            )
        if self.rates is None:
            return
        if self.schedule != CONSTANT:
            raise InputError(f"local training: rates and schedule {self.schedule} exclude another")
        if len(self.rates) != self.updates:
            raise InputError(
                f"local training: rates must be {self.updates} numbers, one per step of the "
                f"optimiser, not {len(self.rates)}"
            )
        if not all(_is_number(rate) and 0 <= rate < math.inf for rate in self.rates):
            raise InputError("local training: rates must be numbers that are not negative")

    @property
    def steps(self) -> int:
        """Number of batches that the client passes through the model."""
        return self.epochs * self.batches

    @property
    def updates(self) -> int:
        """Steps K of the optimiser; the shared gradient is (theta_0 - theta_K) / (lr K)."""
        return self.steps // self.accumulate

    @property
    def shares_gradient(self) -> bool:
        """Whether what is shared is the gradient of the one batch itself."""
        changed = self.weight_decay or self.nesterov or self.clip_norm is not None
        one_step = self.steps == 1 and self.learning_rates()[0] == self.lr
        return one_step and self.optimizer == SGD and not changed

    @property
    def order_assumed(self) -> bool:
        """Whether an attacker who simulates the training assumes which images share steps."""
        return not self.order_known and self.epochs > 1 and self.batches > 1

    def learning_rates(self) -> tuple[float, ...]:
        """The learning rate of every step of the optimiser."""
        if self.rates is not None:
            return self.rates
        return tuple(map(self._rate, range(self.updates)))

    def _rate(self, update: int) -> float:
        if self.schedule == STEP:
            return self.lr * self.gamma ** (update // self.step_size)
        if self.schedule == COSINE:
            height = (1 + math.cos(math.pi * update / self.updates)) / 2
            return self.min_lr + (self.lr - self.min_lr) * height
        return self.lr

    def torch_optimizer(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """`torch.optim`'s own optimiser with these settings, for a client that trains."""
        if self.optimizer == SGD:
            return torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=self.momentum,
                dampening=self.dampening,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov,
            )
        kind = torch.optim.Adam if self.optimizer == ADAM else torch.optim.AdamW
        return kind(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )

    def as_told(self, n_images: int) -> LocalTraining:
        """What an attacker is told: where the order is not known, that of the images' numbers.

        The sizes of the steps are known still. Of a single epoch the order is nothing but the
        numbering of the images. Where several epochs mix them, an attacker who assumes the
        same batches in every epoch simulates another training than the client's; the prior of
        Dimitrov et al. (2022), the attack `data-leakage-fedavg`, does without the assumption.

        Args:
            n_images: Images of the client.

        Source: Dimitrov et al., "Data Leakage in Federated Averaging", section 4,
            https://openreview.net/forum?id=e7A0B99zJf.
        """
        if self.order_known or self.order is None:
            return self
        sizes = [len(step) for step in self.order]
        first, steps = 0, []
        for size in sizes:
            steps.append(tuple((first + i) % n_images for i in range(size)))
            first = (first + size) % n_images
        even = shard_sizes(n_images, self.batches) * self.epochs
        order = None if sizes == even else tuple(steps)
        return dataclasses.replace(self, order=order)

    # -- As plain values and as text ------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a record; what earlier versions did not have only if it is used."""
        values, default = dataclasses.asdict(self), LocalTraining()
        return {k: v for k, v in values.items() if k in _FIRST or v != getattr(default, k)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LocalTraining:
        """The inverse of `to_dict`, also from JSON's lists.

        Raises:
            TypeError: A key that is no attribute.
            InputError: A value that cannot be used.
        """
        return LocalTraining(**{name: _as_tuples(value) for name, value in values.items()})

    @property
    def word(self) -> str:
        """The text that `parse` makes it from."""
        values, default = dataclasses.asdict(self), LocalTraining()
        changed = [n for n in values if n != "optimizer" and values[n] != getattr(default, n)]
        return " ".join([self.optimizer, *(f"{_word(n)}={_text(values[n])}" for n in changed)])

    @staticmethod
    def parse(text: str, n_images: int | None = None) -> LocalTraining:
        """Read local training as a user writes it.

        Args:
            text: The optimiser, then settings `name=value` with spaces in between, such as
                "sgd lr=0.1 momentum=0.9 epochs=1 batch-size=8" or "adamw lr=1e-3 steps=3".
                Names are those of the attributes. Beside them: `steps`, batches that the
                client passes through the model, in place of epochs; `batch-size`, in place of
                batches, the last one of an epoch may have fewer; and `shuffle`, a seed of the
                order in which every epoch goes through the images.
            n_images: Images of the client; batch-size and shuffle need it.

        Raises:
            InputError: One sentence on the word that is wrong.
        """
        optimizer, *words = text.split() or [""]
        if "=" in optimizer:
            optimizer, words = SGD, [optimizer, *words]
        stated = _stated(words)
        derived = {name: stated.pop(name) for name in _DERIVED if name in stated}
        # Before an order of so many epochs is drawn.
        largest = max(stated.get("epochs", 1), stated.get("batches", 1), derived.get("steps", 1))
        _check_steps(largest)
        _resolve(stated, derived, n_images)
        return LocalTraining(optimizer=optimizer.lower(), **stated)


# What every record has held since before there were other optimisers.
_FIRST = (
    "epochs",
    "batches",
    "lr",
    "momentum",
    "weight_decay",
    "proximal",
    "bn_momentum",
    "order",
)


def _check_steps(steps: int) -> None:
    if steps > MAX_LOCAL_STEPS:
        raise InputError(f"local training: {steps} local steps are more than {MAX_LOCAL_STEPS}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _word(name: str) -> str:
    return name.replace("_", "-")


def _text(value: object) -> str:
    """A setting's value as `parse` reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        nested = bool(value) and isinstance(value[0], tuple)
        return ("/" if nested else ",").join(map(_text, value))
    return repr(value) if isinstance(value, float) else str(value)


def _boolean(text: str) -> bool:
    return {"yes": True, "true": True, "no": False, "false": False}[text.lower()]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _order(text: str) -> Order:
    return tuple(tuple(map(int, step.split(","))) for step in text.split("/"))


# How the values of settings are read.
_READERS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("epochs", "batches", "accumulate", "step_size"), int),
    **dict.fromkeys(("steps", "batch_size", "shuffle"), int),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "proximal", "bn_momentum"), float),
    **dict.fromkeys(("dampening", "eps", "clip_norm", "gamma", "min_lr"), float),
    **dict.fromkeys(("nesterov", "amsgrad", "order_known"), _boolean),
    "betas": _numbers,
    "rates": _numbers,
    "schedule": str,
    "order": _order,
}
# What is no attribute, and what it stands for.
_DERIVED = {"steps": "epochs", "batch_size": "batches", "shuffle": "order"}


def _stated(words: list[str]) -> dict[str, Any]:
    """The settings by attribute."""
    stated: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        key = name.replace("-", "_")
        if not equals or key not in _READERS:
            near = difflib.get_close_matches(key, _READERS, 1)
            hint = f"; did you mean {_word(near[0])}=?" if near else ""
            raise InputError(f"local training: {word!r} is no setting name=value{hint}")
        if key in stated:
            raise InputError(f"local training: {name} is given twice")
        try:
            stated[key] = _READERS[key](text)
        except (ValueError, KeyError):
            raise InputError(f"local training: {word!r} has no value that {name} takes") from None
    return stated


def _resolve(stated: dict[str, Any], derived: dict[str, int], n_images: int | None) -> None:
    """Write what `derived` says into the attributes of `stated`."""
    for name, attribute in _DERIVED.items():
        if name in derived and attribute in stated:
            raise InputError(
                f"local training: {_word(name)} and {attribute} exclude another; give one"
            )
    size = derived.get("batch_size")
    if n_images is None and ("batch_size" in derived or "shuffle" in derived):
        raise InputError("local training: batch-size and shuffle need the number of images")
    if size is not None and n_images is not None:
        if size < 1:
            raise InputError("local training: batch-size must be at least 1")
        stated["batches"] = math.ceil(n_images / size)
    batches = stated.get("batches", 1)
    if "steps" in derived:
        if batches < 1 or derived["steps"] % batches:
            raise InputError(
                f"local training: {derived['steps']} steps are no whole epochs of {batches} batches"
            )
        stated["epochs"] = derived["steps"] // batches
    if n_images is not None and derived.keys() & {"batch_size", "shuffle"}:
        order = _epochs(n_images, batches, size, stated.get("epochs", 1), derived.get("shuffle"))
        if order is not None:
            stated["order"] = order


def _epochs(n: int, batches: int, size: int | None, epochs: int, seed: int | None) -> Order | None:
    """The images of every step; None for an even split in order."""
    if batches < 1 or epochs < 1:
        return None  # Refused with all numbers.
    sizes = shard_sizes(n, batches) if size is None else [size] * batches
    ends = [min(n, sum(sizes[: i + 1])) for i in range(batches)]
    starts = [0, *ends[:-1]]
    if seed is None and [b - a for a, b in zip(starts, ends, strict=True)] == shard_sizes(
        n, batches
    ):
        return None
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    steps: list[tuple[int, ...]] = []
    for _ in range(epochs):
        images = range(n) if generator is None else torch.randperm(n, generator=generator).tolist()
        steps += [tuple(images[a:b]) for a, b in zip(starts, ends, strict=True)]
    return tuple(steps)
