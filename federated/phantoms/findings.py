"""Chest phantoms with several findings each, for clients of multi-label losses."""

from __future__ import annotations

import numpy as np
import torch

from core.errors import InputError
from federated.phantoms.anatomy import chest_radiograph, draw_anatomy

FINDINGS = ("opacity", "wide heart", "overlaying tissue")
# Half width of the heart in half widths of the rib cage; about half of all patients lie above.
WIDE_HEART = 0.46


def chest_phantoms(n: int, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Procedural chest radiographs, every one of another patient, and what is to be seen.

    Args:
        n: Number of patients.
        size: Side in pixels, 16 to 512.
        seed: Decides all patients; the first ones are the same whatever `n` is.

    Returns:
        Images (n x 1 x size x size, in [0, 1]) and findings (n x 3, 0 or 1): lung opacity,
        wide heart, overlaying soft tissue.

    Raises:
        InputError: No patients, or an impossible size.
    """
    if n < 1 or not 16 <= size <= 512:
        raise InputError(
            f"chest phantoms: {n} of {size} pixels; there must be at least one, of 16 to 512"
        )
    patients = [_patient(size, [seed, number]) for number in range(n)]
    images = np.stack([picture for picture, _ in patients])
    findings = torch.tensor([found for _, found in patients]).float()
    return torch.from_numpy(images)[:, None].float() / 255, findings


def _patient(size: int, seed: list[int]) -> tuple[np.ndarray, list[bool]]:
    # Anatomy is what a patient's generator draws first: another one like it gives the same.
    body = draw_anatomy(np.random.default_rng(seed))
    opacities = bool(np.random.default_rng([*seed, 1]).random() < 0.5)
    picture = chest_radiograph(size, opacities, np.random.default_rng(seed))
    return picture, [opacities, body.heart[2] / body.width > WIDE_HEART, body.breast > 0]
