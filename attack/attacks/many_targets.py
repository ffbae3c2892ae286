"""One attack on many targets in one process: at once where that is possible, else in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attack.attacks.base import Attack
from attack.loop.many_targets import ManyInversions, OneByOneError
from attack.matching.many_targets import same_model
from attack.matching.matcher import GradientMatcher

if TYPE_CHECKING:
    from attack.loop.inversion import Inversion, Snapshot
    from attack.reconstruction import Reconstruction
    from core.target import Target

logger = logging.getLogger(__name__)

# Restarts of all targets below which batching does not pay on a CPU: with 4 rows of LeNet or a
# small CNN it took 0.65 to 0.85 of the processor time, with one row twice as much, with 16 rows
# 0.3 to 0.45.
FEWEST_ROWS = 4
# By two backward passes, as DLG has it: LeNet 0.65 of the time with 8 rows, a small CNN 0.9 with 8
# and 1.4 with 4, 0.3 with 64.
FEWEST_EXACT_ROWS = 8


@dataclass(frozen=True)
class Begun:
    """One target among several, and what an attack on it is given.

    Attributes:
        target: What was shared.
        labels: N labels; None where the attack recovers them itself.
        on_snapshot: Who is shown the best images on the way.
        snapshot_every: Iterations between two snapshots; 0: none.
        state_file: Where the state is kept.
        prior: Images to start from.
    """

    target: Target
    labels: torch.Tensor | None
    on_snapshot: Snapshot
    snapshot_every: int = 0
    state_file: Path | None = None
    prior: torch.Tensor | None = None


def reconstruct_many(
    attack: Attack,
    targets: Sequence[Begun],
    *,
    device: torch.device,
    seed: int,
    at_once: int = 0,
    print_every: int = 10,
    save_every: int = 500,
) -> list[Reconstruction]:
    """What `attack.reconstruct` gives for each target, up to rounding.

    Args:
        attack: The attack.
        targets: What was shared, and what belongs to it.
        device: Device that runs the computation.
        seed: Of every target's random numbers.
        at_once: Targets per batched run; 1: each alone; 0: all, where that pays.
        print_every: Iterations between two entries of a trace.
        save_every: Iterations between two saves of the state.

    Returns:
        One reconstruction per target.
    """
    run = _Run(attack, device, seed, print_every, save_every)
    size = at_once or len(targets)
    found: dict[int, Reconstruction] = {}
    waiting: list[list[_Inverted]] = []
    for index, each in enumerate(targets):
        inversion = run.begin(each)
        if inversion is None:
            found[index] = run.alone(each)
            continue
        mine = _Inverted(index, each, inversion)
        group = next((group for group in waiting if group[0].is_like(mine)), None)
        if group is None:
            waiting.append(group := [])
        group.append(mine)
        if len(group) == size:
            waiting.remove(group)
            found |= run.group(group, together=at_once > 0)
    for group in waiting:
        found |= run.group(group, together=at_once > 0)
    return [found[index] for index in range(len(targets))]


@dataclass(frozen=True, eq=False)
class _Inverted:
    """One target, its number among all, and its inversion, not yet begun."""

    index: int
    begun: Begun
    inversion: Inversion

    def is_like(self, other: _Inverted) -> bool:
        """Whether both have the same settings, told defenses included, and the same model."""
        mine, its = self.inversion.problem, other.inversion.problem
        if mine.shape != its.shape or mine.config != its.config:
            return False
        matchers = self.inversion.matcher, other.inversion.matcher
        plain = [m for m in matchers if isinstance(m, GradientMatcher)]
        return len(plain) < len(matchers) or same_model(*plain)


@dataclass(frozen=True)
class _Run:
    """What is the same for all targets; see `reconstruct_many`."""

    attack: Attack
    device: torch.device
    seed: int
    print_every: int
    save_every: int

    def begin(self, each: Begun) -> Inversion | None:
        """The inversion that is all the attack does; None where it does more."""
        if each.labels is None:
            # The attack recovers them itself.
            return None
        return self.attack.begin(
            each.target,
            labels=each.labels,
            device=self.device,
            seed=self.seed,
            prior=each.prior,
        )

    def group(self, group: Sequence[_Inverted], together: bool) -> dict[int, Reconstruction]:
        """Targets of the same settings: at once where that is asked for or pays, or in turn."""
        if len(group) == 1 or not (together or self._pays(group)):
            return {one.index: one.inversion.run(**self._options(one.begun)) for one in group}
        try:
            results = ManyInversions([one.inversion for one in group]).run(
                print_every=self.print_every,
                on_snapshots=[one.begun.on_snapshot for one in group],
                snapshot_every=group[0].begun.snapshot_every,
                state_files=[
                    one.begun.state_file for one in group if one.begun.state_file is not None
                ],
                save_every=self.save_every,
            )
        except OneByOneError as reason:
            logger.warning("%d targets one by one: %s", len(group), reason)
            # Anew: an inversion that was begun among others is not as it was.
            results = [self.alone(one.begun) for one in group]
        return {one.index: result for one, result in zip(group, results, strict=True)}

    def _pays(self, group: Sequence[_Inverted]) -> bool:
        """Whether so many targets at once are faster than one after the other."""
        config = group[0].inversion.problem.config
        fewest = FEWEST_EXACT_ROWS if config.matching.hvp == "exact" else FEWEST_ROWS
        return self.device.type != "cpu" or len(group) * config.starts.restarts >= fewest

    def alone(self, each: Begun) -> Reconstruction:
        """One target by itself."""
        start = {} if each.prior is None else {"prior": each.prior}
        reconstruct: Callable[..., Reconstruction] = self.attack.reconstruct
        return reconstruct(
            each.target,
            labels=each.labels,
            device=self.device,
            seed=self.seed,
            **start,
            **self._options(each),
        )

    def _options(self, each: Begun) -> dict[str, Any]:
        return {
            "print_every": self.print_every,
            "on_snapshot": each.on_snapshot,
            "snapshot_every": each.snapshot_every,
            "state_file": each.state_file,
            "save_every": self.save_every,
        }
