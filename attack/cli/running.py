"""One run of stage 3: the attack, its labels, its curve and its files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from attack.attacks.base import Attack
from attack.attacks.optimisation import OptimizationAttack, make_attack
from attack.attacks.restarts_over_processes import reconstruct_spread
from attack.cli.report import Output, write_label_results, write_results
from attack.cli.request import AttackRun, open_checkpoint, prior_images
from attack.knowledge.label_search import arrange_labels
from attack.knowledge.labels import broken_assumption, recover_labels
from attack.knowledge.threat_models import Capability, find_threat
from attack.loop.consensus import stage_ends
from attack.loop.inversion import InterruptedInversion, label_trial
from attack.matching.freed_memory import keep_freed_memory
from attack.metrics import assign, data_range, psnr, to_unit_range
from attack.reconstruction import Reconstruction
from attack.record import AttackRecord, LabelRecord, read_record
from attack.settings import InversionConfig
from core.errors import InputError
from core.escaping import PrintableFormatter, log_to_terminal, printable
from core.locks import LOCK_NAME, locked, remove_left_behind
from core.losses import Targets
from core.pictures import save_images
from core.plugins import import_plugin
from core.processes.distributed import Process, barrier, broadcast_object
from core.processes.interruption import interruptions_noted
from core.reading import file_digest, read_json
from core.records import fits
from core.storage import write_json
from core.target import Target, Truth

SNAPSHOTS_OF_A_CURVE = 20
LOG = "log.txt"
INTERRUPTED = "interrupted"


def run_attack(
    process: Process, run: AttackRun, opened: tuple[Target, Truth | None] | None = None
) -> None:
    """Invert and measure, on one of the processes.

    Args:
        process: This process and its device.
        run: What to do.
        opened: The checkpoint, where it has been read already.
    """
    import_plugin(run.plugin)
    keep_freed_memory()
    log_to_terminal(logging.INFO if process.is_main else logging.ERROR)
    output = output_of(process, run, opened or open_checkpoint(run))
    # State files tell by their names whose they are; only rank 0 writes beside them.
    lock: AbstractContextManager[None] = contextlib.nullcontext()
    if process.is_main:
        lock = locked(run.folder / LOCK_NAME, f"--root and --id: {run.folder}")
    with lock, interruptions_noted(process.device):
        _run_locked(output)


def output_of(process: Process, run: AttackRun, opened: tuple[Target, Truth | None]) -> Output:
    """What the results of a run are made from, as the attacker sees its checkpoint."""
    target, truth = opened
    threat = find_threat(run.knowledge.threat)
    if threat is not None:
        target = threat.view(target)
    attack = make_attack(run.attack, run.settings, run.knowledge)
    return Output(run, run_key(run, attack), attack, target, truth, process)


def _run_locked(output: Output) -> None:
    """The run, in a folder that nobody else writes to."""
    run, process = output.run, output.process
    if process.is_main:
        remove_left_behind(run.folder)
    if is_finished(output):
        return
    if run.labels_only:
        if process.is_main:
            write_label_results(output)
        return
    curve = Curve(output)
    with run_log(run.folder if process.is_main else None):
        try:
            reconstruction = _reconstruct(output, curve)
        except InterruptedInversion as stopped:
            _conclude_early(output, stopped.reconstruction, curve)
            raise KeyboardInterrupt from None
        if process.is_main:
            write_results(output, reconstruction, curve.points)
    barrier()
    if process.is_main:
        for state in run.folder.glob(f"state-{output.key}*"):
            state.unlink()


def _conclude_early(output: Output, found: Reconstruction, curve: Curve) -> None:
    """Measure what an interrupted attack has found."""
    if output.process.is_main:
        print(f"interrupted after {found.iterations} iterations: measuring the best so far")
        write_results(output, found, curve.points)
        print("the same command continues from the last saved state", flush=True)
    barrier()


@contextlib.contextmanager
def run_log(folder: Path | None) -> Iterator[None]:
    """Within the block, what the attack logs is written to `log.txt` as well.

    Args:
        folder: Of the run; None for no file.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    rooms = logging.getLogger("attack")
    level = rooms.level
    for shown in logging.getLogger().handlers:
        # Each iteration's losses are for the file.
        shown.setLevel(max(shown.level, logging.INFO))
    file = logging.FileHandler(folder / LOG, encoding="utf-8")
    file.setFormatter(PrintableFormatter("%(asctime)s %(name)s: %(message)s"))
    rooms.addHandler(file)
    rooms.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        rooms.setLevel(level)
        rooms.removeHandler(file)
        file.close()


def is_finished(output: Output) -> bool:
    """Whether the same run was finished before; one answer for all processes."""
    record = None
    if output.process.is_main:
        record = finished_record(output.run.folder, output.key)
    if record is not None:
        print(f"already done: {output.run.folder / 'record.json'}")
        print(printable("\n".join(record.tables)))
    return bool(broadcast_object(record is not None))


def _reconstruct(output: Output, curve: Curve) -> Reconstruction:
    run, attack, process = output.run, output.attack, output.process
    spread = run.spread == "restarts" and process.world_size > 1
    reconstruct: Callable[..., Reconstruction] = attack.reconstruct
    if spread:
        assert isinstance(attack, OptimizationAttack)
        reconstruct = functools.partial(reconstruct_spread, attack)
    if run.prior is not None:
        reconstruct = functools.partial(reconstruct, prior=prior_images(run.prior, output.target))
    found = reconstruct(
        output.target,
        labels=arranged_labels(output),
        device=process.device,
        seed=run.seed,
        progress=process.is_main and not run.showing.quiet,
        print_every=run.showing.print_every,
        # Processes that work by themselves would draw over each other's pictures.
        on_snapshot=None if spread and not process.is_main else curve,
        snapshot_every=curve.every(attack.iterations),
        state_file=state_file_of(run.folder, output.key, process.rank if spread else None),
        save_every=run.showing.state_every,
    )
    note_doubt(output, found)
    return found


def note_doubt(output: Output, found: Reconstruction) -> None:
    """Say in the result where its labels come from a rule whose assumption does not hold."""
    run, attack = output.run, output.attack
    optimised = optimises_targets(run, attack, output.target)
    if not optimised and not run.knowledge.leaves_labels_to(attack):
        doubt = broken_assumption(run.knowledge.label_rule, output.target)
        found.details.update({} if doubt is None else {"label_warning": doubt})


def state_file_of(folder: Path, key: str, rank: int | None = None) -> Path:
    """Where a run, or the share of a process in it, is saved."""
    return folder / (f"state-{key}.pt" if rank is None else f"state-{key}-share{rank}.pt")


def labels_for(
    run: AttackRun, attack: Attack, target: Target, truth: Truth | None
) -> torch.Tensor | None:
    """The labels that the attack is given; None where it recovers them itself."""
    knowledge = run.knowledge
    if optimises_targets(run, attack, target):
        # They stand where labels would; every restart optimises its own.
        return torch.zeros(target.batch_size, dtype=torch.long)
    if knowledge.leaves_labels_to(attack):
        known = Capability.LABELS in knowledge.granted and truth is not None
        return truth.labels if known and truth is not None else None
    granted = truth.labels if knowledge.label_rule == "known" and truth is not None else None
    return recover_labels(knowledge.label_rule, target, truth_labels=granted)


def optimises_targets(run: AttackRun, attack: Attack, target: Target) -> bool:
    """Whether targets that are no classes are optimised with the inputs."""
    config = getattr(attack, "config", None)
    if run.knowledge.label_rule == "known" or target.loss.targets is Targets.CLASSES:
        return False
    return isinstance(config, InversionConfig) and config.matching.joint_labels


def arranged_labels(output: Output) -> torch.Tensor | None:
    """The attack's labels; recovered ones where they belong, if trying can tell."""
    run, target = output.run, output.target
    labels = labels_for(run, output.attack, target, output.truth)
    config = getattr(output.attack, "config", None)
    recovered = run.knowledge.adaptive and run.knowledge.label_rule != "known"
    if labels is None or not recovered or not isinstance(config, InversionConfig):
        return labels
    trial = label_trial(target, config, device=output.process.device, seed=run.seed)
    return arrange_labels(target, labels, trial, seed=run.seed)


def run_key(run: AttackRun, attack: Attack) -> str:
    """Identifies a run: what decides its numbers."""
    measuring = run.measuring
    decisive = {
        "attack": attack.name,
        "config": attack.plain_settings(),
        "labels": run.knowledge.label_rule,
        "labels_only": run.labels_only,
        "threat": run.knowledge.to_record(),
        "seed": run.seed,
        "metric": [
            measuring.images,
            measuring.one_to_one,
            measuring.information,
            measuring.lpips_weights,
        ],
        "prior": None if run.prior is None else file_digest(run.prior),
        "checkpoint": file_digest(run.checkpoint),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def finished_record(folder: Path, key: str) -> AttackRecord | LabelRecord | None:
    """The record of the same run, if it was finished before."""
    path = folder / "record.json"
    if not path.exists():
        return None
    record = read_record(path)
    # What was interrupted has a record of the best so far, and is run on.
    done = record.key == key and record.status != INTERRUPTED
    return record if done else None


class Curve:
    """Watches the attack from outside: PSNR over iterations, and pictures on the way.

    Args:
        output: Of the run.
    """

    def __init__(self, output: Output) -> None:
        run, config = output.run, getattr(output.attack, "config", None)
        # E2EGI's stages end with a picture, whatever the snapshots are.
        self.stages = stage_ends(config) if isinstance(config, InversionConfig) else []
        self.iterations = output.attack.iterations
        self.folder, self.picture_every = run.folder, run.showing.picture_every
        self.truth = output.truth if run.measuring.images else None
        # A continued run keeps the points of the interrupted one.
        self.file = run.folder / f"state-{output.key}-curve.json"
        self.points: list[dict[str, float]] = []
        if self.file.exists():
            self.points = self._read()

    def _read(self) -> list[dict[str, float]]:
        points: list[dict[str, float]] = read_json(self.file, "--root")
        if not fits(points, list[dict[str, float]]):
            raise InputError(f"--root: {self.file} holds no curve; remove it")
        return points

    def every(self, iterations: int | None) -> int:
        """Iterations between two snapshots; 0: none are taken."""
        if self.picture_every:
            return self.picture_every
        if self.truth is None or iterations is None:
            return 0
        return max(1, iterations // SNAPSHOTS_OF_A_CURVE)

    def __call__(self, iteration: int, images: torch.Tensor) -> None:
        """Take note of the batch as it stands (N x C x H x W in [0, 1], or others)."""
        if iteration in self.stages:
            number = self.stages.index(iteration) + 1
            save_images(
                self.folder / f"stage{number}.png",
                images,
                title=f"stage {number} of 3, iteration {iteration}",
            )
        every = self.every(self.iterations)
        if not every or iteration % every:
            return
        if self.truth is not None:
            bounds = data_range(self.truth.images)
            found, originals = (to_unit_range(x, bounds) for x in (images, self.truth.images))
            mean = float(psnr(found[assign(found, originals)], originals).mean())
            # Iterations after the last saved state are run again.
            earlier = [point for point in self.points if point["iteration"] < iteration]
            self.points = [*earlier, {"iteration": iteration, "psnr": mean}]
            write_json(self.file, self.points)
        if self.picture_every:
            name = f"progress_{iteration:06d}.png"
            save_images(self.folder / name, images, title=f"iteration {iteration}")
