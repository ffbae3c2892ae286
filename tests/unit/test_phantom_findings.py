"""Chest phantoms with several findings: each is in the picture, and patients stay the same."""

from __future__ import annotations

import pytest
import torch

import gradinvbench as gib
from core.errors import InputError


def test_patients_are_the_same_whatever_their_number() -> None:
    images, findings = gib.chest_phantoms(6, size=24, seed=2)
    assert images.shape == (6, 1, 24, 24)
    assert findings.shape == (6, 3)
    assert (float(images.min()), float(images.max())) >= (0, 0.5)
    assert float(images.max()) <= 1
    fewer, known = gib.chest_phantoms(2, size=24, seed=2)
    assert torch.equal(fewer, images[:2])
    assert torch.equal(known, findings[:2])
    others, _ = gib.chest_phantoms(2, size=24, seed=3)
    assert not torch.equal(others, fewer)


def test_every_finding_is_had_by_some_and_seen() -> None:
    images, findings = gib.chest_phantoms(120, size=32)
    shares = findings.mean(0)
    assert bool(((shares > 0.25) & (shares < 0.75)).all()), shares
    for number in range(3):
        having = findings[:, number] == 1
        # The lungs' lower half, where each of them adds attenuation.
        region = images[:, 0, 16:24, 4:28].flatten(1).mean(1)
        assert float(region[having].mean()) > float(region[~having].mean())


@pytest.mark.parametrize(("n", "size"), [(0, 32), (1, 8), (1, 1024)])
def test_impossible_ones_are_refused(n: int, size: int) -> None:
    with pytest.raises(InputError, match="chest phantoms"):
        gib.chest_phantoms(n, size)
