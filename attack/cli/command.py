"""Stage 3 as a command: invert a gradient checkpoint and measure what was recovered."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attack.cli.parser import TUNABLE, build_parser
from attack.cli.request import AttackRun, Measuring, Search, Showing
from attack.settings import InversionConfig, settings_of_flags, told_by_flag
from core.errors import InputError
from core.launch_arguments import LaunchSettings, given_flags
from core.plugins import import_plugin

if TYPE_CHECKING:
    from attack.knowledge.requirements import Knowledge
    from core.processes.distributed import Process
    from core.target import Target, Truth


def main(argv: list[str] | None = None) -> None:
    """Run stage 3.

    Raises:
        InputError: One sentence on what is wrong with the command line or a file.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    given = given_flags(parser, argv)
    import_plugin(args.plugin)

    from core.processes.launch import launch

    if args.superparameters_search and args.checkpoint is None:
        with told_by_flag():
            _search_alone(args, given)
        return
    with told_by_flag():
        run, opened = _prepared(args, given)
        if run.beside:
            _check_beside(args, run)
    # Spawned processes read the checkpoint themselves; it would be copied to them otherwise.
    handed_over = None if args.multiprocessing_distributed else opened
    launch(_work, LaunchSettings.from_arguments(args), run, handed_over)


@told_by_flag()
def _work(process: Process, run: AttackRun, opened: tuple[Target, Truth | None] | None) -> None:
    """What each process does."""
    from attack.cli.many_runs import run_many
    from attack.cli.running import output_of, run_attack

    if run.beside:
        run_many(process, run, output_of)
    else:
        run_attack(process, run, opened)


def _prepared(
    args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[AttackRun, tuple[Target, Truth | None]]:
    """The run that the command line describes, checked, and what its checkpoint holds."""
    from attack.cli.checks import check_places, check_run, check_search
    from core.processes.launch import check_launch, processes_of

    launched = LaunchSettings.from_arguments(args)
    check_launch(launched)
    run = make_run(args, given)
    check_places(run, Path(args.root), args.id)
    if args.checkpoint is None:
        raise InputError("--checkpoint: give the gradient checkpoint to invert")
    opened = check_run(run, cpu=args.cpu, processes=processes_of(launched))
    if args.superparameters_search:
        from attack.cli.search import with_best_settings

        search = _make_search(args)
        check_search(search, run)
        run = with_best_settings(run, search)
    return run, opened


def _check_beside(args: argparse.Namespace, run: AttackRun) -> None:
    """Refuse further checkpoints that cannot be attacked, before the first is."""
    from attack.cli.checks import check_places, check_run

    if args.multiprocessing_distributed:
        raise InputError("--beside: all targets are attacked by one process")
    if run.labels_only or run.at_once < 0:
        raise InputError("--targets-at-once must not be negative, and --labels-only has no beside")
    each = run.each()
    if len({one.folder.resolve() for one in each}) < len(each):
        raise InputError("--beside: two checkpoints write to one folder; give PATH=FOLDER")
    for one in each[1:]:
        check_places(one, one.folder.parent, one.folder.name)
        check_run(one, cpu=args.cpu)


def _beside(args: argparse.Namespace) -> tuple[tuple[Path, Path], ...]:
    """Checkpoints beside the first, and the folder of each one's results."""
    found = []
    for number, word in enumerate(args.beside or (), start=2):
        path, _, root = word.partition("=")
        folder = Path(root) / args.id if root else Path(args.root) / f"{args.id}-{number}"
        found.append((Path(path), folder))
    return tuple(found)


def _search_alone(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Search, say what is best, and end: there is nothing to invert with it yet."""
    from attack.cli.checks import check_places, check_search, check_settings
    from attack.cli.search import with_best_settings
    from core.storage import write_json

    run = make_run(args, given)
    search = _make_search(args)
    check_places(run, Path(args.root), args.id)
    check_settings(run, cpu=args.cpu)
    check_search(search, run)
    best = with_best_settings(run, search)
    found = {name: best.arguments[name] for name in search.names}
    path = run.folder / "best_setting.json"
    write_json(path, found)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.items())
    print(f"wrote {path}; for an attack: --checkpoint PATH {flags}")


def make_run(args: argparse.Namespace, given: Mapping[str, Any]) -> AttackRun:
    """The run that a parsed command line describes.

    Args:
        args: The command line, with defaults.
        given: What was really given, see `core.launch_arguments.given_flags`.
    """
    flags = _with_defaults(args) if args.attack is None else given
    settings = settings_of_flags(flags, _base(args.attack))
    knowledge = _knowledge(args, given, settings)
    return AttackRun(
        checkpoint=Path(args.checkpoint or ""),
        folder=Path(args.root) / args.id,
        knowledge=knowledge,
        attack=args.attack,
        settings=settings,
        labels_only=args.labels_only,
        model=args.model,
        loss=args.loss,
        prior=args.prior,
        spread=args.spread,
        measuring=Measuring(
            args.metric, args.one_to_one_similarity, args.GInfoR, args.lpips_weights
        ),
        showing=Showing(args.quiet, args.print_freq, args.save_every, args.state_every),
        seed=args.seed,
        plugin=args.plugin,
        arguments={**vars(args), "pseudo_label_init": knowledge.label_rule},
        beside=_beside(args),
        at_once=args.targets_at_once,
    )


def _with_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """All flags, with the command's defaults; without those that nothing was said about."""
    values = {name: value for name, value in vars(args).items() if value is not None}
    # L-BFGS measures curvature by differences of true gradients.
    values.setdefault("signed", args.gradient_loss_fun == "sim" and args.optim != "LBFGS")
    return values


def _base(attack: str | None) -> InversionConfig:
    """The settings on top of which flags count."""
    from attack.attacks import OptimizationAttack, get_attack

    found = None if attack is None else get_attack(attack)
    if found is not None and issubclass(found, OptimizationAttack):
        return found.published
    return InversionConfig()


def _knowledge(
    args: argparse.Namespace, given: Mapping[str, Any], settings: Mapping[str, Any]
) -> Knowledge:
    """What the flags say about the attacker's knowledge."""
    from attack.attacks import get_attack
    from attack.knowledge.requirements import Knowledge

    rule, by_default = args.pseudo_label_init, False
    if args.attack is not None:
        attack = get_attack(args.attack)
        by_default = attack.adapts_by_default
        if "pseudo_label_init" not in given:
            # Labels are recovered as the attack's paper does.
            rule = attack.label_rule
    return Knowledge(
        threat=args.threat,
        label_rule=rule,
        rule_given="pseudo_label_init" in given,
        adaptive=args.adaptive,
        adapts_by_default=by_default,
        exact_statistics=bool(settings.get("exact_bn") or settings.get("bn_from_update")),
        known_masks=bool(settings.get("known_masks")),
    )


def _make_search(args: argparse.Namespace) -> Search:
    if args.simulation_checkpoint is None:
        raise InputError("--superparameters-search needs --simulation-checkpoint PATH")
    return Search(
        checkpoint=args.simulation_checkpoint,
        names=tuple(name for name in TUNABLE if getattr(args, f"{name}_tune")),
        iterations=args.HP_epochs,
        cpu=args.cpu,
        num_samples=args.num_samples,
        max_concurrent=args.max_concurrent,
        gpus_per_trial=args.ngpus_per_trial,
        min_t=args.min_t,
        max_t=args.max_t,
        verbose=args.verbose,
    )
