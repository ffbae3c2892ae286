"""The verdict on one reconstruction: per image, summarised, and beside trivial guesses."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attack.metrics.assignment import assign
from attack.metrics.identification import iip, rdlv
from attack.metrics.perceptual import load_lpips
from attack.metrics.pixels import PSNR_CAP, data_range, is_exact, mse, ncc, psnr, to_unit_range
from attack.metrics.records import (
    RECORD_METRICS,
    RecordMetric,
    assign_records,
    by_column,
    calibration,
    guesses,
)
from attack.metrics.similarity import cw_ssim, ssim
from core.data.columns import Columns
from core.errors import InputError
from core.escaping import printable
from core.target import Truth

if TYPE_CHECKING:
    import pandas
    from prettytable import PrettyTable

# One value per pair of images.
Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _ssim_uniform(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every image over uniform windows, scikit-image's default."""
    return ssim(images, originals, "uniform")


_SIMPLE: dict[str, Metric] = {
    "mse": mse,
    "psnr": psnr,
    "ssim": ssim,
    "ssim_uniform": _ssim_uniform,
    "cw_ssim": cw_ssim,
    "ncc": ncc,
}
_LPIPS = {"lpips_alex": "alex", "lpips_vgg": "vgg"}
DEFAULT_METRICS = ("mse", "psnr", "ssim", "lpips_alex", "lpips_vgg", "cw_ssim")
# Of samples that are no images, as far as the metrics fit them.
_DEFAULT_ELSEWHERE = ("mse", "psnr", "ssim", "ncc")
# Axes in space of the samples that a metric takes; of those not named: of an image alone.
_IMAGES = frozenset({2})
_DIMENSIONS = {
    "mse": frozenset({0, 1, 2, 3}),
    "psnr": frozenset({0, 1, 2, 3}),
    "ncc": frozenset({0, 1, 2, 3}),
    "ssim": frozenset({1, 2, 3}),
    "ssim_uniform": frozenset({1, 2, 3}),
    **dict.fromkeys(RECORD_METRICS, frozenset({0})),
}
# What is compared as it is; the others see values in [0, 1].
_IN_OWN_UNITS = {"mse"}
_KINDS = {-1: "text", 0: "tables", 1: "signals", 2: "images", 3: "volumes"}
_FLAT = {0: "flat row", 1: "flat signal", 2: "flat colour", 3: "flat volume"}
_SMALLER_IS_BETTER = {"mse", *_LPIPS}
_TITLES = {
    "mse": "MSE",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ssim_uniform": "SSIM (7x7)",
    "cw_ssim": "CW-SSIM",
    "lpips_alex": "LPIPS (alex)",
    "lpips_vgg": "LPIPS (vgg)",
    "ncc": "NCC",
    **{name: title for name, (_, title) in RECORD_METRICS.items()},
}
# Of sentences, see `attack.metrics.text`, with their titles and what they are in a line.
TEXT_METRICS = {
    "tokens_placed": ("tokens in place", "Share of tokens that are right in their places"),
    "tokens_found": ("tokens found", "Share of tokens that are found anywhere in the sentence"),
    "sentence_exact": ("exact sentences", "1 where every token of the sentence is right, else 0"),
    "rouge1": ("ROUGE-1", "F1 of the words that both sentences have"),
    "rouge2": ("ROUGE-2", "F1 of the pairs of words that both sentences have"),
    "rouge_l": ("ROUGE-L", "F1 of the longest common subsequence of words"),
    "edit_distance": ("edit distance", "Insertions, deletions and exchanges per token"),
}
_TITLES |= {name: title for name, (title, _) in TEXT_METRICS.items()}
_DIMENSIONS |= {name: frozenset({-1}) for name in TEXT_METRICS}
_SMALLER_IS_BETTER.add("edit_distance")
# Of a target of several values, in tables.
_SHOWN_VALUES = 4
_ADDED: list[str] = []
ONE_TO_ONE = "one-to-one"
BEST_PER_METRIC = "best match per metric"


def metric_names() -> list[str]:
    """Every metric that `evaluate` knows."""
    return [*_SIMPLE, *_LPIPS, *RECORD_METRICS, *TEXT_METRICS]


def registered_metrics() -> tuple[str, ...]:
    """The metrics that plugins have added."""
    return tuple(_ADDED)


def metric_description(name: str) -> str:
    """A metric in one line, with the samples that it takes."""
    taken = f"({_listed(_kinds(name))})"
    if name in _LPIPS:
        return f"{_TITLES[name]}: learned perceptual distance of a network's features {taken}"
    if name in TEXT_METRICS:
        return f"{_TITLES[name]}: {TEXT_METRICS[name][1]} {taken}"
    function = RECORD_METRICS[name][0] if name in RECORD_METRICS else _SIMPLE[name]
    first = (function.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"{_TITLES[name]}: {first} {taken}" if first else f"{_TITLES[name]} {taken}"


def _kinds(metric: str) -> list[str]:
    """The samples that a metric takes."""
    return [_KINDS[dims] for dims in sorted(_DIMENSIONS.get(metric, _IMAGES))]


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def metrics_for(shape: Sequence[int], columns: Columns | None = None) -> tuple[str, ...]:
    """The metrics that are measured by default, those of plugins included.

    Args:
        shape: Of one sample: C x H x W of an image, C x L of a signal, C x D x H x W of a
            volume, F of a table.
        columns: Of a table's records, where they are known.
    """
    dims = len(shape) - 1
    default = DEFAULT_METRICS if dims == 2 else _DEFAULT_ELSEWHERE
    if columns is not None:
        default = (*RECORD_METRICS, *default)
    return tuple(name for name in (*default, *_ADDED) if fits(name, dims))


def fits(metric: str, dims: int) -> bool:
    """Whether a metric takes samples of so many axes in space."""
    return dims in _DIMENSIONS.get(metric, _IMAGES)


def is_smaller_better(metric: str) -> bool:
    """Whether a smaller value of the metric means a better reconstruction."""
    return metric in _SMALLER_IS_BETTER


def metric_title(metric: str) -> str:
    """What a column of the metric's values is called."""
    return _TITLES[metric]


def register_metric(
    name: str,
    metric: Metric,
    *,
    title: str,
    smaller_is_better: bool = False,
    dimensions: Iterable[int] = _IMAGES,
) -> None:
    """Add a metric to every evaluation.

    Args:
        name: Key of the metric in records.
        metric: From reconstructions and originals (both N x C x H x W in [0, 1]) to N values.
        title: Header of the metric's column in tables.
        smaller_is_better: For the best match and for the margin over baselines.
        dimensions: Numbers of axes in space that it takes: 0 for tables (N x F), 1 for signals
            (N x C x L), 2 for images, 3 for volumes (N x C x D x H x W).

    Raises:
        ValueError: The name is taken.
    """
    if name in metric_names():
        raise ValueError(f"metric {name} is registered already")
    _SIMPLE[name] = metric
    _TITLES[name] = title
    _DIMENSIONS[name] = frozenset(dimensions)
    _ADDED.append(name)
    if smaller_is_better:
        _SMALLER_IS_BETTER.add(name)


@dataclass(repr=False)
class Evaluation:
    """What a reconstruction shows of the truth.

    Attributes:
        metrics: Names of the metrics, in the order of tables.
        matching: "one-to-one" (every reconstruction stands for one original), or
            "best match per metric" (a reconstruction may be counted many times and by
            each metric for another original: an upper bound).
        per_image: One dictionary per original: index, reconstruction, label_true,
            label_recovered, exact, and every metric (None where it is missing).
        baselines: By name, mean and std of every metric for a guess that knows nothing
            of the gradient.
        order: The reconstruction assigned to each original (N).
        missing: By metric, why it has no values.
        whole: Values of the whole batch (iip, rdlv).
        columns: Of a table, by column: the share of right cells, and that of the best guess.
    """

    metrics: tuple[str, ...]
    matching: str
    per_image: list[dict[str, Any]]
    baselines: dict[str, dict[str, dict[str, float | None]]]
    order: torch.Tensor
    missing: dict[str, str] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    columns: dict[str, dict[str, float]] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Mean and population standard deviation over the images, by metric."""
        return {m: mean_and_std([row[m] for row in self.per_image]) for m in self.metrics}

    def gain(self, metric: str = "psnr") -> float | None:
        """How much better than the best baseline the mean is; negative where a guess wins.

        None where the metric has no mean.
        """
        sign = -1.0 if metric in _SMALLER_IS_BETTER else 1.0
        mean = self.summary()[metric]["mean"]
        guesses = [values[metric]["mean"] for values in self.baselines.values()]
        known = [sign * guess for guess in guesses if guess is not None]
        return None if mean is None or not known else sign * mean - max(known)

    def to_record(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {
            "matching": self.matching,
            "per_image": self.per_image,
            "summary": self.summary(),
            "baselines": self.baselines,
            "gain_over_baselines": {metric: self.gain(metric) for metric in self.metrics},
            "batch": self.whole,
            "missing": self.missing,
            "psnr_cap": PSNR_CAP,
            **({"columns": self.columns} if self.columns else {}),
        }

    def to_table(self) -> PrettyTable:
        """One row per image, then mean, standard deviation and the baselines."""
        from prettytable import PrettyTable

        table = PrettyTable(["image", "recon.", "label", "recovered", *self._titles()])
        table.title = f"reconstruction against truth, {self.matching}"
        for row in self.per_image:
            exact = "*" if row["exact"] else ""
            cells = [_cell(m, row[m]) + (exact if m == "psnr" else "") for m in self.metrics]
            names = [row[k] for k in ("index", "reconstruction", "label_true", "label_recovered")]
            table.add_row([*map(_name_cell, names), *cells])
        table.add_divider()
        for name, values in self._summary_rows():
            table.add_row([name, "", "", "", *(_cell(m, values[m]) for m in self.metrics)])
        table.align = "r"
        return table

    def footnotes(self) -> list[str]:
        """What a reader of the table must know, one sentence each."""
        notes = [f"- {_TITLES[metric]}: {reason}" for metric, reason in self.missing.items()]
        if "psnr" in self.metrics and any(row["exact"] for row in self.per_image):
            notes.append(f"* exact match; PSNR is capped at {PSNR_CAP:g} dB")
        if self.matching == BEST_PER_METRIC:
            notes.append("best match per metric: an upper bound, reconstructions may repeat")
        notes += [f"{name.upper()}: {value:.4g}" for name, value in self.whole.items()]
        if self.columns:
            parts = (f"{c} {v['accuracy']:.2f}/{v['guess']:.2f}" for c, v in self.columns.items())
            notes.append(f"right by column, recovered/guessed: {', '.join(parts)}")
        return notes

    def render(self) -> str:
        """The table and its footnotes as text."""
        return "\n".join([self.to_table().get_string(), *self.footnotes()])

    def __repr__(self) -> str:
        return printable(self.render())

    def _repr_html_(self) -> str:
        """The table and its footnotes, as a notebook shows them."""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.footnotes())
        return self.to_table().get_html_string() + notes

    def to_frame(self) -> pandas.DataFrame:
        """One row per image, by its index: labels, whether it is exact, and every metric."""
        import pandas

        return pandas.DataFrame(self.per_image).set_index("index")

    def _titles(self) -> list[str]:
        return [_TITLES[metric] for metric in self.metrics]

    def _summary_rows(self) -> list[tuple[str, dict[str, float | None]]]:
        groups = {"": self.summary(), **self.baselines}
        return [
            (f"{name} {part}".strip(), {m: values[m][part] for m in self.metrics})
            for name, values in groups.items()
            for part in ("mean", "std")
        ]


def evaluate(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    truth: Truth,
    *,
    metrics: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    candidates: torch.Tensor | None = None,
    one_to_one: bool = True,
    mean_image: torch.Tensor | None = None,
    nearest_images: torch.Tensor | None = None,
    prior: torch.Tensor | None = None,
    lpips_weights: str | Path | None = None,
    confidence: torch.Tensor | None = None,
) -> Evaluation:
    """Compare reconstructions with what was meant to stay private.

    Args:
        images: M x C x H x W in [0, 1], M >= N, in any order; or signals (M x C x L), volumes
            (M x C x D x H x W) or rows of a table (M x F), which may have any values: PSNR,
            SSIM and "exact" then take the truth's own range for 1, see `data_range`.
        labels: M recovered labels; None where the attack recovers none.
        truth: N images in [0, 1] (or what else there is) and their labels.
        metrics: Names in `metric_names()`; None for those of `metrics_for` the truth's shape.
            One that does not take such samples has no value, and a note says why.
        device: Where to compute; the images' own if None.
        candidates: Further images for the image identification precision.
        one_to_one: One assignment on the MSE used by every metric; otherwise each
            metric takes its best reconstruction for each original, labelled so.
        mean_image: Mean of the data set, C x H x W: a second baseline.
        nearest_images: For each original the nearest image that is not the client's
            (N x C x H x W): a third one, the best guess among known images.
        prior: C x H x W in [0, 1]; adds the relative data leakage value of images.
        lpips_weights: Folder with LPIPS' weights (`--lpips-weights`).
        confidence: M x columns, of records: how sure the attack is of every cell.

    Returns:
        Per image values, summaries and baselines.

    Raises:
        InputError: Shapes that do not belong together, or an unknown metric.
    """
    columns = truth.columns
    names = metrics_for(truth.images.shape[1:], columns) if metrics is None else tuple(metrics)
    _check(images, labels, truth, names)
    device = images.device if device is None else torch.device(device)
    # Half precision would lose the metrics' small differences of large numbers.
    dtype = torch.promote_types(torch.promote_types(images.dtype, truth.images.dtype), torch.float)
    images, originals = images.to(device, dtype), truth.images.to(device, dtype)
    bounds = data_range(originals)
    functions, missing = _functions(names, originals, bounds, lpips_weights, columns)
    records, true_records = images, originals
    images, originals = to_unit_range(images, bounds), to_unit_range(originals, bounds)
    if columns is None:
        order = assign(images, originals)
    else:
        order = assign_records(columns, records, true_records)
    chosen = order if one_to_one else None
    values = {m: _values(f, m, images, originals, chosen) for m, f in functions.items()}
    found = Evaluation(
        metrics=names,
        matching=ONE_TO_ONE if one_to_one else BEST_PER_METRIC,
        per_image=_rows(names, values, truth, labels, chosen, images, originals),
        baselines=_baselines(
            names,
            functions,
            originals,
            None if mean_image is None else to_unit_range(mean_image, bounds),
            None if nearest_images is None else to_unit_range(nearest_images, bounds),
        ),
        order=order.cpu(),
        missing=missing,
        whole=_whole(images, originals, order, candidates, prior),
    )
    if columns is not None:
        guessed = guesses(columns, true_records)
        found.baselines |= _guessed(names, functions, guessed, true_records, bounds)
        found.columns = by_column(columns, records[order], true_records, guessed)
        if confidence is not None:
            sure = confidence.to(order.device)[order]
            found.whole |= calibration(columns, records[order], true_records, sure)
    return found


def _check(
    images: torch.Tensor, labels: torch.Tensor | None, truth: Truth, names: tuple[str, ...]
) -> None:
    unknown = [name for name in names if name not in metric_names()]
    if unknown:
        raise InputError(f"unknown metric {unknown[0]}; known are {', '.join(metric_names())}")
    if not 2 <= images.dim() <= 5 or images.shape[1:] != truth.images.shape[1:]:
        raise InputError(
            f"reconstructions of shape {tuple(images.shape)} cannot be compared with "
            f"true images of shape {tuple(truth.images.shape)}"
        )
    if len(images) < len(truth.images):
        raise InputError(
            f"{len(images)} reconstructions for {len(truth.images)} true images; "
            "fill up what was not recovered with a flat image"
        )
    if labels is not None and len(labels) != len(images):
        raise InputError(f"{len(labels)} labels for {len(images)} reconstructions")


def _functions(
    names: tuple[str, ...],
    originals: torch.Tensor,
    bounds: tuple[float, float],
    weights: str | Path | None,
    columns: Columns | None,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be computed from values in [0, 1], and why the others cannot."""
    dims = originals.dim() - 2
    missing = {name: _complaint(name, dims) for name in names if not fits(name, dims)}
    of_records = [name for name in names if name in RECORD_METRICS and name not in missing]
    if columns is None:
        missing |= dict.fromkeys(of_records, "it needs to know what the columns hold")
    functions = {
        name: _rescaled(_SIMPLE[name], bounds) if name in _IN_OWN_UNITS else _SIMPLE[name]
        for name in names
        if name in _SIMPLE and name not in missing
    }
    if columns is not None:
        functions |= {n: _of_records(RECORD_METRICS[n][0], columns, bounds) for n in of_records}
    side, channels = min(originals.shape[-2:]), originals.shape[1]
    for name in (n for n in names if n in _LPIPS and n not in missing):
        network, reason = load_lpips(_LPIPS[name], weights)
        if network is None:
            missing[name] = str(reason)
        elif channels not in (1, 3):
            missing[name] = f"images of {channels} channels; it takes grey or coloured ones"
        elif side < network.min_size:
            missing[name] = f"images of {side} px; it needs at least {network.min_size}"
        else:
            functions[name] = network.to(originals.device)
    return functions, missing


def _complaint(metric: str, dims: int) -> str:
    return f"it takes {_listed(_kinds(metric))}, not {_KINDS[dims]}"


def _rescaled(squares: Metric, bounds: tuple[float, float]) -> Metric:
    """A mean square of shares of a range, in the unit of the values."""
    low, high = bounds
    if (low, high) == (0.0, 1.0):
        return squares
    factor = (high - low or 1.0) ** 2
    return lambda images, originals: factor * squares(images, originals)


def _of_records(metric: RecordMetric, columns: Columns, bounds: tuple[float, float]) -> Metric:
    """A metric of records from shares of a range, as the other metrics take them."""
    low, high = bounds

    def own_units(values: torch.Tensor) -> torch.Tensor:
        return low + (high - low or 1.0) * values

    return lambda found, truth: metric(columns, own_units(found), own_units(truth))


def _guessed(
    names: tuple[str, ...],
    functions: Mapping[str, Metric],
    guessed: Mapping[str, Sequence[torch.Tensor]],
    records: torch.Tensor,
    bounds: tuple[float, float],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """What guesses from the columns' distributions get, by guess and metric."""
    originals = to_unit_range(records, bounds)

    def values(metric: str, guess: str) -> list[float | None]:
        if metric not in functions:
            return []
        drawn = (to_unit_range(one, bounds) for one in guessed[guess])
        return [v for one in drawn for v in _plain(functions[metric](one, originals))]

    return {g: {name: mean_and_std(values(name, g)) for name in names} for g in guessed}


def _values(
    metric: Metric,
    name: str,
    images: torch.Tensor,
    originals: torch.Tensor,
    order: torch.Tensor | None,
) -> list[float | None]:
    """One value per original: of its assigned reconstruction, or the best over all."""
    if order is not None:
        return _plain(metric(images[order], originals))
    every = torch.stack([metric(images, x.expand_as(images)) for x in originals])
    if name in _SMALLER_IS_BETTER:
        return _plain(every.nan_to_num(nan=math.inf).amin(1))
    return _plain(every.nan_to_num(nan=-math.inf).amax(1))


def _plain(values: torch.Tensor) -> list[float | None]:
    """Floats; None in place of NaN and infinity, which JSON does not have."""
    return [value if math.isfinite(value) else None for value in values.double().tolist()]


def _rows(
    names: tuple[str, ...],
    values: Mapping[str, list[float | None]],
    truth: Truth,
    labels: torch.Tensor | None,
    order: torch.Tensor | None,
    images: torch.Tensor,
    originals: torch.Tensor,
) -> list[dict[str, Any]]:
    n = len(originals)
    nothing: list[Any] = [None] * n
    chosen = nothing if order is None else order.tolist()
    recovered = nothing
    if labels is not None and order is not None:
        recovered = [plain_label(label) for label in labels.cpu()[order.cpu()]]
    exact = _exact(images, originals, order)
    return [
        {
            "index": i,
            "reconstruction": chosen[i],
            "label_true": plain_label(truth.labels[i]),
            "label_recovered": recovered[i],
            "exact": exact[i],
            **{name: values.get(name, nothing)[i] for name in names},
        }
        for i in range(n)
    ]


def _name_cell(name: int | float | list[int] | list[float] | None) -> str:
    """What identifies an image or its target, short enough for a table."""
    if isinstance(name, list):
        more = ", ..." if len(name) > _SHOWN_VALUES else ""
        return f"[{', '.join(f'{value:.3g}' for value in name[:_SHOWN_VALUES])}{more}]"
    if isinstance(name, float):
        return f"{name:.3g}"
    return "-" if name is None else str(name)


def plain_label(label: torch.Tensor) -> int | float | list[int] | list[float] | None:
    """A class, a value or several of them; None for what is as large as a picture."""
    if label.dim() > 1:
        return None
    plain: int | float | list[int] | list[float] = label.tolist()
    return plain


def _exact(images: torch.Tensor, originals: torch.Tensor, order: torch.Tensor | None) -> list[bool]:
    if order is not None:
        return is_exact(images[order], originals).tolist()
    return [bool(is_exact(images, x.expand_as(images)).any()) for x in originals]


def _baselines(
    names: tuple[str, ...],
    functions: Mapping[str, Metric],
    originals: torch.Tensor,
    mean_image: torch.Tensor | None,
    nearest_images: torch.Tensor | None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Guesses without a gradient: best flat colour, mean image, best image of others.

    Colours are those of every channel; the features of a table together have one.
    """
    dims = originals.dim() - 2
    axes = tuple(range(-dims, 0)) or (-1,)
    guesses = {_FLAT[dims]: originals.mean(axes, keepdim=True).expand_as(originals)}
    if mean_image is not None:
        mean = mean_image.to(originals).reshape(1, *originals.shape[1:])
        guesses["mean image"] = mean.expand_as(originals)
    if nearest_images is not None:
        guesses["best non-member"] = nearest_images.to(originals)
    nothing: list[float | None] = []
    return {
        name: {
            m: mean_and_std(_plain(functions[m](guess, originals)) if m in functions else nothing)
            for m in names
        }
        for name, guess in guesses.items()
    }


def _whole(
    images: torch.Tensor,
    originals: torch.Tensor,
    order: torch.Tensor,
    candidates: torch.Tensor | None,
    prior: torch.Tensor | None,
) -> dict[str, float]:
    whole = {"iip": iip(images, originals, candidates, order=order)}
    if prior is not None and originals.dim() == 4:
        leaked = rdlv(images, originals, prior.to(originals))
        if leaked.isfinite().any():
            whole["rdlv"] = float(leaked[leaked.isfinite()].max())
    return whole


def mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """None where there is no value, or where an image has none (a diverged reconstruction)."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return {"mean": None, "std": None}
    mean = sum(numbers) / len(numbers)
    variance = sum((value - mean) ** 2 for value in numbers) / len(numbers)
    return {"mean": mean, "std": math.sqrt(variance)}


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if metric == "psnr" else f"{value:.4f}"
