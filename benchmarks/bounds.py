"""Put attacks beside what no attack can exceed: noisy gradients of small networks.

Writes `results/bounds/bounds.json`. An image is a smooth normal field of 8 x 8 values (mean 0.5,
standard deviation 0.2), so that its prior is known exactly. Its gradient gets normal noise of a
known standard deviation; classes are known. Every attack gets the same noisy gradient. Beside
their mean squared errors stand the bound of Cramér and Rao (attacks without bias) and van Trees'
(any attack, mean over the prior). An attack violates a bound where the 95 % interval of its mean
error, by bootstrap over images, lies below the bound. Two attacks show how near one can come: the
likeliest images, and those that are likeliest to one who knows the prior.

    python -m benchmarks.bounds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import gradinvbench as gib
from attack.bounds.information import Identifiability, decibels, mean_smallest_error
from attack.bounds.jacobian import gradient_jacobian
from attack.bounds.likelihood import NormalPrior, likeliest
from attack.bounds.private import identification, mean_reconstruction_error, reconstruction
from benchmarks.markdown import row_of
from benchmarks.show.statistics import bootstrap_interval
from core.errors import exit_status
from core.launch_arguments import CommandParser
from core.records import read_record
from core.storage import write_record

SIDE, CLASSES = 8, 4
SPREAD, LENGTH, MEAN = 0.2, 1.5, 0.5
NOISES = (1e-4, 1e-3, 1e-2)
NETWORKS = ("linear", "fully connected", "convolutional")
# Iterations of those that iterate; "analytic" is a closed form of a first dense layer.
ATTACKS: dict[str, int | None] = {"analytic": None, "spectral": 300}
# Both start from what the last of those found; the second knows the prior.
LIKELIEST, KNOWING = "likeliest", "likeliest, prior known"
COLUMNS = (*ATTACKS, LIKELIEST, KNOWING)
# DP-SGD: noise multipliers, and what counts as recovered.
SIGMAS = (0.01, 0.1, 0.5, 1.0, 2.0)
RECOVERED_DB, CANDIDATES = 20.0, 10


@dataclass
class Row:
    """One network under one noise.

    Attributes:
        network: In words.
        noise: Standard deviation on every shared number.
        images: Runs of each attack.
        errors: Mean squared error of every run, by attack.
        unbiased: Bound of Cramér and Rao, the mean over the same images.
        instance: What the best reconstruction of each image is expected to have, their mean.
        any_attack: Van Trees' bound.
        prior: Error of the prior's mean, without a gradient.
        identified: Directions of 64 that the gradient tells more of than the prior, mean.
        violations: Attacks whose interval lies below van Trees' bound.
    """

    network: str
    noise: float
    images: int
    errors: dict[str, list[float]] = field(default_factory=dict)
    unbiased: float = 0.0
    instance: float = 0.0
    any_attack: float = 0.0
    prior: float = 0.0
    identified: float = 0.0
    violations: tuple[str, ...] = ()


def covariance() -> torch.Tensor:
    """Of the 64 values of an image: neighbours are alike; a hundredth of it is white."""
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    smooth = torch.exp(-torch.cdist(places, places).square() / (2 * LENGTH**2))
    return SPREAD**2 * (0.99 * smooth + 0.01 * torch.eye(len(smooth)).double())


def network(name: str) -> nn.Module:
    """An untrained network, as the random state has it."""
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, CLASSES))
    if name == "fully connected":
        hidden = nn.Linear(SIDE**2, 32)
        return nn.Sequential(nn.Flatten(), hidden, nn.Sigmoid(), nn.Linear(32, CLASSES))
    first, second = nn.Conv2d(1, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1)
    last = nn.Linear(12 * (SIDE // 2) ** 2, CLASSES)
    return nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid(), nn.Flatten(), last)


def measure(
    name: str, noise: float, images: int, seed: int, attacks: Mapping[str, int | None] = ATTACKS
) -> Row:
    """Attack `images` noisy gradients and compute the bounds at the same images."""
    spread = covariance()
    prior = NormalPrior(torch.full((SIDE**2,), MEAN, dtype=torch.float64), spread)
    factor = torch.linalg.cholesky(spread)
    row = Row(name, noise, images, prior=float(spread.diagonal().mean()))
    jacobians, bounds, expected, identified = [], [], [], []
    for number in range(images):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            model = network(name)
            image = MEAN + factor @ torch.randn(SIDE**2, dtype=torch.float64)
        image = image.float().view(1, 1, SIDE, SIDE)
        label = torch.tensor([number % CLASSES])
        target, truth = gib.share(
            model, image, label, defense=f"gaussian:{noise}", bounds=None, seed=seed + number
        )
        jacobians.append(gradient_jacobian(target, truth))
        spectrum = Identifiability.of(jacobians[-1])
        bounds.append(spectrum.smallest_error(noise))
        expected.append(spectrum.expected_error(noise, spread))
        identified.append(spectrum.identified(noise, SPREAD))
        for attack, found in _reconstructions(name, target, label, seed + number, attacks):
            row.errors.setdefault(attack, []).append(_error(found, image))
        for attack, known in ((LIKELIEST, None), (KNOWING, prior)):
            best = likeliest(target, found, label, noise, prior=known)
            row.errors.setdefault(attack, []).append(_error(best, image))
    row.instance = float(np.mean(expected))
    row.unbiased, row.identified = float(np.mean(bounds)), float(np.mean(identified))
    row.any_attack = mean_smallest_error(jacobians, noise, spread)
    row.violations = tuple(
        attack
        for attack, errors in row.errors.items()
        if bootstrap_interval(np.asarray(errors), seed)[1] < row.any_attack
    )
    return row


def _error(found: torch.Tensor, image: torch.Tensor) -> float:
    return float((found - image).square().mean())


def _reconstructions(
    name: str,
    target: gib.Target,
    label: torch.Tensor,
    seed: int,
    attacks: Mapping[str, int | None],
) -> Iterator[tuple[str, torch.Tensor]]:
    for attack, iterations in attacks.items():
        if attack == "analytic" and name == "convolutional":
            continue
        found = gib.invert(
            target, attack=attack, iterations=iterations, labels=label, seed=seed, progress=False
        )
        yield attack, found.images


def private_rows() -> list[dict[str, float]]:
    """What DP-SGD forbids, by noise multiplier, for an image of the prior's size."""
    n = 3 * 32 * 32
    length = float(np.sqrt(n * (MEAN**2 + SPREAD**2)))
    error = 10 ** (-RECOVERED_DB / 10)
    return [
        {
            "sigma": sigma,
            "mean_db_without_knowledge": decibels(mean_reconstruction_error(sigma, length)),
            "chance_without_knowledge": reconstruction(error, sigma, length, n),
            "chance_of_candidates": identification(1 / CANDIDATES, sigma),
        }
        for sigma in SIGMAS
    ]


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.bounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=24, help="runs per row and attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/bounds", metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row and write the record."""
    args = build_parser().parse_args(argv)
    settings = [(name, noise) for name in NETWORKS for noise in NOISES]
    rows = []
    for name, noise in tqdm(settings, desc="bounds"):
        rows.append(measure(name, noise, args.images, args.seed))
        print(summary(rows[-1]), flush=True)
    write_record(
        Path(args.output) / "bounds.json",
        {
            "command": "python -m benchmarks.bounds",
            "images": args.images,
            "seed": args.seed,
            "attacks": ATTACKS,
            "rows": [asdict(row) for row in rows],
            "private": private_rows(),
        },
    )


def page_of(folder: Path) -> str:
    """The page of the documents that shows the record in a folder, in Markdown."""
    return read_record(folder / "bounds.json", "bounds", _page)


def _page(stored: Mapping[str, Any]) -> str:
    rows = [Row(**row) for row in stored["rows"]]
    return _PAGE.format(
        images=stored["images"],
        runs=sum(len(errors) for row in rows for errors in row.errors.values()),
        spectral=max(_behind(row.unbiased, row, "spectral") for row in rows),
        likeliest=max(abs(_behind(row.unbiased, row, LIKELIEST)) for row in rows),
        knowing=max(abs(_behind(row.instance, row, KNOWING)) for row in rows),
        violations=sum(len(row.violations) for row in rows),
        names=" | ".join(COLUMNS),
        rulers=" | ".join("---:" for _ in COLUMNS),
        attacks="\n".join(_line(row) for row in rows),
        private="\n".join(_private_line(row) for row in stored["private"]),
        db=f"{RECOVERED_DB:g}",
        candidates=CANDIDATES,
    )


def _behind(bound: float, row: Row, attack: str) -> float:
    """Decibels by which an attack's mean error stays behind a bound."""
    return decibels(bound) - decibels(_mean(row.errors[attack]))


def _mean(errors: Sequence[float]) -> float:
    return float(np.mean(errors))


def _line(row: Row) -> str:
    cells = [row.network, f"{row.noise:g}"]
    for attack in COLUMNS:
        errors = row.errors.get(attack)
        cells.append("–" if errors is None else _in_decibels(errors))
    values = (row.unbiased, row.instance, row.any_attack, row.prior)
    cells += [f"{decibels(value):.1f}" for value in values] + [f"{row.identified:.0f}"]
    return row_of(cells)


def _in_decibels(errors: Sequence[float]) -> str:
    low, high = bootstrap_interval(np.asarray(errors))
    return f"{decibels(_mean(errors)):.1f} ({decibels(high):.1f} to {decibels(low):.1f})"


def _private_line(row: Mapping[str, float]) -> str:
    return (
        f"| {row['sigma']:g} | {row['mean_db_without_knowledge']:.1f} | "
        f"{row['chance_without_knowledge']:.3g} | {row['chance_of_candidates']:.3f} |"
    )


_PAGE = """# What no attack can exceed

<!-- Written by docs/generate.py from results/bounds/bounds.json. -->
An attack that finds nothing shows little: a better one may find more. A bound shows what none can
find. It needs a known noise and a network that is small enough for the Jacobian J of its gradient
in the image (`attack/bounds/`). J's singular values say which directions of the image the gradient
fixes at all: one below noise / spread of the images is told better by guessing.

## Noisy gradients

A smooth random image of 8 x 8 values (mean 0.5, standard deviation 0.2), one gradient of an
untrained network, normal noise on every shared number. PSNR in dB of the mean squared error over
{images} images, with its 95 % interval by bootstrap over images; classes are known.

- *Likeliest*: the images that the noisy gradient makes likeliest, by Gauss-Newton steps on the
  whole Jacobian from what `spectral` found (`attack.bounds.likelihood`); *prior known*: likeliest
  to one who also knows the images' mean and covariance.
- *Unbiased* is the bound of Cramér and Rao, at the same images. It holds for attacks whose
  reconstructions are right on average. One that prefers smooth images has a bias and may exceed it.
- *Instance* is what the best reconstruction of just these images is expected to have, where the
  gradient is linear in the image near the truth: the risk that follows from J's singular values
  and the prior.
- *Any* is van Trees' bound of any attack, the mean over the prior. Nothing exceeds it on average,
  whatever it knows of the images. *Prior* is what the prior's mean has, without a gradient.
- *Identified*: of 64 directions, how many the gradient tells more of than the prior.

| network | noise | {names} | unbiased | instance | any | prior | identified |
| :--- | ---: | {rulers} | ---: | ---: | ---: | ---: | ---: |
{attacks}

In every row the likeliest images come within {likeliest:.1f} dB of the bound of Cramér and Rao, and
those likeliest to one who knows the prior within {knowing:.1f} dB of what is expected of these
images; `spectral`, which compares directions and knows no noise, within {spectral:.1f} dB of the
former. Mean errors that lie significantly below the bound of any attack, in {runs} runs:
{violations}.
`python -m benchmarks.bounds` computes the table.

## Of your own client

```python
import torch
from torch import nn

import gradinvbench as gib
from attack.bounds.information import Identifiability, decibels
from attack.bounds.jacobian import gradient_jacobian

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 4))
target, truth = gib.share(model, torch.rand(1, 1, 8, 8), [0])
spectrum = Identifiability.of(gradient_jacobian(target, truth))
print(spectrum.rank, decibels(spectrum.smallest_error(noise=0.01)))
print(decibels(spectrum.expected_error(0.01, covariance=0.04 * torch.eye(64).double())))
```

`spectrum.moved_by(perturbation, jacobian)` says to first order where a defense that changes the
gradient moves the image that explains it best.

## What DP-SGD forbids

The noise of DP-SGD (multiplier sigma, one release, batch of one) bounds every attacker between two.
One knows nothing about the image (32 x 32 x 3) and sees it through a layer that he made for it
([Ziller et al.](https://arxiv.org/abs/2402.12861)): his mean PSNR, and his chance of {db} dB. The
other knows everything but which of {candidates} candidates was used
([Hayes et al.](https://arxiv.org/abs/2302.07225)): his chance of naming it, 1/{candidates} without
a release.

| sigma | mean PSNR | chance of {db} dB | chance of the right candidate |
| ---: | ---: | ---: | ---: |
{private}

`attack.bounds.private` has both in closed form, for several releases and sampled batches.
"""


def summary(row: Row) -> str:
    """A row in one line, in decibels."""
    attacks = ", ".join(f"{a} {decibels(_mean(e)):.2f}" for a, e in row.errors.items())
    return (
        f"{row.network}, noise {row.noise:g}: {attacks} dB; bounds: without bias "
        f"{decibels(row.unbiased):.2f}, any {decibels(row.any_attack):.2f}, prior "
        f"{decibels(row.prior):.2f}; violated by {', '.join(row.violations) or 'none'}"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
