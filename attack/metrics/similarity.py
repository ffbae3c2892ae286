"""Structural similarity, in the image and in the complex wavelet domain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.errors import InputError

# Images are taken in pieces that stay in the processor's cache: three times faster.
_ELEMENTS_PER_PIECE = 1 << 17

# Planes interleaved for a depthwise convolution: the widest vector register in float32.
_LANES = 16


@dataclass(frozen=True)
class SsimVariant:
    """A named definition of the SSIM.

    Attributes:
        window: Side of the window in pixels.
        sigma: Standard deviation of the Gaussian window; None for a uniform one.
        sample_covariance: Whether (co)variances are divided by n - 1.
    """

    window: int
    sigma: float | None
    sample_covariance: bool

    def weights(self, side: int) -> tuple[float, ...]:
        """One-dimensional window, shortened to the largest odd length that fits `side`."""
        length = min(self.window, side - 1 + side % 2)
        if self.sigma is None:
            return (1 / length,) * length
        offsets = range(-(length // 2), length // 2 + 1)
        values = [math.exp(-0.5 * (k / self.sigma) ** 2) for k in offsets]
        return tuple(v / sum(values) for v in values)


SSIM_VARIANTS = {
    # Wang et al. (2004); scikit-image with gaussian_weights, sigma 1.5, population covariance.
    "gaussian": SsimVariant(window=11, sigma=1.5, sample_covariance=False),
    # scikit-image's default.
    "uniform": SsimVariant(window=7, sigma=None, sample_covariance=True),
}


def ssim(images: torch.Tensor, originals: torch.Tensor, variant: str = "gaussian") -> torch.Tensor:
    """Structural similarity of every image: mean over windows inside the image and channels.

    Without a derivative.

    Args:
        images: N x C x H x W in [0, 1] (data range 1); signals N x C x L and volumes
            N x C x D x H x W are compared over windows of as many axes.
        originals: The same shape.
        variant: A name in `SSIM_VARIANTS`: "gaussian" is the standard one (11 x 11
            Gaussian, sigma 1.5), "uniform" scikit-image's default (7 x 7). On images
            smaller than the window, the window is the largest odd one that fits.

    Returns:
        N values in [-1, 1].

    Raises:
        InputError: Unknown variant, or rows of a table, which have no windows.

    Source:
        Wang, Bovik, Sheikh, Simoncelli, Image Quality Assessment: From Error
        Visibility to Structural Similarity, 2004, eq. 13,
        https://doi.org/10.1109/TIP.2003.819861.
    """
    if variant not in SSIM_VARIANTS:
        raise InputError(f"unknown SSIM variant {variant}; known are {', '.join(SSIM_VARIANTS)}")
    n, channels, *size = images.shape
    if not size:
        raise InputError("the SSIM compares windows of neighbours, and a table has none")
    axes = tuple(SSIM_VARIANTS[variant].weights(side) for side in size)
    entries = math.prod(map(len, axes))
    sample = SSIM_VARIANTS[variant].sample_covariance and entries > 1
    window = _Window(axes, entries / (entries - 1) if sample else 1.0)
    x, y = images.detach().flatten(0, 1), originals.detach().flatten(0, 1)
    lanes = len(size) == 2 and _convolves_lanes(x) and _convolves_lanes(y)
    interleaved = len(x) - len(x) % _LANES if lanes else 0
    totals = [
        _sums_of_interleaved_planes(x[:interleaved], y[:interleaved], window),
        _sums_of_planes(x[interleaved:], y[interleaved:], window),
    ]
    positions = math.prod(side - len(w) + 1 for side, w in zip(size, axes, strict=True))
    return torch.cat(totals).view(n, channels).mean(1) / positions


@dataclass(frozen=True)
class _Window:
    """Weights along every axis, and the factor that corrects (co)variances."""

    axes: tuple[tuple[float, ...], ...]
    unbiased: float


def _convolves_lanes(planes: torch.Tensor) -> bool:
    # Elsewhere sums of shifted copies: on a GPU a convolution would round to TF32, under autocast
    # to bf16, and the variances, small differences of large numbers, would be lost; without
    # oneDNN it is slow.
    return (
        planes.device.type == "cpu"
        and planes.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _sums_of_planes(x: torch.Tensor, y: torch.Tensor, window: _Window) -> torch.Tensor:
    """Sums of the similarity over the windows of every plane, by sums of shifted copies.

    A plane is one channel: of a signal a line, of a volume a block.
    """
    if not len(x):
        return x.new_empty(0)
    piece = max(1, _ELEMENTS_PER_PIECE // x[0].numel())
    sums = []
    for a, b in zip(x.split(piece), y.split(piece), strict=True):
        moments = torch.stack([a, b, a * a + b * b, a * b])
        for axis, weights in enumerate(window.axes, start=-len(window.axes)):
            moments = _slide(moments, weights, axis)
        sums.append(_similarities(moments, window.unbiased).flatten(1).sum(1))
    return torch.cat(sums)


def _sums_of_interleaved_planes(x: torch.Tensor, y: torch.Tensor, window: _Window) -> torch.Tensor:
    """The same for multiples of `_LANES` planes, by convolutions: twice as fast.

    The planes' pixels are interleaved, as channels are in channels-last memory, so that a
    depthwise convolution takes one plane per lane of a vector register and keeps its sums there.
    """
    if not len(x):
        return x.new_empty(0)
    planes, height, width = x.shape
    down, across = window.axes
    margin = len(down) - 1
    # A piece is some rows of one group of planes, or all rows of several groups.
    lines = 2 * _ELEMENTS_PER_PIECE // (_LANES * width)
    rows = min(max(1, lines - margin), height - margin)
    groups = max(1, lines // (rows + margin))
    vertical = x.new_tensor(down).view(1, 1, -1, 1).expand(_LANES, 1, -1, 1)
    horizontal = x.new_tensor(across).view(1, 1, 1, -1).expand(_LANES, 1, 1, -1)
    sums = x.new_zeros(planes)
    for first in range(0, planes, groups * _LANES):
        chosen = slice(first, first + groups * _LANES)
        for row in range(0, height - margin, rows):
            a, b = (v[chosen, row : row + rows + margin] for v in (x, y))
            moments = x.new_empty(4, len(a) // _LANES, *a.shape[1:], _LANES)
            _interleave(a, moments[0])
            _interleave(b, moments[1])
            torch.mul(moments[0], moments[0], out=moments[2]).addcmul_(moments[1], moments[1])
            torch.mul(moments[0], moments[1], out=moments[3])
            means = F.conv2d(moments.flatten(0, 1).permute(0, 3, 1, 2), vertical, groups=_LANES)
            means = F.conv2d(means, horizontal, groups=_LANES)
            means = means.permute(0, 2, 3, 1).unflatten(0, (4, -1)).flatten(2, 3)
            sums[chosen] += _similarities(means, window.unbiased).sum(1).flatten()
    return sums


def _interleave(planes: torch.Tensor, out: torch.Tensor) -> None:
    """Planes (n x rows x columns) pixel by pixel: n / L x rows x columns x L, L = `_LANES`."""
    n, rows, columns = planes.shape
    size = rows * columns
    # Planes at distances of powers of two fall on the same few lines of the cache, and would
    # push each other out: first they are laid a little further apart.
    apart = planes.new_empty(n, size + _LANES)[:, :size]
    apart.unflatten(1, (rows, columns)).copy_(planes)
    out.view(-1, size, _LANES).copy_(apart.unflatten(0, (-1, _LANES)).transpose(1, 2))


def _similarities(moments: torch.Tensor, unbiased: float) -> torch.Tensor:
    """Luminance times structure from windowed means of x, y, x^2 + y^2 and xy, which it uses up."""
    mean_x, mean_y, squares, product = moments.unbind()
    mean_product, mean_squares = mean_x * mean_y, mean_x.square().add_(mean_y.square())
    # In place: fresh memory for every step would not stay in the cache.
    variances = squares.sub_(mean_squares).mul_(unbiased)
    covariance = product.sub_(mean_product).mul_(unbiased)
    c1, c2 = 0.01**2, 0.03**2
    luminance = mean_product.mul_(2).add_(c1).div_(mean_squares.add_(c1))
    structure = covariance.mul_(2).add_(c2).div_(variances.add_(c2))
    return luminance.mul_(structure)


def _slide(images: torch.Tensor, weights: tuple[float, ...], dim: int) -> torch.Tensor:
    """Weighted means over every window that lies inside the image."""
    length = images.shape[dim] - len(weights) + 1
    result = images.narrow(dim, 0, length) * weights[0]
    for shift, weight in enumerate(weights[1:], start=1):
        result.add_(images.narrow(dim, shift, length), alpha=weight)
    return result


def cw_ssim(
    images: torch.Tensor,
    originals: torch.Tensor,
    *,
    levels: int = 4,
    orientations: int = 8,
    window: int = 7,
    stabiliser: float = 1e-6,
) -> torch.Tensor:
    """Complex wavelet structural similarity, tolerant of small shifts and rotations.

    Args:
        images: N x C x H x W in [0, 1].
        originals: The same shape.
        levels: Octaves of the steerable pyramid; fewer where the image is too small.
        orientations: Orientations of each octave.
        window: Side of the window in coefficients.
        stabiliser: The constant K of the paper, for images in [0, 1].

    Returns:
        N values in [0, 1], the mean over channels, octaves, orientations and windows.

    Source:
        Sampat, Wang, Gupta, Bovik, Markey, Complex Wavelet Structural Similarity: A
        New Image Similarity Index, 2009, eq. 5, https://doi.org/10.1109/TIP.2009.2025923;
        pyramid: Portilla and Simoncelli, A Parametric Texture Model, IJCV 2000.

    Raises:
        InputError: Signals, volumes or tables.
    """
    if images.dim() != 4:
        raise InputError("the CW-SSIM filters in two dimensions, and takes N x C x H x W images")
    total = torch.zeros(len(images), dtype=images.dtype, device=images.device)
    x, y = torch.fft.fft2(images), torch.fft.fft2(originals)
    octaves = _octaves(images.shape[-2], images.shape[-1], levels, window)
    for octave in range(octaves):
        for orientation in range(orientations):
            band = _band(x, orientation, orientations)
            a, b = torch.fft.ifft2(x * band), torch.fft.ifft2(y * band)
            total += _coefficient_similarity(a, b, window, stabiliser)
        if octave + 1 < octaves:
            x, y = _half(x), _half(y)
    return total / (octaves * orientations)


def _octaves(height: int, width: int, levels: int, window: int) -> int:
    """As many octaves as leave the coarsest band at least one whole window wide."""
    fitting = int(math.log2(max(1.0, min(height, width) / window))) + 1
    return max(1, min(levels, fitting))


def _band(spectrum: torch.Tensor, orientation: int, orientations: int) -> torch.Tensor:
    """Frequency response of one oriented, one-sided (hence complex) pass band.

    Raised cosine over an octave in radius, centred at half the Nyquist frequency, and
    a power of a cosine in angle.
    """
    real = spectrum.real
    options = {"dtype": real.dtype, "device": real.device}
    fy = torch.fft.fftfreq(real.shape[-2], **options).view(-1, 1)
    fx = torch.fft.fftfreq(real.shape[-1], **options).view(1, -1)
    octave = torch.log2((fx.square() + fy.square()).sqrt().clamp_min(1e-9) / 0.25)
    radial = torch.cos(octave.clamp(-1, 1) * math.pi / 2)
    angle = torch.atan2(fy, fx) - math.pi * orientation / orientations
    one_sided = torch.cos(angle).clamp_min(0) ** (orientations - 1)
    return radial * one_sided


def _half(spectrum: torch.Tensor) -> torch.Tensor:
    """The lower half of the frequencies: the image at half the resolution."""
    for dim in (-2, -1):
        n = spectrum.shape[dim]
        kept = n // 2
        low = spectrum.narrow(dim, 0, (kept + 1) // 2)
        high = spectrum.narrow(dim, n - kept // 2, kept // 2)
        # Fewer points in the inverse transform's mean: keep the scale of the grey values.
        spectrum = torch.cat([low, high], dim) * (kept / n)
    return spectrum


def _coefficient_similarity(
    a: torch.Tensor, b: torch.Tensor, window: int, stabiliser: float
) -> torch.Tensor:
    side = min(window, *a.shape[-2:])
    product = a * b.conj()
    energy = a.abs().square() + b.abs().square()
    sums = [F.avg_pool2d(m, side, stride=1) * side**2 for m in (product.real, product.imag, energy)]
    similarity = 2 * torch.hypot(sums[0], sums[1]) + stabiliser
    return (similarity / (sums[2] + stabiliser)).flatten(1).mean(1)
