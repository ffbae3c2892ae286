"""Entries of a small protocol with made-up numbers, for everything that ranks or shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.leaderboard.entry import GUESSES, BoardEntry, Leak
from benchmarks.leaderboard.protocol import Protocol, UtilityRules, Victim

SMALL = Protocol(
    name="Small-v1",
    threats=("honest-server", "eavesdropper-no-labels"),
    data="photo-patches",
    images=10,
    batch_sizes=(1, 2),
    seed=0,
    victims=(Victim("lenet", width=2, epochs=1, batch_size=400, lr=0.01),),
    states=("initial",),
    members=("spectral",),
    evaluations=4,
    utility=UtilityRules(
        "lenet", width=2, clients=2, epochs=1, rounds=2, batch_size=40, lr=0.01, seeds=(0, 1)
    ),
    worst_share=0.1,
)


def leak(ssim: Sequence[float], psnr: Sequence[float] | None = None) -> Leak:
    """What images gave away in one setting."""
    n = len(ssim)
    decibels = [30 * value for value in ssim] if psnr is None else psnr
    return Leak(
        psnr=tuple(decibels),
        ssim=tuple(ssim),
        identified=tuple(value > 0.5 for value in ssim),
        labels=(True,) * n,
        strongest=("spectral",) * n,
    )


def entry(
    name: str,
    ssim: Sequence[float],
    *,
    accuracies: tuple[float, ...] = (60.0, 62.0),
    protocol: Protocol = SMALL,
    **fields: object,
) -> BoardEntry:
    """An entry whose images gave away the same in every setting."""
    n = len(ssim)
    guesses = {guess: {"psnr": (10.0,) * n, "ssim": (0.2,) * n} for guess in GUESSES}
    made = BoardEntry(
        protocol=protocol.name,
        fingerprint=protocol.fingerprint,
        defense=name,
        apply="gaussian:0.01",
        threat="honest-server",
        accuracies=accuracies,
        leaks={setting.name: leak(ssim) for setting in protocol.settings},
        guesses=guesses,
    )
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def spread(middle: float, width: float = 0.02, n: int = SMALL.images) -> list[float]:
    """Evenly spaced values around a middle."""
    return [middle + width * (i / (n - 1) - 0.5) for i in range(n)]
