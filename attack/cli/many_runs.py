"""Several runs of stage 3 that differ in their checkpoints, in one process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from attack.attacks.many_targets import Begun, reconstruct_many
from attack.cli.curve import Curve
from attack.cli.report import Output, write_results
from attack.cli.request import AttackRun, open_checkpoint, prior_images
from attack.cli.run_folder import is_finished, run_log, state_file_of
from attack.cli.run_labels import arranged_labels, note_doubt
from core.escaping import log_to_terminal
from core.locks import LOCK_NAME, locked, remove_left_behind
from core.plugins import import_plugin
from core.processes.distributed import Process
from core.target import Target, Truth


def run_many(
    process: Process,
    run: AttackRun,
    output_of: Callable[[Process, AttackRun, tuple[Target, Truth | None]], Output],
) -> None:
    """Invert and measure a run's checkpoint and those beside it.

    Each has its folder, record and state file, and each that is finished is left alone.

    Args:
        process: This process and its device.
        run: What to do.
        output_of: What the results of one of them are made from, given what its file holds.
    """
    import_plugin(run.plugin)
    log_to_terminal(logging.INFO)
    with contextlib.ExitStack() as held:
        outputs = []
        for each in run.each():
            held.enter_context(locked(each.folder / LOCK_NAME, f"--root and --id: {each.folder}"))
            remove_left_behind(each.folder)
            output = output_of(process, each, open_checkpoint(each))
            if not is_finished(output):
                outputs.append(output)
        if outputs:
            with run_log(run.folder):
                _run(run, outputs)


def _run(run: AttackRun, outputs: Sequence[Output]) -> None:
    first = outputs[0]
    curves = [Curve(output) for output in outputs]
    found = reconstruct_many(
        first.attack,
        [_begun(output, curve) for output, curve in zip(outputs, curves, strict=True)],
        device=first.process.device,
        seed=run.seed,
        at_once=run.at_once,
        print_every=run.showing.print_every,
        save_every=run.showing.state_every,
    )
    for output, curve, reconstruction in zip(outputs, curves, found, strict=True):
        note_doubt(output, reconstruction)
        write_results(output, reconstruction, curve.points)
        for state in output.run.folder.glob(f"state-{output.key}*"):
            state.unlink()


def _begun(output: Output, curve: Curve) -> Begun:
    run = output.run
    return Begun(
        output.target,
        arranged_labels(output),
        on_snapshot=curve,
        snapshot_every=curve.every(output.attack.iterations),
        state_file=state_file_of(run.folder, output.key),
        prior=None if run.prior is None else prior_images(run.prior, output.target),
    )
