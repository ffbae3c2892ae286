"""Errors of single pixels (or other values): MSE, PSNR and NCC."""

from __future__ import annotations

import torch

# Beyond this the error is below what 8 or even 16 bits can show, and a mean of
# decibels would only tell how many zeros a rounding left.
PSNR_CAP = 100.0
# Rounding of a normalisation that was undone.
UNIT_TOLERANCE = 1e-4


def mse(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every image (N), images N x C x H x W (or any N x ...)."""
    return (images - originals).square().flatten(1).mean(1)


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every image in dB: -10 log10(MSE), peak 1.

    Args:
        images: N x C x H x W in [0, 1], or any other N x ... in [0, 1]; values without
            bounds are brought there by the range of the originals (`data_range`).
        originals: The same shape.

    Returns:
        N values, at most `PSNR_CAP`: an exact match is finite; `is_exact` flags it.
    """
    floor = 10 ** (-PSNR_CAP / 10)
    return -10 * torch.log10(mse(images, originals).clamp_min(floor))


def ncc(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Normalised cross-correlation of every image: Pearson's r over all its values.

    It does not depend on brightness and contrast, and needs no range of the values.

    Args:
        images: N x ..., of any number of axes.
        originals: The same shape.

    Returns:
        N values in [-1, 1]; 0 where one of the two is constant.
    """
    x, y = images.flatten(1), originals.flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    lengths = x.norm(dim=1) * y.norm(dim=1)
    return (x * y).sum(1) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


def data_range(originals: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest value that PSNR and SSIM count with.

    Args:
        originals: The truth, of any shape.

    Returns:
        0 and 1 if the originals lie there, as images do. Otherwise (features of a table,
        signals in units of their own) the smallest and the largest value of all originals.
    """
    low, high = float(originals.min()), float(originals.max())
    # Written so that NaN counts as an image of [0, 1].
    return (low, high) if low < -UNIT_TOLERANCE or high > 1 + UNIT_TOLERANCE else (0.0, 1.0)


def to_unit_range(values: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    """Values as shares of a range: its smallest value becomes 0, its largest 1."""
    low, high = bounds
    if (low, high) == (0.0, 1.0):
        return values
    # Originals that are all alike have no range; their distances keep their unit.
    return (values - low) / (high - low or 1.0)


def is_exact(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Whether the PSNR of an image is at the cap (N booleans)."""
    return mse(images, originals) <= 10 ** (-PSNR_CAP / 10)
