"""How alike two images are, as the leakage value compares them."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from core.errors import InputError

# The published filter's range for grey values 0..255.
DATA_RANGE = 256.0
METRICS = ("ssim", "cosine", "norm", "ncc")


class SimMetric(abc.ABC):
    """A similarity of two images."""

    @abc.abstractmethod
    def __call__(
        self,
        source: np.ndarray | torch.Tensor,
        reference: np.ndarray | torch.Tensor,
        fl_ctx: Any = None,
        is_channel_first: bool = False,
    ) -> dict[str, float]:
        """Compare an image with a reference.

        A subclass may take less: who has no `is_channel_first` is given H x W x C arrays, and who
        has neither `source` nor `reference` the two images by their places, the reference first.

        Args:
            source: The image, values 0..255; H x W x C, or C x H x W if that is said.
            reference: The image it is compared with, of the same shape.
            fl_ctx: NVFlare's context, as far as there is one.
            is_channel_first: Whether channels stand first.

        Returns:
            A value per metric; the first one is the one that decides.
        """


class ImageSimMetric(SimMetric):
    """SSIM, correlation, cosine similarity or distance of two images.

    "ssim" is scikit-image's `structural_similarity` with its default 7 x 7 window,
    `channel_axis=-1` and `data_range=256`; "cosine" the cosine of the angle between the
    images as vectors; "norm" the Euclidean length of their difference (smaller is more
    alike); "ncc" their correlation over all values, which also fits samples that are no images.

    Args:
        metrics: A name or several; the first one decides. None: "ssim".

    Attributes:
        metrics: The names, as a list.
    """

    def __init__(self, metrics: str | Sequence[str] | None = None) -> None:
        self.metrics = [metrics] if isinstance(metrics, str) else list(metrics or ["ssim"])
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise InputError(f"metrics {metrics!r}: choose from {', '.join(METRICS)}")

    @property
    def names(self) -> list[str]:
        """The metrics as a list."""
        return self.metrics

    def __call__(
        self,
        source: np.ndarray | torch.Tensor,
        reference: np.ndarray | torch.Tensor,
        fl_ctx: Any = None,
        is_channel_first: bool = False,
    ) -> dict[str, float]:
        """See `SimMetric`. An image whose values are at most 1 counts as one in 0..1.

        Raises:
            ValueError: Two images of different shapes.
        """
        one, other = (_grey_values(image, is_channel_first) for image in (reference, source))
        if one.shape != other.shape:
            raise ValueError(f"images of shapes {one.shape} and {other.shape} differ")
        pair = _batch(one), _batch(other)
        return {name: float(_similarities(name, *pair)[0]) for name in self.metrics}


def _grey_values(image: np.ndarray | torch.Tensor, is_channel_first: bool) -> np.ndarray:
    """H x W x C of at most three channels, in 0..255, whatever range and order were given."""
    values = np.asarray(image.detach().cpu() if isinstance(image, torch.Tensor) else image)
    if is_channel_first:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3:
        raise ValueError(f"an image has height, width and channels, not shape {values.shape}")
    values = values[..., :3].astype(np.float64)
    return values * 255 if values.size and values.max() <= 1 else values


def similarity_matrix(
    metric: SimMetric, references: torch.Tensor, images: torch.Tensor
) -> dict[str, np.ndarray]:
    """Every image against every reference.

    Args:
        metric: The similarity that compares two images.
        references: N x C x H x W in [0, 1].
        images: M x C x H x W in [0, 1].

    Returns:
        N x M values by metric.
    """
    if type(metric).__call__ is ImageSimMetric.__call__:
        return {name: _matrix(name, references, images) for name in _names(metric)}
    values = [
        [compare(metric, 255 * y.double(), 255 * x.double()) for y in images] for x in references
    ]
    names = list(values[0][0]) if values and values[0] else ["similarity"]
    shape = (len(references), len(images))
    return {
        name: np.array([[v[name] for v in row] for row in values], dtype=float).reshape(shape)
        for name in names
    }


def compare(
    metric: SimMetric, source: torch.Tensor, reference: torch.Tensor, fl_ctx: Any = None
) -> dict[str, float]:
    """Call a metric, published ones included, in the way that it can be called.

    Args:
        metric: The similarity.
        source: C x H x W in 0..255, the image.
        reference: C x H x W in 0..255, what it is compared with.
        fl_ctx: NVFlare's context, for metrics that take one.

    Returns:
        A value per metric, in the order of the metric's `metrics` where it has some.
    """
    known = inspect.signature(metric).parameters
    first = "is_channel_first" in known
    pair = {"source": source, "reference": reference}
    shown: dict[str, Any] = {k: v if first else _array(v) for k, v in pair.items()}
    if not set(pair) <= set(known):
        found: Any = metric(shown["reference"], shown["source"])
    else:
        more = {"fl_ctx": fl_ctx, "is_channel_first": True}
        found = metric(**shown, **{k: v for k, v in more.items() if k in known})
    return _named(found, metric)


def _named(found: Any, metric: SimMetric) -> dict[str, float]:
    """What a metric returned, by name: a dictionary, or a value for every name it states."""
    names = getattr(metric, "metrics", None) or []
    names = [names] if isinstance(names, str) else list(names)
    if isinstance(found, Mapping):
        order = names if names and set(names) <= set(found) else found
        return {name: float(found[name]) for name in order}
    values = np.broadcast_to(np.asarray(found, dtype=float), (max(1, len(names)),))
    return dict(zip(names or ["similarity"], values.tolist(), strict=True))


def _names(metric: Any) -> list[str]:
    return metric.names


def _matrix(name: str, references: torch.Tensor, images: torch.Tensor) -> np.ndarray:
    """One call per reference: much faster than one per pair."""
    references, images = references.double() * 255, images.double() * 255
    rows = [_similarities(name, x.expand_as(images), images).numpy() for x in references]
    return np.array(rows, dtype=float).reshape(len(references), len(images))


def _similarities(name: str, references: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """One value per pair; N x C x ... in 0..255, float64."""
    if name == "ssim":
        from attack.metrics import ssim

        return ssim(images / DATA_RANGE, references / DATA_RANGE, "uniform")
    x, y = references.flatten(1), images.flatten(1)
    if name == "cosine":
        return torch.nn.functional.cosine_similarity(x, y, eps=1e-12)
    if name == "ncc":
        from attack.metrics import ncc

        return ncc(images, references)
    return (x - y).norm(dim=1)


def _batch(image: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float64))
    return values.permute(2, 0, 1)[None]


def _array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().cpu().numpy()
