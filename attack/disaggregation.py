"""Single clients' updates out of sums of several rounds (gradient disaggregation).

Secure aggregation hides a client's update in the sum of a round. Where the same clients take part
in many rounds, in other combinations each time, the sums of the rounds are linear equations in
their updates. The simplest case is the difference of two sums when one client stays away. The
equations are exact where every client's update is the same in all rounds (the server sends the
same model again, and the client has the same batch); else what is found is the mean over rounds,
with what changes between them as noise.

    python -m attack.disaggregation SUM0 SUM1 SUM2 --results results/clients

Source: Lam, Wei, Cormode, Mitzenmacher, Reagen, "Gradient Disaggregation: Breaking Privacy in
    Federated Learning by Reconstructing the User Participant Matrix", ICML 2021,
    https://arxiv.org/abs/2106.06089.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.errors import InputError, exit_status
from core.escaping import printable
from core.launch_arguments import CommandParser
from core.target import Target, Truth
from gradients.checkpoint import load_target, save_target

# A client is determined where the equations leave of its direction less than this.
_UNDETERMINED = 1e-8
# Singular values below this share of the largest are rounding.
_RANK = 1e-10


@dataclass(frozen=True)
class Disaggregated:
    """What the sums of several rounds say of single clients.

    Attributes:
        targets: By the client's number, its own mean update as the target of an attack.
        undetermined: Clients that always came with the same others: no equation tells them apart.
        residual: Norm of what no constant updates explain, over the norm of all sums: 0 where
            every client's update was the same in all rounds.
        participation: Rounds x clients, 1 where the client took part.
    """

    targets: Mapping[int, Target]
    undetermined: tuple[int, ...]
    residual: float
    participation: np.ndarray


def disaggregate(
    sums: Sequence[Target], counts: np.ndarray | None = None, window: int | None = None
) -> Disaggregated:
    """Solve for every client's mean update.

    Args:
        sums: One per round, of the same clients' local training (see `gradients.sums`).
        counts: Clients x windows, in how many rounds of each window the client took part, from
            which the participation is found (`participation_from_counts`); None: the server knows
            who took part, as the sums say.
        window: Rounds per window of `counts`; None: all of them.

    Raises:
        InputError: The sums do not belong together, or nobody's participation fits the counts.
    """
    _check_alike(sums)
    sizes = np.array([target.n_clients for target in sums], dtype=float)
    means = np.stack([_flat(target) for target in sums])
    if counts is None:
        numbers = sorted({number for target in sums for number in _clients(target)})
        present = np.array([[n in _clients(t) for n in numbers] for t in sums], dtype=float)
    else:
        numbers = list(range(len(counts)))
        present = participation_from_counts(sizes[:, None] * means, counts, window)
    updates, known, residual = solve(sizes[:, None] * means, present)
    targets = {
        number: _of_client(sums[int(present[:, k].argmax())], updates[k])
        for k, number in enumerate(numbers)
        if known[k]
    }
    lost = tuple(number for k, number in enumerate(numbers) if not known[k])
    return Disaggregated(targets, lost, residual, present)


def solve(sums: np.ndarray, participation: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Least squares of the sums in the clients' updates.

    Args:
        sums: Rounds x D.
        participation: Rounds x clients, 0 or 1.

    Returns:
        Clients x D updates (the smallest that fit, where they are not determined), whether each
        is determined, and the relative norm of what is left.
    """
    inverse = np.linalg.pinv(participation, rcond=_RANK)
    updates = inverse @ sums
    left = np.eye(participation.shape[1]) - inverse @ participation
    known = np.abs(left).max(axis=1) < _UNDETERMINED
    rest = np.linalg.norm(sums - participation @ updates)
    return updates, known, float(rest / max(float(np.linalg.norm(sums)), 1e-300))


def participation_from_counts(
    sums: np.ndarray, counts: np.ndarray, window: int | None = None
) -> np.ndarray:
    """Who took part in which round, from how often each client did.

    A column p of the participation matrix lies in the span of the sums' columns: it is orthogonal
    to their left null space. Of all vectors of zeros and ones with the counts that a device
    reports (as analytics do, per window of rounds), the one that is nearest to orthogonal is
    taken, by mixed integer programming. It takes more rounds than clients. Clients of the same
    counts may get the same column, and then none of them is determined.

    Args:
        sums: Rounds x D.
        counts: Clients x windows.
        window: Rounds per window; None: one window of all.

    Returns:
        Rounds x clients, 0 or 1.

    Raises:
        InputError: Not more rounds than clients, or no participation has such counts.

    Source: Lam et al. 2021, section 4, equation 4; there the nearness is squared.
    """
    rounds, clients = len(sums), len(counts)
    if rounds <= clients:
        raise InputError(f"--counts: {rounds} sums of {clients} clients; it takes more sums")
    windows = _windows(rounds, window, counts.shape[1])
    null = np.linalg.svd(sums, full_matrices=sums.shape[1] < rounds)[0][:, clients:]
    return np.stack([_column(null, windows, count) for count in counts], axis=1)


def _windows(rounds: int, window: int | None, stated: int) -> np.ndarray:
    """Windows x rounds, 1 where the round lies in the window."""
    size = window or rounds
    starts = range(0, rounds, size)
    if len(starts) != stated:
        raise InputError(
            f"--counts: {stated} windows per client, but {rounds} sums make {len(starts)} of {size}"
        )
    places = np.arange(rounds)
    return np.array([(places >= s) & (places < s + size) for s in starts], dtype=float)


def _column(null: np.ndarray, windows: np.ndarray, count: np.ndarray) -> np.ndarray:
    """One client's participation: zeros and ones, nearest to orthogonal to `null` in L1."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    rounds, free = null.shape
    beyond = np.eye(free)
    both = np.block([[null.T, -beyond], [-null.T, -beyond]])
    counted = np.hstack([windows, np.zeros((len(windows), free))])
    found = milp(
        np.concatenate([np.zeros(rounds), np.ones(free)]),
        integrality=np.concatenate([np.ones(rounds), np.zeros(free)]),
        bounds=Bounds(0, np.concatenate([np.ones(rounds), np.full(free, np.inf)])),
        constraints=[
            LinearConstraint(both, -np.inf, 0),
            LinearConstraint(counted, count, count),
        ],
    )
    if found.x is None:
        raise InputError(f"--counts: no participation has the counts {count.tolist()}")
    return np.asarray(found.x[:rounds].round())


def _clients(target: Target) -> tuple[int, ...]:
    return target.clients or (0,)


def _flat(target: Target) -> np.ndarray:
    return torch.cat([g.double().flatten() for g in target.gradient.values()]).numpy()


def _check_alike(sums: Sequence[Target]) -> None:
    if len(sums) < 2:
        raise InputError("give the sums of at least two rounds")
    first = sums[0]
    for target in sums[1:]:
        shapes = [{n: g.shape for n, g in t.gradient.items()} for t in (first, target)]
        if shapes[0] != shapes[1] or target.images_per_client != first.images_per_client:
            raise InputError("the sums are of different models, or of batches of different sizes")
        if target.local != first.local:
            raise InputError("the sums are of different local training")


def _of_client(target: Target, update: np.ndarray) -> Target:
    """A round's sum as the target of one of its clients."""
    sizes = [g.numel() for g in target.gradient.values()]
    parts = torch.from_numpy(update).split(sizes)
    gradient = {
        name: part.view_as(g).to(g.dtype)
        for (name, g), part in zip(target.gradient.items(), parts, strict=True)
    }
    return dataclasses.replace(
        target,
        gradient=gradient,
        batch_size=target.images_per_client,
        clients=(),
        shards=(),
        synchronized=True,
    )


def truth_of_client(number: int, sums: Sequence[tuple[Target, Truth | None]]) -> Truth | None:
    """A client's images, from a sum whose truth is known and in which it took part."""
    for target, truth in sums:
        if truth is not None and number in _clients(target):
            size = target.images_per_client
            start = _clients(target).index(number) * size
            own = slice(start, start + size)
            nearest = truth.nearest_images
            return dataclasses.replace(
                truth,
                images=truth.images[own],
                labels=truth.labels[own],
                nearest_images=None if nearest is None else nearest[own],
            )
    return None


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m attack.disaggregation",
        description="Solve sums of several rounds for the update of every client, and write each "
        "as a checkpoint that main_run.py attacks.",
    )
    parser.add_argument(
        "sums", nargs="+", type=Path, metavar="SUM",
        help="checkpoints of get_gradients.py --aggregate K --participants I,J,..., one per round",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--counts", metavar="N,N/N,N/...",
        help="who took part is not known: per client, in how many rounds of every window it did",
    )  # fmt: skip
    parser.add_argument("--window", type=int, metavar="W", help="rounds per window (default: all)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Solve, write a checkpoint per client, and say what is left over."""
    args = build_parser().parse_args(argv)
    counts = None if args.counts is None else _parsed(args.counts)
    if args.window is not None and args.window < 1:
        raise InputError("--window must be at least 1")
    sums = [load_target(path, "SUM") for path in args.sums]
    found = disaggregate([target for target, _ in sums], counts, args.window)
    for number, target in found.targets.items():
        path = args.results / f"client{number}-checkpoint.pth.tar"
        save_target(path, target, truth_of_client(number, sums))
        print(printable(f"client {number}: {path}"))
    for number in found.undetermined:
        print(f"client {number}: not determined, it always comes with the same others")
    print(f"not explained by constant updates: {found.residual:.3g} of the sums' norm")


def _parsed(text: str) -> np.ndarray:
    try:
        rows = [[int(n) for n in row.split(",")] for row in text.split("/")]
        if len({len(row) for row in rows}) != 1:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--counts {text}: expected as many whole numbers per client, as in 2,1/1,2"
        ) from None
    return np.array(rows, dtype=float)


if __name__ == "__main__":
    sys.exit(exit_status(main))
