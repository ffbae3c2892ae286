"""Read what a client sent: two states of a model, and what lies between them.

A server of a federation sends a state, a client sends back another one or the difference.
Here such a pair is read from files or from memory, described in one table, and made the target
of an attack.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from core.errors import InputError, nearest
from core.escaping import in_one_line
from core.models.state_files import State, States, named, read_state, renamed
from core.target import RUNNING_STATISTICS
from gradients.update_findings import processing, statistics
from gradients.update_traces import Finding, Moved, moved

if TYPE_CHECKING:
    import pandas

Source = str | Path | nn.Module | States

# A client's weights are near those it received; a difference is not near them.
_NEAR = 0.9
_FAR = 0.3
WEIGHTS, DIFFERENCE = "weights", "difference"
_COUNTER = "num_batches_tracked"
_MEAN_AND_VARIANCE = ("running_mean", "running_var")


@dataclass(frozen=True)
class Entry:
    """One tensor of an update.

    Attributes:
        name: In the model's state.
        kind: "shared" (a parameter that changed), "unchanged" (a parameter that did not:
            frozen, or not used), "absent" (not in what was sent), or "buffer".
        shape: Of the tensor.
        number_format: As the file has it, such as "float16".
        norm_before: Euclidean norm of what the client received.
        norm: Euclidean norm of the change; None where the tensor is absent.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    number_format: str
    norm_before: float
    norm: float | None

    @property
    def relative(self) -> float | None:
        """The change in units of what was there before; None where that is zero or unknown."""
        return None if self.norm is None or not self.norm_before else self.norm / self.norm_before


@dataclass(frozen=True, repr=False)
class SharedUpdate:
    """What a client sent, read against what it had received.

    Attributes:
        before: The state that the client received.
        change: What the client changed, after minus before, by the same names. In the
            precision of `before`; integers as float64.
        entries: One per tensor of the state, in its order.
        looks_like: "weights" or "difference": what was sent, stated or told apart.
        certain: Whether that was stated, or clear from the numbers.
        unknown: Names in what was sent that the state before does not have.
        findings: What its values say, see `gradients.update_findings`.
    """

    before: State
    change: State
    entries: tuple[Entry, ...]
    looks_like: str
    certain: bool
    unknown: tuple[str, ...]

    @cached_property
    def norm(self) -> float:
        """Euclidean norm of the change of all parameters."""
        return math.hypot(*(e.norm for e in self.entries if e.norm and e.kind != "buffer"), 0.0)

    def names(self, kind: str) -> tuple[str, ...]:
        """The tensors of one kind, see `Entry`."""
        return tuple(entry.name for entry in self.entries if entry.kind == kind)

    def running_after(self) -> State | None:
        """BatchNorm's running statistics after the local training; None if they were not sent."""
        names = [n for n in self.before if n.endswith(RUNNING_STATISTICS)]
        if not names or any(name not in self.change for name in names):
            return None
        return {name: self.before[name] + self.change[name] for name in names}

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What was done to the update and what it says of the training, from its values."""
        return self.examine()

    def examine(self, max_norm: float | None = None) -> tuple[Finding, ...]:
        """The findings, see `gradients.update_findings`.

        Args:
            max_norm: The clipping norm that the update is said to have, to be compared.
        """
        running = [n for n in self.before if n.endswith(_MEAN_AND_VARIANCE)]
        counted = [float(v) for n, v in self.change.items() if n.endswith(_COUNTER)]
        sent = [n for n in running if n in self.change]
        unchanged = sum(math.prod(e.shape) for e in self.entries if e.kind == "unchanged")
        done = processing(self._moved(), unchanged, max_norm)
        return (*done, *statistics(running, sent, counted))

    def _moved(self) -> list[Moved]:
        return [
            moved(
                e.name,
                self.before[e.name],
                self.change[e.name],
                getattr(torch, e.number_format),
                self.looks_like == WEIGHTS,
            )
            for e in self.entries
            if e.kind == "shared"
        ]

    def to_frame(self) -> pandas.DataFrame:
        """One row per tensor."""
        import pandas

        rows = [
            {
                "name": e.name,
                "kind": e.kind,
                "shape": e.shape,
                "number format": e.number_format,
                "norm before": e.norm_before,
                "norm of the change": e.norm,
                "relative": e.relative,
            }
            for e in self.entries
        ]
        return pandas.DataFrame(rows).set_index("name")

    def __repr__(self) -> str:
        kinds = ("shared", "unchanged", "absent", "buffer")
        counts = ", ".join(f"{len(self.names(kind))} {kind}" for kind in kinds)
        formats = ", ".join(sorted({e.number_format for e in self.entries if e.norm is not None}))
        doubt = "" if self.certain else " (not certain: state it with kind=)"
        lines = [
            f"Update of {len(self.entries)} tensors ({counts}), norm {self.norm:.4g}",
            f"sent as {self.looks_like}{doubt}, number format {formats or 'none'}",
        ]
        if self.unknown:
            lines.append(f"not in the state before: {', '.join(map(in_one_line, self.unknown[:3]))}"
                         f"{', ...' if len(self.unknown) > 3 else ''}")  # fmt: skip
        return "\n".join(lines)

    def __str__(self) -> str:
        from prettytable import PrettyTable

        table = PrettyTable(["tensor", "kind", "shape", "format", "norm of the change", "relative"])
        table.align = "l"
        for e in self.entries:
            shape = "x".join(map(str, e.shape)) or "scalar"
            table.add_row(
                [
                    in_one_line(e.name),
                    e.kind,
                    shape,
                    e.number_format,
                    _number(e.norm),
                    _number(e.relative),
                ]
            )
        return "\n".join([f"{self!r}\n{table}", *map(str, self.findings)])

    def _repr_html_(self) -> str:
        found = html.escape("\n".join(map(str, self.findings)))
        head = f"<pre>{html.escape(repr(self))}</pre>"
        return f"{head}{self.to_frame().to_html()}<pre>{found}</pre>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def read_update(before: Source, after: Source, *, kind: str | None = None) -> SharedUpdate:
    """Read what a client sent, against what it had received.

    Args:
        before: The state that the client received: a file (`.pt`, `.pth`, `.tar`,
            `.safetensors`, `.npz`), a module, or tensors or arrays by name.
        after: What it sent, likewise, or a list of arrays in the order of the model's state
            (Flower, NVFlare's NumPy models): its weights, or their difference to `before`.
            Wrappers' prefixes are taken off; half precision and bfloat16 are read as they are.
        kind: "weights" or "difference"; default: told apart by the numbers.

    Returns:
        Prints as a table; `to_frame()` has one row per tensor.

    Raises:
        InputError: A file that cannot be read, names or shapes that do not belong together, or
            numbers that are not finite.
    """
    if kind not in (None, WEIGHTS, DIFFERENCE):
        raise InputError(f"kind {kind}: choose {WEIGHTS} or {DIFFERENCE}")
    module = before if isinstance(before, nn.Module) else None
    received = _state(before, "before", ())
    sent = renamed(_state(after, "after", tuple(received)), received)
    common = _common(received, sent)
    _check_numbers(received, sent)
    stated, certain = (kind, True) if kind else _told_apart(received, sent, common)
    change = {n: _change(received[n], sent[n], stated) for n in common}
    endless = next((name for name, value in change.items() if not value.isfinite().all()), None)
    if endless is not None:
        # One is infinite and the other is not, or float32 cannot hold their difference.
        raise InputError(f"before: {endless} has no finite difference to what was sent")
    parameters = None if module is None else {name for name, _ in module.named_parameters()}
    entries = tuple(_entry(n, v, sent.get(n), change.get(n), parameters)
                    for n, v in received.items())  # fmt: skip
    unknown = tuple(name for name in sent if name not in received)
    return SharedUpdate(received, change, entries, stated, certain, unknown)


def _state(source: Source, argument: str, names: Sequence[str]) -> State:
    if isinstance(source, (str, Path)):
        return read_state(source, argument)
    if isinstance(source, nn.Module):
        return {name: value.detach().cpu() for name, value in source.state_dict().items()}
    if not names and not hasattr(source, "items"):
        raise InputError(f"{argument}: a list says no names; give a file, a module or a dictionary")
    return named(source, names)


def _common(received: State, sent: State) -> list[str]:
    for argument, state in (("before", received), ("after", sent)):
        if not state:
            raise InputError(f"{argument}: there is no tensor in it")
    common = [name for name in received if name in sent]
    if not common:
        first = next(iter(sent), "")
        raise InputError(
            f"no tensor that was sent is in the state before: {first!r} is not, and the nearest "
            f"there is {nearest(first, received)!r}"
        )
    for name in common:
        if received[name].shape != sent[name].shape:
            raise InputError(
                f"{name} has shape {tuple(sent[name].shape)} in what was sent and "
                f"{tuple(received[name].shape)} before"
            )
    return common


def _check_numbers(received: State, sent: State) -> None:
    """Refuse what are no real numbers, NaN, and infinity.

    Only masks of attention hold infinities, before and after.
    """
    for argument, state in (("before", received), ("after", sent)):
        for name, value in state.items():
            if value.is_complex() or value.is_quantized:
                raise InputError(f"{argument}: {name} holds {value.dtype}, not real numbers")
            if value.is_floating_point() and value.element_size() == 1:
                raise InputError(f"{argument}: {name} holds {value.dtype}; give it in more bits")
    for name, value in received.items():
        if name not in sent:
            continue
        # A counter that was averaged comes back as a whole number.
        whole = value.dim() > 0 and not sent[name].is_floating_point()
        if value.is_floating_point() and whole:
            raise InputError(f"after: {name} holds {sent[name].dtype} in place of {value.dtype}")
        if value.dtype == torch.bool and sent[name].dtype != torch.bool:
            raise InputError(f"before: {name} holds {value.dtype} in place of {sent[name].dtype}")
    for name, value in received.items():
        if value.isnan().any():
            raise InputError(f"before: {name} holds NaN")
    for name, value in sent.items():
        masked = name in received and bool(received[name].isinf().any())
        if value.isnan().any() or (value.isinf().any() and not masked):
            raise InputError(f"after: {name} is not finite")


def _told_apart(received: State, sent: State, common: Sequence[str]) -> tuple[str, bool]:
    """Weights lie near those received (cosine near 1), a difference does not."""
    dot = before = after = 0.0
    for name in common:
        a, b = received[name].double(), sent[name].double()
        telling = received[name].is_floating_point() and not name.endswith(RUNNING_STATISTICS)
        if telling and a.isfinite().all():
            dot += float((a * b).sum())
            before += float(a.square().sum())
            after += float(b.square().sum())
    if not before or not after:
        # All zero: a difference of nothing, or weights that were zero and are not any more.
        return (DIFFERENCE, bool(before)) if not after else (WEIGHTS, False)
    cosine = dot / math.sqrt(before * after)
    return (WEIGHTS if cosine > (_NEAR + _FAR) / 2 else DIFFERENCE), not _FAR < cosine < _NEAR


def _change(before: torch.Tensor, sent: torch.Tensor, kind: str) -> torch.Tensor:
    precision = before.dtype if before.dtype == torch.float64 else torch.float32
    if not before.is_floating_point():
        precision = torch.float64
    sent, before = sent.to(precision), before.to(precision)
    # A mask's infinity minus itself is no change.
    return sent if kind == DIFFERENCE else torch.where(sent == before, 0, sent - before)


def _entry(
    name: str,
    before: torch.Tensor,
    sent: torch.Tensor | None,
    change: torch.Tensor | None,
    parameters: set[str] | None,
) -> Entry:
    buffer = name.endswith(RUNNING_STATISTICS) or not before.is_floating_point()
    if parameters is not None:
        buffer = name not in parameters
    norm = None if change is None else float(change.double().norm())
    moved = "unchanged" if norm == 0 else "shared"
    kind = "absent" if norm is None else ("buffer" if buffer else moved)
    dtype = before.dtype if sent is None else sent.dtype
    return Entry(
        name=name,
        kind=kind,
        shape=tuple(before.shape),
        number_format=str(dtype).removeprefix("torch."),
        norm_before=float(before.double().norm()),
        norm=norm,
    )
