"""What a plausible image looks like: penalties on the reconstruction itself.

Every regulariser takes network inputs (normalised: images N x C x H x W, signals N x C x L,
volumes N x C x D x H x W, tables N x F) and returns one value per image, so that restarts and
shards can be combined exactly. What compares neighbours counts every axis of space alike; a
table has no such axis and no neighbours.
"""

from __future__ import annotations

import abc
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from attack.priors.watched_layers import smooth_norm, watch_layers
from attack.settings import setting_error
from core.errors import InputError
from core.processes import distributed
from core.target import BatchStatistics, Target

# Under the square root of isotropic variants: its slope at 0 is infinite.
SMOOTHING = 1e-8


class Regularizer(abc.ABC):
    """A penalty on images."""

    @abc.abstractmethod
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Penalty per image.

        Args:
            images: N x C x H x W, or of another number of axes in space.

        Returns:
            N values.
        """


class AnisotropicTV(Regularizer):
    """Mean absolute difference of neighbouring pixels, summed over the axes: across plus down.

    Source: the total variation of Inverting Gradients (Geiping et al. 2020), section 4,
    https://arxiv.org/abs/2003.14053.
    """

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        dims = len(_axes_of_space(images))
        straight = [step for step in _half_of_neighbours(dims) if sum(map(abs, step)) == 1]
        jumps = [_differences_along(images, step).abs() for step in straight]
        means = [jump.mean(_axes_of_one(images)) for jump in jumps]
        return sum(means[1:], means[0])


class IsotropicTV(Regularizer):
    """Mean length of the image gradient.

    Args:
        double_opponents: Also penalise the differences between each channel and the one
            before it in a circle (the three pairs of three colours), which couples their
            edges. Two channels have one pair, and one channel has none. The channels of
            signals and volumes are colours only where there are three of them; other
            channels (leads, sequences) have no such pairs.

    Source: Rudin, Osher, Fatemi, Physica D 60, 1992; double opponents: Aastroem et al.
    as used by Geiping's `breaching`, https://github.com/JonasGeiping/breaching.
    """

    def __init__(self, double_opponents: bool = False) -> None:
        self.double_opponents = double_opponents

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        channels = images.shape[1]
        coloured = channels == 3 or (channels > 1 and images.dim() == 4)
        if self.double_opponents and coloured:
            pairs = images - images.roll(1, dims=1)
            # The second pair of two channels is the first one with another sign.
            images = torch.cat([images, pairs if channels > 2 else pairs[:, :1]], dim=1)
        squares = [_differences(images, axis).square() for axis in _axes_of_space(images)]
        lengths = (sum(squares[1:], squares[0]) + SMOOTHING).sqrt()
        return lengths.mean(_axes_of_one(images))


class NormTV(Regularizer):
    """Euclidean lengths of the differences to the neighbours across, down and on both diagonals.

    Sums over all pixels, not means: weights are far smaller than for the other kinds.
    The original takes one norm over the whole batch, which for equally rough images is
    sqrt(N) times the mean over images that this gives. A signal has one such neighbour, and
    a volume 13.

    Source: DeepInversion (Yin et al. 2020), section 3.1, https://arxiv.org/abs/1912.08795,
    as its authors use it in GradInversion and in the attack of Hatamizadeh et al. (2022).
    """

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        dims = len(_axes_of_space(images))
        norms = [_image_norm(_differences_along(images, way)) for way in _half_of_neighbours(dims)]
        return torch.stack(norms).sum(0)


def _axes_of_space(images: torch.Tensor) -> range:
    """The axes behind batch and channels, from the last on.

    Raises:
        InputError: There is none: the images are rows of a table.
    """
    if images.dim() < 3:
        raise InputError("a table has no neighbouring values, and so no total variation")
    return range(-1, 1 - images.dim(), -1)


def _axes_of_one(images: torch.Tensor) -> tuple[int, ...]:
    """All axes of one image."""
    return tuple(range(1, images.dim()))


def _differences(images: torch.Tensor, axis: int) -> torch.Tensor:
    """Differences along one axis (counted from the end), of the images' shape.

    Those over the border are 0, so that the last row and column count as well.
    """
    return F.pad(images.diff(dim=axis), (*(0, 0) * (-axis - 1), 0, 1))


def _half_of_neighbours(dims: int) -> list[tuple[int, ...]]:
    """Steps to the neighbours of an entry, one of each two opposite ones; straight ones first."""
    steps = itertools.product((0, -1, 1), repeat=dims)
    half = [step for step in steps if next((s for s in step if s), 0) == 1]
    return sorted(half, key=lambda step: sum(map(abs, step)))


def _differences_along(images: torch.Tensor, step: tuple[int, ...]) -> torch.Tensor:
    """Every entry's neighbour in a direction minus the entry, where both exist."""
    to = {0: slice(None), 1: slice(1, None), -1: slice(None, -1)}
    there = tuple(to[s] for s in (0, 0, *step))
    here = tuple(to[-s] for s in (0, 0, *step))
    return images[there] - images[here]


class InputNorm(Regularizer):
    """Euclidean norm of the normalised input.

    Source: the l2 term of GradInversion (Yin et al. 2021), eq. 9,
    https://arxiv.org/abs/2104.07586.
    """

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        return _image_norm(images)


class PatchPrior(Regularizer):
    """Jumps at the borders of a vision transformer's patches.

    Args:
        patch: Side of a patch in pixels.

    Source: GradViT (Hatamizadeh et al. 2022), eq. 5, https://arxiv.org/abs/2203.11894.
    """

    def __init__(self, patch: int) -> None:
        self.patch = patch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        jumps = [images.new_zeros(images.shape[0])]
        for axis in _axes_of_space(images):
            behind = self._borders(images.shape[axis], images.device)
            if len(behind):
                step = images.index_select(axis, behind) - images.index_select(axis, behind - 1)
                jumps.append(step.square().mean(_axes_of_one(images)))
        return sum(jumps[1:], jumps[0])

    def _borders(self, side: int, device: torch.device) -> torch.Tensor:
        """Index of the first pixel behind every border."""
        return torch.arange(self.patch, max(side, self.patch), self.patch, device=device)


class ColourPrior(Regularizer):
    """Squared distance of an image's mean colour from the data set's (0 when normalised)."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        return images.mean(tuple(_axes_of_space(images))).square().mean(-1)


class GroupConsistency(Regularizer):
    """Distance to a consensus of the restarts.

    Args:
        consensus: Of the images' shape: the mean over restarts, or E2EGI's fusion.
        squared: Mean squared difference (E2EGI) instead of the Euclidean norm.

    Source: GradInversion (Yin et al. 2021), eq. 11, https://arxiv.org/abs/2104.07586;
    squared: E2EGI (Li et al. 2022), https://doi.org/10.1109/JBHI.2022.3204455.
    """

    def __init__(self, consensus: torch.Tensor, squared: bool = True) -> None:
        self.consensus = consensus
        self.squared = squared

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        difference = images - self.consensus
        return (
            difference.square().mean(_axes_of_one(images))
            if self.squared
            else _image_norm(difference)
        )


class EpochOrderPrior(Regularizer):
    """The images of different local epochs are the same set, in whatever order.

    Features of a random convolution are reduced by a maximum over each epoch's images,
    which does not depend on their order; the prior is the mean squared difference over
    all pairs of epochs. Every image gets the value of the whole.

    Args:
        epochs: The batch holds so many copies of the data, one epoch after the other.
        channels: Number of the images' channels.
        seed: Seed of the convolution's random weights.
        features: Number of the convolution's output channels.
        dims: Number of axes in space; without any, the convolution is one matrix.

    Source: Dimitrov et al., Data Leakage in Federated Averaging, TMLR 2022, section 4.2,
    https://openreview.net/forum?id=e7A0B99zJf; `l2_max_conv` of its code.
    """

    def __init__(
        self, epochs: int, channels: int, seed: int = 0, features: int = 96, dims: int = 2
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        kernel = torch.randn((features, channels, *[3] * dims), generator=generator)
        self.epochs = epochs
        self.kernel = kernel / math.sqrt(3**dims * channels)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Regularizer`."""
        features = self._features(images, self.kernel.to(images))
        of_epochs = torch.stack([part.amax(0) for part in features.chunk(self.epochs)])
        # Over all pairs, the mean squared difference is twice the variance.
        value = 2 * of_epochs.var(0, unbiased=False).mean()
        return value.expand(len(images))

    @staticmethod
    def _features(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        if images.dim() == 2:
            return F.linear(images, kernel)
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[images.dim()]
        return convolve(images, kernel, padding=1)


TOTAL_VARIATIONS: dict[str, Callable[[], Regularizer]] = {
    "anisotropic": AnisotropicTV,
    "isotropic": IsotropicTV,
    "double-opponents": lambda: IsotropicTV(double_opponents=True),
    "norm": NormTV,
}


# Watches one forward pass of a model; what it returns gives the penalty after that pass.
ModelPenalty = Callable[[torch.nn.Module], Callable[[], torch.Tensor]]


@runtime_checkable
class TransferablePenalty(Protocol):
    """A penalty that can be made anew for what another target tells."""

    def __call__(self, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        """See `ModelPenalty`."""

    def known_tensors(self) -> list[torch.Tensor]:
        """What the target tells, in a fixed order."""

    def knowing(self, tensors: Sequence[torch.Tensor]) -> TransferablePenalty:
        """The same penalty with other values of `known_tensors`."""


class BatchNormPenalty:
    """Distance of the candidate batch's BatchNorm statistics from known ones.

    Sum over layers of |mean - known mean|_2 + |variance - known variance|_2, where the
    statistics are those of each BatchNorm group (a shard of the client) or, synchronised
    over processes, of the whole batch.

    Args:
        known: One set of statistics per group of this process; or one for all.
        groups: Images of this process per group.
        synchronized: Whether one batch is spread over the processes. Otherwise every
            process has groups of its own.
        counted: Whether each group's statistics are known at all; default: they are.

    Source: DeepInversion (Yin et al. 2020), eq. 4, https://arxiv.org/abs/1912.08795;
    GradInversion (2021), eq. 10.
    """

    def __init__(
        self,
        known: list[BatchStatistics],
        groups: list[int],
        synchronized: bool = False,
        counted: list[bool] | None = None,
    ) -> None:
        self.known = known
        self.groups = groups
        self.synchronized = synchronized
        self._counted = counted or [True] * len(groups)
        # Processes add their penalties up; the sum is the mean over all known groups.
        device = next(iter(known[0].values()))[0].device
        parts = distributed.all_reduce(torch.tensor(float(sum(self._counted)), device=device))
        self._parts = float(parts)

    def __call__(self, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        """Watch one forward pass of `model`; the result gives the penalty after it."""
        return watch_layers(model, self.known[0], self._distance)

    def known_tensors(self) -> list[torch.Tensor]:
        """See `TransferablePenalty`."""
        return [t for group in self.known for pair in group.values() for t in pair]

    def knowing(self, tensors: Sequence[torch.Tensor]) -> BatchNormPenalty:
        """See `TransferablePenalty`."""
        told, other = iter(tensors), copy.copy(self)
        other.known = [{name: (next(told), next(told)) for name in group} for group in self.known]
        return other

    def _distance(self, name: str, features: torch.Tensor) -> torch.Tensor:
        dims = [0, *range(2, features.dim())]
        terms = []
        for index, group in enumerate(features.split(self.groups)):
            known_mean, known_var = self.known[min(index, len(self.known) - 1)][name]
            mean, var = self._moments(group, dims)
            weight = float(self._counted[index])
            terms += [
                weight * smooth_norm(mean - known_mean),
                weight * smooth_norm(var - known_var),
            ]
        return torch.stack(terms).sum() / self._parts

    def _moments(self, x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.synchronized or distributed.world_size() == 1:
            return x.mean(dims), x.var(dims, unbiased=False)
        from core.models.batch_norm import batch_moments

        whole = batch_moments(x)
        return whole.mean, whole.var


class MovingAveragePenalty:
    """Distance of the candidate's running statistics after several local steps from known ones.

    As `BatchNormPenalty`, but what is compared is the average over the client's local
    steps that its running statistics have taken: step k of K counts with
    m (1 - m)^(K - 1 - k), m being the layer's momentum. The steps' own statistics can't
    be told apart.

    Args:
        known: Average mean and average unbiased variance, per layer.
        momentum: Momentum of each BatchNorm layer, by module name.
        processes: Of the client; every step is a forward pass for each of them, and the
            first one's statistics are the known ones.
    """

    def __init__(
        self, known: BatchStatistics, momentum: Mapping[str, float], processes: int = 1
    ) -> None:
        self.known, self.momentum, self.processes = known, momentum, processes

    def __call__(self, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        """Watch the forward passes of `model`; the result gives the penalty after them."""
        passes: dict[str, list[torch.Tensor]] = {name: [] for name in self.known}
        modules = dict(model.named_modules())

        def watch(seen: list[torch.Tensor]) -> Callable[..., None]:
            def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                seen.append(_mean_and_variance(inputs[0]))

            return hook

        handles = [modules[n].register_forward_pre_hook(watch(passes[n])) for n in passes]

        def total() -> torch.Tensor:
            for handle in handles:
                handle.remove()
            terms = [self._distance(name, seen) for name, seen in passes.items()]
            return torch.stack(terms).sum()

        return total

    def _distance(self, name: str, seen: list[torch.Tensor]) -> torch.Tensor:
        steps = torch.stack(seen[:: self.processes])
        keep = 1 - self.momentum[name]
        weights = keep ** torch.arange(len(steps) - 1, -1, -1).to(steps)
        mean, variance = torch.einsum("k,ksc->sc", weights / weights.sum(), steps)
        known_mean, known_variance = self.known[name]
        return smooth_norm(mean - known_mean) + smooth_norm(variance - known_variance)


def _mean_and_variance(features: torch.Tensor) -> torch.Tensor:
    """Mean and unbiased variance per channel, 2 x C."""
    dims = [0, *range(2, features.dim())]
    return torch.stack([features.mean(dims), features.var(dims, unbiased=True)])


def _image_norm(images: torch.Tensor) -> torch.Tensor:
    """Euclidean norm per image with a finite slope at 0."""
    return (images.square().sum(_axes_of_one(images)) + torch.finfo(images.dtype).tiny).sqrt()


class FeaturePenalty:
    """Distance of each image's deep features from those that the gradient gives away.

    Row y of the last layer's weight gradient divided by entry y of its bias gradient is
    the feature vector of the image with label y, if no other image has that label.

    Args:
        features: n x F, one row per image of this process.
        batch_size: Images of all processes.
        layer: Name of the last layer.

    Source: the feature regularisation of Geiping's `breaching`,
    https://github.com/JonasGeiping/breaching; the quotient: Geiping et al. (2020),
    proposition 3.1, https://arxiv.org/abs/2003.14053.
    """

    def __init__(self, features: torch.Tensor, batch_size: int, layer: str) -> None:
        self.features, self.layer = features, layer
        self.batch_size = batch_size

    def __call__(self, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        """Watch one forward pass of `model`; the result gives the penalty after it."""
        seen: list[torch.Tensor] = []
        layer = model.get_submodule(self.layer)
        handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

        def total() -> torch.Tensor:
            handle.remove()
            return (seen[0] - self.features).square().mean(1).sum() / self.batch_size

        return total

    def known_tensors(self) -> list[torch.Tensor]:
        """See `TransferablePenalty`."""
        return [self.features]

    def knowing(self, tensors: Sequence[torch.Tensor]) -> FeaturePenalty:
        """See `TransferablePenalty`."""
        return FeaturePenalty(tensors[0], self.batch_size, self.layer)


def shared_features(target: Target, labels: torch.Tensor, layer: str) -> torch.Tensor:
    """The features that the last layer's gradient gives away for each label.

    Args:
        target: What the client shared.
        labels: n class indices.
        layer: Name of the last layer, see `core.models.head`.

    Returns:
        n x F; zeros where the bias gradient of a label is zero.

    Raises:
        InputError: The last layer's weight and bias gradients were not both shared.
    """
    weight = target.gradient.get(f"{layer}.weight".lstrip("."))
    bias = target.gradient.get(f"{layer}.bias".lstrip("."))
    if weight is None or bias is None:
        raise setting_error(
            f"{{features}}: needs the gradients of {layer}.weight and {layer}.bias, which are not "
            "both shared; leave it out"
        )
    labels = labels.to(weight.device)
    rows, slopes = weight[labels], bias[labels][:, None]
    return torch.where(slopes == 0, torch.zeros_like(rows), rows / slopes)


def weighted_penalty(parts: Sequence[tuple[float, ModelPenalty]]) -> ModelPenalty:
    """The weighted sum of several penalties, from the same forward pass."""

    def watch(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        totals = [(weight, penalty(model)) for weight, penalty in parts]
        return lambda: torch.stack([weight * total() for weight, total in totals]).sum()

    return watch
