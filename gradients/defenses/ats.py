"""ATS: train on images under transformations that a search found to defeat inversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.data.specs import DataSpec
from gradients.defenses.base import ClientView, InputDefense, register_defense, require

# The 50 transformations of the published library: operation and magnitude index (0 to 9).
LIBRARY = (
    ("invert", 7), ("contrast", 6), ("rotate", 2), ("translateX", 9), ("sharpness", 1),
    ("sharpness", 3), ("shearY", 2), ("translateY", 2), ("autocontrast", 5), ("equalize", 2),
    ("shearY", 5), ("posterize", 5), ("color", 3), ("brightness", 5), ("sharpness", 9),
    ("brightness", 9), ("equalize", 5), ("equalize", 1), ("contrast", 7), ("sharpness", 5),
    ("color", 5), ("translateX", 5), ("equalize", 7), ("autocontrast", 8), ("translateY", 3),
    ("sharpness", 6), ("brightness", 6), ("color", 8), ("solarize", 0), ("invert", 0),
    ("equalize", 0), ("autocontrast", 0), ("equalize", 8), ("equalize", 4), ("color", 5),
    ("equalize", 5), ("autocontrast", 4), ("solarize", 4), ("brightness", 3), ("color", 0),
    ("solarize", 1), ("autocontrast", 0), ("translateY", 3), ("translateY", 3),
    ("autocontrast", 1), ("solarize", 1), ("equalize", 5), ("invert", 0), ("translateY", 3),
    ("autocontrast", 1),
)  # fmt: skip
# The largest magnitude of an operation; index i is i / 9 of it.
LARGEST = {
    "translateX": 150 / 331, "translateY": 150 / 331, "shearY": 0.3, "rotate": 30.0,
    "color": 0.5, "contrast": 0.5, "sharpness": 0.5, "brightness": 0.5,
}  # fmt: skip
# Operations whose sign is drawn.
SIGNED = frozenset(LARGEST) - {"rotate"}
GREY = (0.299, 0.587, 0.114)
# What a rotation uncovers.
ROTATION_FILL = 128 / 255
LEVELS = 255

Step = tuple[str, float]
Steps = tuple[Step, ...]


@register_defense("ats")
@dataclass(frozen=True)
class ATS(InputDefense):
    """Train on transformed images: a policy of fixed operations, their signs drawn per image.

    Every image gets one of the policies, drawn uniformly, whose operations follow each other.
    Translations and shears go to either side, and colour, contrast, sharpness and brightness
    become stronger or weaker, each with probability one half. The policies are public: the
    search that finds them (low mutual information with the image, high accuracy) is the
    server's, and is not run here.

    Not followed: the crops and flips that the published code applies before, and 8-bit
    rounding of pixels between two operations; shears are bilinear and not bicubic.

    Args:
        policies: Numbers of `LIBRARY` joined by `-`; policies joined by `+`.

    Source: Gao et al., "Privacy-preserving Collaborative Learning with Automatic Transformation
        Search", CVPR 2021, https://arxiv.org/abs/2011.12505; 3-1-7+43-18-18 is its hybrid
        policy for a ResNet-20 on CIFAR-100; library and magnitudes as in
        https://github.com/gaow0007/ATSPrivacy.

    Published: what Inverting Gradients finds shows nothing of the private image, at nearly the
        same accuracy; Balunovic et al. (https://arxiv.org/abs/2111.04706) see the transformed
        images while the network is untrained.
    """

    policies: str = "3-1-7+43-18-18"

    def __post_init__(self) -> None:
        words = [word.split("-") for word in self.policies.split("+")]
        known = all(w.isdecimal() and int(w) < len(LIBRARY) for word in words for w in word)
        require(known, f"policies are numbers below {len(LIBRARY)} joined by - and +")

    def listed(self) -> list[list[tuple[str, int]]]:
        """Operations and magnitude indices of every policy."""
        words = [word.split("-") for word in self.policies.split("+")]
        return [[LIBRARY[int(number)] for number in word] for word in words]

    def outcomes(self) -> list[Steps]:
        """Everything that an image may be drawn, each policy with each choice of signs."""
        found: list[Steps] = []
        for policy in self.listed():
            found += _signings(policy)
        # Two operations that commute give the same image twice.
        return list(dict.fromkeys(found))

    def encode(self, client: ClientView) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, each under what was drawn for it, and their labels.

        Raises:
            InputError: Inputs are no images, or nobody says how they are normalised.
        """
        spec, images = self.images_of(client, "transforms images")
        policies = self.listed()
        rows = []
        for image in images.split(1):
            number = int(torch.randint(len(policies), (1,), generator=client.generator))
            choices = _signings(policies[number])
            drawn = int(torch.randint(len(choices), (1,), generator=client.generator))
            rows.append(transformed(image, choices[drawn]))
        return spec.normalize(torch.cat(rows)), client.labels


def _signings(policy: Sequence[tuple[str, int]]) -> list[Steps]:
    """A policy under every choice of the signs of its operations, all equally likely."""
    found: list[Steps] = [()]
    for operation, index in policy:
        size = LARGEST.get(operation, float(index)) * (index / 9 if operation in LARGEST else 1)
        signs = (1, -1) if operation in SIGNED else (1,)
        found = [(*steps, (operation, sign * size)) for steps in found for sign in signs]
    return found


def transformed(images: torch.Tensor, steps: Steps) -> torch.Tensor:
    """Apply operations one after the other.

    Args:
        images: N x C x H x W in [0, 1].
        steps: Operations and their magnitudes; of `posterize` and `solarize` the index.

    Returns:
        Images in [0, 1]; derivatives pass rounding and sorting as if these did nothing.
    """
    for operation, magnitude in steps:
        images = _OPERATIONS[operation](images, magnitude).clamp(0, 1)
    return images


def encoding(spec: DataSpec, rows: Sequence[Steps]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of normalised inputs that transforms image i by rows[i]."""

    def encode(inputs: torch.Tensor) -> torch.Tensor:
        images = spec.denormalize(inputs)
        found = [transformed(x, steps) for x, steps in zip(images.split(1), rows, strict=True)]
        return spec.normalize(torch.cat(found))

    return encode


# -- Operations ------------------------------------------------------------------------


def _translate(images: torch.Tensor, share: float, axis: int) -> torch.Tensor:
    """Whole pixels; what is uncovered is black."""
    size = images.shape[axis]
    shift = max(-size, min(size, math.floor(share * size + 0.5)))
    moved = torch.roll(images, -shift, axis)
    place = torch.arange(size, device=images.device) + shift
    inside = (place >= 0) & (place < size)
    shape = [1] * images.dim()
    shape[axis] = size
    return torch.where(inside.view(shape), moved, 0)


def _warped(images: torch.Tensor, matrix: Sequence[Sequence[float]], fill: float) -> torch.Tensor:
    """Bilinear samples at the places that a 2 x 3 matrix names in [-1, 1]."""
    theta = images.new_tensor(matrix).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, grid, align_corners=False) + fill


def _shear_y(images: torch.Tensor, amount: float) -> torch.Tensor:
    # The published code shears around the corner.
    ratio = images.shape[3] / images.shape[2]
    return _warped(images, [[1, 0, 0], [amount * ratio, 1, amount * ratio]], 0.0)


def _rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    a = math.radians(degrees)
    cosine, sine = math.cos(a), math.sin(a)
    return _warped(images, [[cosine, -sine, 0], [sine, cosine, 0]], ROTATION_FILL)


def _grey(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] != len(GREY):
        return images.mean(1, keepdim=True)
    weights = images.new_tensor(GREY).view(1, -1, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _blended(images: torch.Tensor, other: torch.Tensor, amount: float) -> torch.Tensor:
    """`amount` 0 is the image, -1 the other one, and above 0 goes away from it."""
    return other + (1 + amount) * (images - other)


def _smoothed(images: torch.Tensor) -> torch.Tensor:
    """A 3 x 3 mean with five times the weight in the middle; the border stays."""
    kernel = images.new_ones(3, 3)
    kernel[1, 1] = 5
    channels = images.shape[1]
    weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    inner = F.conv2d(images, weight, groups=channels)
    found = images.clone()
    found[:, :, 1:-1, 1:-1] = inner
    return found


def _passed(images: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """`found`, whose derivative is taken to be that of the image itself."""
    return images + (found - images).detach()


def _posterize(images: torch.Tensor, index: float) -> torch.Tensor:
    bits = round(8 - 4 * index / 9)
    step = 2 ** (8 - bits)
    return _passed(images, (images * LEVELS).floor().div(step).floor() * step / LEVELS)


def _solarize(images: torch.Tensor, index: float) -> torch.Tensor:
    threshold = (256 - 256 * index / 9) / LEVELS
    return torch.where(images < threshold, images, 1 - images)


def _autocontrast(images: torch.Tensor, _: float) -> torch.Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) / (high - low).clamp_min(1e-12)
    return torch.where(high > low, stretched, images)


def _equalize(images: torch.Tensor, _: float) -> torch.Tensor:
    """Every channel's pixels get the share of pixels that are not brighter."""
    flat = (images.detach() * LEVELS).round().flatten(2)
    ordered = flat.sort(dim=2).values
    below = torch.searchsorted(ordered, flat.contiguous(), right=True)
    return _passed(images, (below.to(images) / flat.shape[2]).view_as(images))


_OPERATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "translateX": lambda x, m: _translate(x, m, 3),
    "translateY": lambda x, m: _translate(x, m, 2),
    "shearY": _shear_y,
    "rotate": _rotate,
    "invert": lambda x, _: 1 - x,
    "contrast": lambda x, m: _blended(x, _grey(x).mean((1, 2, 3), keepdim=True), m),
    "color": lambda x, m: _blended(x, _grey(x).expand_as(x), m),
    "brightness": lambda x, m: _blended(x, torch.zeros_like(x), m),
    "sharpness": lambda x, m: _blended(x, _smoothed(x), m),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
