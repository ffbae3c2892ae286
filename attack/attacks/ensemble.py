"""Many attacks under one budget: what `--attack auto` runs.

Closed forms come first, then every attack by optimisation. The field is halved by one
gradient loss that is common to all, never by the truth. Every member's last result is
kept, so that an evaluation, which may look at the truth, can state the worst case over
all of them beside what the attacker would have chosen.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attack.attacks.base import Attack, get_attack
from attack.attacks.text.parts.embedding_space import embedding_space
from attack.knowledge.clients import reads_inputs, require_classes
from attack.knowledge.known_defenses import Adaptation, adapt
from attack.knowledge.label_search import (
    arrangements,
    choose_labels,
    iterations_for,
    label_candidates,
    parts_of,
)
from attack.knowledge.threat_models import Capability
from attack.loop.inversion import InterruptedInversion, label_trial
from attack.matching.matcher import GradientMatcher
from attack.matching.objectives import Cosine
from attack.matching.replica import Replica
from attack.priors.contrast import hidden_contrast, normalises_each
from attack.reconstruction import Reconstruction
from attack.settings import InversionConfig
from core.errors import InputError
from core.losses import Targets
from core.processes import distributed
from core.reading import parse_json
from core.records import BROKEN, check_types, fits
from core.storage import load_checkpoint, save_checkpoint
from core.target import Target

logger = logging.getLogger(__name__)

# Changes whenever what it runs, or how it divides a budget, changes.
VERSION = "auto-v4"
# Versions of this project's own attack. They are one computation but for images that are
# normalised by themselves: there the last replaces the first, which it is but for the
# scale of what it finds; that and the second are the better one on some images each, and the loss
# does not tell on which, so that the worst case over both counts.
OWN = ("spectral", "spectral-2", "spectral-3")
# Gradient evaluations of one iteration of L-BFGS.
LBFGS_COST = 20
# Evaluations below which a further restart is worth less than a longer run.
PER_RESTART = 500
SHARE_FOR_LABELS = 0.1
SHARE_FOR_FINAL = 0.5
SHARE_FOR_CLOSED_FORMS = 0.2
STATISTICS_STEP = 0.5
# Of the loss of those who do not adapt to a defense, where members are compared to be dropped.
# They descend on another loss than the common one: in short runs they can be level with those
# who do adapt, in long ones (signs) far behind.
UNAWARE_HANDICAP = 1.05


@dataclass(frozen=True)
class EnsembleConfig:
    """What decides an ensemble's numbers beside target and seed.

    Attributes:
        members: Names of the attacks, in the order in which they are run.
        version: Version of the ensemble.
        iterations: The budget: gradient evaluations of all members together.
        time_budget: Seconds instead; the budget is then measured, and not reproducible.
        granted: Names of the capabilities that the threat model grants.
        adaptive: Whether members take the defense into account, where it is granted.
    """

    members: tuple[str, ...]
    version: str = VERSION
    iterations: int = 8000
    time_budget: float | None = None
    granted: tuple[str, ...] = ()
    adaptive: bool = True

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What is granted."""
        return frozenset(Capability[name] for name in self.granted)

    @property
    def knows_defense(self) -> bool:
        """Whether members adapt."""
        return self.adaptive and Capability.DEFENSE in self.capabilities


@dataclass
class Member:
    """One attack of the ensemble, and what became of it.

    Attributes:
        name: The attack's, with its variant.
        attack: Class of the member's attack.
        changes: Fields of its setting that this variant changes.
        status: "waiting", "finished", "dropped", "withheld", "not applicable" or "failed".
        reason: Why, for the last three.
        loss: Common gradient loss of its last result.
        rounds: Times it was run.
        evaluations: Gradient evaluations it was granted.
        result: The member's last result.
    """

    name: str
    attack: type[Attack]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    status: str = "waiting"
    reason: str | None = None
    loss: float = math.inf
    rounds: int = 0
    evaluations: int = 0
    result: Reconstruction | None = None

    @property
    def optimises(self) -> bool:
        """Whether it takes a budget of iterations."""
        return self.attack.published is not None

    def record(self) -> dict[str, Any]:
        """What is worth knowing, as plain values."""
        seconds = None if self.result is None else round(self.result.seconds, 2)
        return {
            "status": self.status,
            "reason": self.reason,
            "gradient_loss": self.loss if math.isfinite(self.loss) else None,
            "rounds": self.rounds,
            "evaluations": self.evaluations,
            "seconds": seconds,
        }


def _standing(member: Member) -> float:
    unaware = member.changes.get("adaptive") is False
    return member.loss * (UNAWARE_HANDICAP if unaware else 1.0)


class Ensemble:
    """One run of all members on one target.

    Args:
        target: What was shared, as far as the threat model shows it.
        config: Budget and members.
        labels: N labels, in order; None to recover and arrange them.
        device: Device that runs the computation.
        seed: Seed that every member of the ensemble uses.
        state_file: Files beside it keep finished and running members for a resumed run.
        progress: Show a bar on rank 0.
        save_every: Iterations between two saves of a running member.
    """

    def __init__(
        self,
        target: Target,
        config: EnsembleConfig,
        *,
        labels: torch.Tensor | None,
        device: torch.device,
        seed: int,
        state_file: Path | None = None,
        progress: bool = False,
        save_every: int = 500,
    ) -> None:
        self.target, self.config, self.device, self.seed = target, config, device, seed
        self.state_file, self.progress, self.save_every = state_file, progress, save_every
        self.labels = labels
        self.is_text = bool(target.data.n_tokens)
        self.started = time.perf_counter()
        self.judge = self._make_judge()
        self.members = list(self._members())
        self.budget = config.iterations

    # -- Who takes part -----------------------------------------------------------

    def _members(self) -> Iterator[Member]:
        own = [name for name in OWN if name in self.config.members]
        same = self._repeated(own)
        for name in self.config.members:
            attack = get_attack(name)
            if name in same or not reads_inputs(attack, self.target):
                continue
            yield self._admitted(Member(name, attack))
            if attack.published is None or name not in own:
                continue
            if self._sees_statistics() and attack.published.priors.bn == 0:
                changes = {"bn": STATISTICS_STEP, "exact_bn": True}
                yield self._admitted(Member(f"{name}, statistics", attack, changes))
            if self.config.knows_defense and self.target.defenses:
                # An adaptation is a guess at what helps; where it does not, this one stays.
                yield self._admitted(Member(f"{name}, unaware", attack, {"adaptive": False}))

    def _repeated(self, own: Sequence[str]) -> Sequence[str]:
        """Which versions of `OWN` would compute on this target what another one does."""
        replica = self.judge.replica
        alone = hidden_contrast(replica.model, self.target.batch_size, replica.groups) is not None
        if not alone and not normalises_each(replica.model):
            return own[1:]
        # The last is the first but for the scale, and stays. The second differs for BatchNorm
        # alone.
        alike = [name for name in own if name != OWN[1]] if alone else own
        return alike[:-1]

    def _admitted(self, member: Member) -> Member:
        if self.target.loss.targets not in member.attack.fits:
            member.status = "not applicable"
            member.reason = f"this client's loss is {self.target.loss.name}"
        missing = set(member.attack.requires) - self.config.capabilities
        if missing:
            member.status = "withheld"
            member.reason = "; ".join(sorted(c.value for c in missing))
        return member

    def _sees_statistics(self) -> bool:
        known = self.target.bn_statistics
        if known is None or Capability.BATCH_STATISTICS not in self.config.capabilities:
            return False
        return bool(known[0]) and self.target.train_mode

    def _setting(self, member: Member, evaluations: int) -> InversionConfig:
        """A member's published setting within a budget of gradient evaluations."""
        published = member.attack.published
        assert published is not None
        cost = LBFGS_COST if published.optimiser.name == "LBFGS" else 1
        restarts = max(1, min(published.starts.restarts, evaluations // (cost * PER_RESTART)))
        iterations = max(1, evaluations // (cost * restarts))
        bn = published.priors.bn if self._has_statistics() else 0.0
        setting = published.changed(
            iterations=iterations,
            restarts=restarts,
            warmup=min(published.optimiser.warmup, iterations // 10),
            combine=published.consensus.combine and restarts > 1,
            combine_every=max(1, min(published.consensus.combine_every, iterations // 10)),
            bn=bn,
            exact_bn=bn > 0 and self._sees_statistics(),
            target_tv=None,
            patience=0,
            smallest_loss=True,
            adaptive=self.config.knows_defense,
        )
        return setting.changed(**member.changes)

    def _has_statistics(self) -> bool:
        if Capability.RUNNING_STATISTICS not in self.config.capabilities:
            return self._sees_statistics()
        return any(name.endswith("running_mean") for name in self.target.state_dict)

    def _make_judge(self) -> GradientMatcher:
        """The loss that all members are compared by."""
        adaptation = Adaptation.none(self.target, InversionConfig())
        if self.config.knows_defense:
            adaptation = adapt(self.target, InversionConfig())
        replica = Replica(adaptation.matched(self.target), self.device, torch.float64)
        return GradientMatcher(replica, adaptation.objective(Cosine()), "exact")

    # -- Running ------------------------------------------------------------------

    def run(self) -> Reconstruction:
        """Run everything within the budget; the result is the member of smallest loss.

        Raises:
            InputError: No member could be run at all.
        """
        self._measure_budget()
        labels = self._recover_labels()
        self._run_closed_forms(labels)
        try:
            self._halve(labels)
        except InterruptedInversion:
            finished = [m for m in self.members if m.result is not None]
            if not finished:
                raise
            best = dataclasses.replace(self._conclude(finished), status="interrupted")
            raise InterruptedInversion(best) from None
        finished = [m for m in self.members if m.result is not None]
        if not finished:
            reasons = "; ".join(f"{m.name}: {m.reason}" for m in self.members)
            raise InputError(f"--attack auto: no attack applies ({reasons})")
        return self._conclude(finished)

    def _measure_budget(self) -> None:
        """Turn seconds into gradient evaluations, by timing a few of them."""
        if self.config.time_budget is None:
            return
        target = embedding_space(self.target).target if self.is_text else self.target
        replica = Replica(target, self.device)
        matcher = GradientMatcher(replica, Cosine(), "exact")
        inputs = torch.zeros((target.batch_size, *target.data.shape))[replica.share]
        length = target.data.shape[:1] if target.loss.targets is Targets.TOKENS else ()
        known = torch.zeros((target.batch_size, *length), dtype=torch.long)
        known = known if self.labels is None else self.labels
        labels = known[replica.share].to(self.device)
        matcher(inputs.to(self.device), labels)
        began = time.perf_counter()
        for _ in range(3):
            matcher(inputs.to(self.device), labels)
        each = (time.perf_counter() - began) / 3
        left = self.config.time_budget - (began - self.started)
        # A fifth for what is not a gradient: regularisers, evaluation, saving.
        found = max(1, int(0.8 * left / max(each, 1e-6)))
        self.budget = distributed.broadcast_object(found)

    def _recover_labels(self) -> torch.Tensor | None:
        """The granted labels, or of all hypotheses the one that explains the gradient best.

        Of text None: an attack that reads tokens reads the labels as well.
        """
        if self.labels is not None or self.is_text:
            return self.labels
        require_classes("the search for labels of --attack auto", self.target.loss)
        candidates = [
            arranged
            for labels in label_candidates(self.target)
            for arranged in arrangements(labels, parts_of(self.target), seed=self.seed)
        ]
        saved = self._load("labels")
        if saved is None:
            budget = int(SHARE_FOR_LABELS * self.budget)
            chooser = self._chooser()
            trial = label_trial(self.target, chooser, device=self.device, seed=self.seed)
            first = iterations_for(len(candidates), budget)
            labels, spent = choose_labels(candidates, trial, first_iterations=first)
            saved = {"labels": labels, "spent": spent}
            self._save("labels", saved)
        self.budget = max(1, self.budget - int(saved["spent"]))
        self.n_hypotheses = len(candidates)
        labels = saved["labels"]
        assert isinstance(labels, torch.Tensor)
        return labels

    def _chooser(self) -> InversionConfig:
        from attack.attacks.spectral import Spectral

        exact = self._sees_statistics()
        return Spectral.published.changed(
            adaptive=self.config.knows_defense,
            bn=STATISTICS_STEP if exact else 0.0,
            exact_bn=exact,
        )

    def _run_closed_forms(self, labels: torch.Tensor | None) -> None:
        given: dict[str, Any] = {}
        if self.config.time_budget is not None:
            given["time_budget"] = SHARE_FOR_CLOSED_FORMS * self.config.time_budget
        share = max(1, int(SHARE_FOR_CLOSED_FORMS * self.budget))
        for member in self._waiting(optimising=False):
            # One with a loop of its own, whose starts run at once, pays for its iterations.
            own = member.attack.configured(given).iterations
            paid = {} if own is None else {"iterations": min(own, share)}
            spent = paid.get("iterations", 0)
            self._attempt(member, member.attack.configured(given | paid), labels, spent)
            if member.result is not None:
                self.budget = max(1, self.budget - spent)

    def _waiting(self, optimising: bool) -> list[Member]:
        return [m for m in self.members if m.status == "waiting" and m.optimises == optimising]

    def _halve(self, labels: torch.Tensor | None) -> None:
        """Rounds of equal cost over ever fewer members, then half the budget for the last."""
        field = self._waiting(optimising=True)
        rounds = math.ceil(math.log2(len(field))) if len(field) > 1 else 0
        each_round = self.budget * (1 - SHARE_FOR_FINAL) / max(1, rounds)
        final = self.budget * SHARE_FOR_FINAL if rounds else self.budget
        for number in range(rounds + 1):
            last = number == rounds
            budget = max(1, int((final if last else each_round) / max(1, len(field))))
            for member in self._bar(field, number, rounds):
                attack: Any = member.attack
                setting = self._setting(member, budget)
                self._attempt(member, attack(setting), labels, budget)
            # A failure has no result to be kept for.
            field = sorted((m for m in field if m.result is not None), key=_standing)
            if not last:
                for member in field[math.ceil(len(field) / 2) :]:
                    member.status = "dropped"
                field = field[: math.ceil(len(field) / 2)]

    def _bar(self, field: list[Member], number: int, rounds: int) -> Iterator[Member]:
        shown = self.progress and distributed.rank() == 0
        title = f"auto, round {number + 1} of {rounds + 1}"
        with tqdm(field, desc=title, unit="attack", disable=not shown) as bar:
            for member in bar:
                bar.set_postfix_str(member.name)
                yield member

    def _attempt(
        self, member: Member, attack: Any, labels: torch.Tensor | None, budget: int
    ) -> None:
        """Run a member, unless an interrupted run had done so; a failure is a result, too."""
        name = f"{member.name}-{member.rounds}"
        saved = self._load(name)
        if saved is None:
            saved = self._outcome(attack, labels, self._path(f"{name}-running"))
            self._save(name, saved)
            self._forget(f"{name}-running")
        member.rounds += 1
        member.evaluations += budget
        if "images" not in saved:
            if member.result is None:
                member.status, member.reason = saved["status"], saved["reason"]
            logger.info("%s: %s (%s)", member.name, saved["status"], saved["reason"])
            return
        member.status = "finished"
        member.result = self._result(saved)
        member.loss = self._common_loss(member.result)
        logger.info("%s: gradient loss %.5g", member.name, member.loss)

    def _outcome(
        self, attack: Any, labels: torch.Tensor | None, state: Path | None
    ) -> dict[str, Any]:
        try:
            found = attack.reconstruct(
                self.target, labels=labels, device=self.device, seed=self.seed,
                state_file=state, save_every=self.save_every,
            )  # fmt: skip
        except InputError as error:
            return {"status": "not applicable", "reason": str(error)}
        except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
            # One attack's weakness on an odd target must not hide what the others find.
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        if not torch.isfinite(found.images).all():
            return {"status": "failed", "reason": "its images are not finite"}
        kept = {f: getattr(found, f) for f in ("images", "labels", "objective", "trace")}
        more = {f: getattr(found, f) for f in ("seconds", "iterations", "status")}
        return {**kept, **more, "details": json.dumps(found.details, default=str)}

    def _common_loss(self, result: Reconstruction) -> float:
        replica = self.judge.replica
        images = result.images if self.is_text else result.images.double()
        inputs = self.target.data.normalize(images)[replica.share]
        labels = result.labels[replica.share].to(self.device)
        value = float(self.judge.value(inputs.to(self.device), labels))
        return value if math.isfinite(value) else math.inf

    def _conclude(self, finished: list[Member]) -> Reconstruction:
        chosen = min(finished, key=lambda m: m.loss)
        assert chosen.result is not None
        details = {
            "ensemble": self.config.version,
            "chosen": chosen.name,
            "members": {m.name: m.record() for m in self.members},
            "budget": self.budget,
            "label_hypotheses": getattr(self, "n_hypotheses", 1),
        }
        return dataclasses.replace(
            chosen.result,
            objective=chosen.loss,
            seconds=time.perf_counter() - self.started,
            iterations=sum(m.evaluations for m in self.members),
            status="finished",
            details=details,
            members={m.name: m.result for m in finished if m.result is not None},
        )

    # -- Resuming -----------------------------------------------------------------

    def _path(self, name: str) -> Path | None:
        if self.state_file is None:
            return None
        word = re.sub(r"[^a-z0-9]+", "-", name.lower())
        return self.state_file.with_name(f"{self.state_file.stem}-{word}.pt")

    def _save(self, name: str, values: dict[str, Any]) -> None:
        path = self._path(name)
        if path is not None and distributed.rank() == 0:
            save_checkpoint(values, path)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if path is None:
            return None
        saved = None
        if distributed.rank() == 0 and path.exists():
            saved = self._checked(load_checkpoint(path, "--root"), path)
        found: dict[str, Any] | None = distributed.broadcast_object(saved)
        return found

    def _checked(self, saved: dict[str, Any], path: Path) -> dict[str, Any]:
        """What an interrupted run kept: the labels, or of a member its result or a reason."""
        try:
            if "spent" in saved:
                labels = saved["labels"]
                right = len(labels) == self.target.batch_size and fits(saved["spent"], int)
                right = right and not labels.is_floating_point()
            elif "images" not in saved:
                right = fits([saved["status"], saved["reason"]], list[str])
            else:
                result = self._result(saved)
                check_types(result)
                shape = (self.target.batch_size, *self.target.data.shape)
                right = tuple(result.images.shape) == shape
                right = right and result.images.is_floating_point() != self.is_text
                right = right and len(result.labels) == len(result.images)
        except BROKEN:
            right = False
        if not right:
            raise InputError(f"--root: {path} is no result of this run; remove it")
        return saved

    def _forget(self, name: str) -> None:
        path = self._path(name)
        if path is not None and distributed.rank() == 0:
            for state in path.parent.glob(f"{path.stem}*.pt"):
                state.unlink()

    def _result(self, saved: dict[str, Any]) -> Reconstruction:
        """A member's result, as `_outcome` keeps it."""
        details = parse_json(saved["details"].encode(), "its details")
        data = self.target.data if self.is_text else None
        return Reconstruction(**{**saved, "details": details, "data": data})
