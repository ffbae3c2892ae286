"""One run of stage 3, on one of its processes."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from attack.attacks.optimisation import OptimizationAttack, make_attack
from attack.attacks.restarts_over_processes import reconstruct_spread
from attack.cli.curve import Curve
from attack.cli.report import Output, write_label_results, write_results
from attack.cli.request import AttackRun, open_checkpoint, prior_images
from attack.cli.run_folder import is_finished, run_key, run_log, state_file_of
from attack.cli.run_labels import arranged_labels, note_doubt
from attack.knowledge.threat_models import find_threat
from attack.loop.inversion import InterruptedInversion
from attack.reconstruction import Reconstruction
from core.escaping import log_to_terminal
from core.locks import LOCK_NAME, locked, remove_left_behind
from core.plugins import import_plugin
from core.processes.distributed import Process, barrier
from core.processes.interruption import interruptions_noted
from core.target import Target, Truth


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
