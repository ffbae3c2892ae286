"""Volumes of chests, every one of another patient, for clients of three-dimensional networks."""

from __future__ import annotations

import numpy as np
import torch

from core.errors import InputError

_AIR, _TISSUE, _LUNG, _BONE, _NODULE = 0.0, 0.45, 0.12, 0.95, 0.75
# Samples of every voxel along each axis, whose mean it is.
_SAMPLES = 2


def chest_volumes(n: int, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Procedural computed tomographies of chests, and whether there is a nodule in a lung.

    Args:
        n: Number of patients.
        size: Side in voxels, 8 to 128.
        seed: Decides all patients; the first ones are the same whatever `n` is.

    Returns:
        Volumes (n x 1 x size x size x size, in [0, 1]; from head to foot, from front to back,
        from right to left) and classes (n; 1: a nodule), by turns.

    Raises:
        InputError: No patients, or an impossible size.
    """
    if n < 1 or not 8 <= size <= 128:
        raise InputError(
            f"chest volumes: {n} of {size} voxels; there must be at least one, of 8 to 128"
        )
    volumes = [
        _volume(size, bool(number % 2), np.random.default_rng((seed, number)))
        for number in range(n)
    ]
    return torch.from_numpy(np.stack(volumes))[:, None].float(), torch.arange(n) % 2


def _volume(size: int, nodule: bool, rng: np.random.Generator) -> np.ndarray:
    fine = size * _SAMPLES
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    body = rng.uniform([1.6, 0.55, 0.75], [2.2, 0.8, 0.95])
    values = np.where(_inside(grid, np.zeros(3), body), _TISSUE, _AIR)
    centres = [np.array([rng.uniform(-0.2, 0.2), -0.05, side * 0.48 * body[2]]) for side in (-1, 1)]
    for centre in centres:
        radii = body * rng.uniform([0.35, 0.6, 0.33], [0.5, 0.75, 0.42])
        values[_inside(grid, centre, radii)] = _LUNG + rng.uniform(-0.04, 0.04)
    heart = np.array([rng.uniform(0.0, 0.3), -0.2 * body[1], rng.uniform(0.0, 0.2)])
    values[_inside(grid, heart, rng.uniform(0.2, 0.34, 3))] = _TISSUE + 0.12
    spine = np.array([0.0, 0.72 * body[1], 0.0])
    values[_inside(grid, spine, np.array([4.0, 0.16, rng.uniform(0.12, 0.18)]))] = _BONE
    if nodule:
        centre = centres[rng.integers(2)] + rng.uniform(-0.12, 0.12, 3)
        values[_inside(grid, centre, np.full(3, rng.uniform(0.12, 0.2)))] = _NODULE
    return values.reshape(size, _SAMPLES, size, _SAMPLES, size, _SAMPLES).mean((1, 3, 5))


def _inside(grid: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Where an ellipsoid is (grid: 3 x D x H x W)."""
    shape = (3, 1, 1, 1)
    return (((grid - centre.reshape(shape)) / radii.reshape(shape)) ** 2).sum(0) <= 1
