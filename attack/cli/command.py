"""Stage 3 as a command: invert a gradient checkpoint and measure what was recovered."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from attack.cli.parser import TUNABLE, build_parser
from attack.settings import told_by_flag
from core.errors import InputError
from core.launch_arguments import given_flags
from core.plugins import import_plugin

SNAPSHOTS_OF_A_CURVE = 20


def main(argv: list[str] | None = None) -> None:
    """Run stage 3.

    Raises:
        InputError: One sentence on what is wrong with the command line or a file.
    """
    from core.processes.distributed import launch

    parser = build_parser()
    args = parser.parse_args(argv)
    args.explicit = sorted(given_flags(parser, argv))
    import_plugin(args.plugin)
    with told_by_flag():
        _take_label_rule(args)
        _check(args)
        if args.superparameters_search:
            _search(args)
    launch(run, args)


def _take_label_rule(args: argparse.Namespace) -> None:
    """With `--attack`, labels are recovered as its paper does, unless a rule was given."""
    from attack.attacks.base import get_attack

    if args.attack is not None and "pseudo_label_init" not in args.explicit:
        rule = getattr(get_attack(args.attack), "label_rule", args.pseudo_label_init)
        args.pseudo_label_init = rule


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before any work is done."""
    from attack.cli.requirements import check_run
    from attack.knowledge.labels import rule_names
    from core.processes.distributed import check_launch_arguments
    from gradients.checkpoint import load_target

    check_launch_arguments(args)
    _check_places(args)
    if args.checkpoint is None:
        raise InputError("--checkpoint: give the gradient checkpoint to invert")
    if args.pseudo_label_init not in rule_names():
        raise InputError(
            f"--pseudo-label-init {args.pseudo_label_init}: choose one of {', '.join(rule_names())}"
        )
    attack = make_attack(args)
    _check_device(args, attack)
    if args.spread == "restarts":
        from attack.attacks.restarts_over_processes import check_spreadable

        check_spreadable(attack)
    target, truth = load_target(args.checkpoint)
    check_run(args, attack, target)
    needs_truth = {
        "--metric": args.metric,
        "--labels-only": args.labels_only,
        "--GInfoR": args.GInfoR,
        "--pseudo-label-init known": args.pseudo_label_init == "known",
    }
    for flag, asked in needs_truth.items():
        if asked and truth is None:
            raise InputError(f"{flag}: {args.checkpoint} holds no true images and labels")
    if args.prior is not None:
        _prior(args, target)
    if args.superparameters_search:
        if args.simulation_checkpoint is None:
            raise InputError("--superparameters-search needs --simulation-checkpoint PATH")
        load_target(args.simulation_checkpoint, "--simulation-checkpoint")


def _check_device(args: argparse.Namespace, attack: Any) -> None:
    """Refuse what needs a GPU where there is none."""
    import torch

    from attack.settings import InversionConfig

    config = getattr(attack, "config", None)
    if isinstance(config, InversionConfig):
        cuda = torch.cuda.is_available() and not args.cpu
        config.speed.check_device("cuda" if cuda else "cpu")


def _check_places(args: argparse.Namespace) -> None:
    """Refuse names and folders that would fail once the attack has run."""
    if Path(args.id).name != args.id:
        raise InputError(f"--id {args.id}: becomes the name of a folder in --root")
    if Path(args.root).exists() and not Path(args.root).is_dir():
        raise InputError(f"--root: {args.root} is a file, not a folder")
    if args.lpips_weights is not None and not Path(args.lpips_weights).is_dir():
        raise InputError(f"--lpips-weights: there is no folder {args.lpips_weights}")
    if args.state_every < 1 or args.save_every < 0:
        raise InputError("--state-every must be at least 1, and --save-every not negative")


def make_attack(args: argparse.Namespace) -> Any:
    """The attack that the flags describe.

    With `--attack`, its published setting with the explicitly given flags on top;
    otherwise all flags with their published defaults.
    """
    from attack.attacks import OptimizationAttack, get_attack
    from attack.cli.requirements import adapts, granted_capabilities
    from attack.settings import InversionConfig, settings_of_flags

    if args.attack is None:
        config = InversionConfig().with_flags(_with_defaults(args))
        config.validate()
        return type("SeedAttack", (OptimizationAttack,), {"name": "seed"})(config)
    attack = get_attack(args.attack)
    given = {name: getattr(args, name) for name in args.explicit}
    if not issubclass(attack, OptimizationAttack):
        granted = {"granted": granted_capabilities(args), "adaptive": adapts(args)}
        return attack.configured(settings_of_flags(given, InversionConfig()) | granted)
    config = attack.published.with_flags(given)
    config.validate()
    return attack(config)


def _with_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """All flags, with the command's defaults; without those that nothing was said about."""
    values = {name: value for name, value in vars(args).items() if value is not None}
    # L-BFGS measures curvature by differences of true gradients.
    values.setdefault("signed", args.gradient_loss_fun == "sim" and args.optim != "LBFGS")
    return values


@told_by_flag()
def run(process: Any, args: argparse.Namespace) -> None:
    """Invert and measure, on one of the processes.

    Args:
        process: `core.processes.distributed.Process`.
        args: The command line.
    """
    import functools

    from attack.attacks.restarts_over_processes import reconstruct_spread
    from attack.knowledge.threat_models import find_threat
    from attack.matching.freed_memory import keep_freed_memory
    from core.processes.distributed import barrier, broadcast_object
    from gradients.checkpoint import load_target

    import_plugin(args.plugin)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO if process.is_main else logging.ERROR)
    target, truth = load_target(args.checkpoint)
    threat = find_threat(args.threat)
    if threat is not None:
        target = threat.view(target)
    attack = make_attack(args)
    folder = Path(args.root) / args.id
    key = _run_key(args, attack)
    record = finished_record(folder, key) if process.is_main else None
    if record is not None:
        print(f"already done: {folder / 'record.json'}")
        print("\n".join(record["tables"]))
    if broadcast_object(record is not None):
        return
    if args.labels_only:
        if process.is_main and truth is not None:
            from attack.cli.report import write_label_results

            write_label_results(args, folder, key, target, truth, process)
        return
    labels = _labels(args, target, truth, attack)
    if args.adaptive and args.pseudo_label_init != "known" and labels is not None:
        labels = _arranged(labels, target, attack, process.device, args.seed)
    curve = _Curve(args, folder, truth, key)
    spread = args.spread == "restarts" and process.world_size > 1
    reconstruct = attack.reconstruct
    if spread:
        reconstruct = functools.partial(reconstruct_spread, attack)
    if args.prior is not None:
        reconstruct = functools.partial(reconstruct, prior=_prior(args, target))
    reconstruction = reconstruct(
        target,
        labels=labels,
        device=process.device,
        seed=args.seed,
        progress=process.is_main and not args.quiet,
        print_every=args.print_freq,
        # Processes that work by themselves would draw over each other's pictures.
        on_snapshot=None if spread and not process.is_main else curve,
        snapshot_every=curve.every(attack.iterations),
        state_file=_state_file(folder, key, process.rank if spread else None),
        save_every=args.state_every,
    )
    if process.is_main:
        from attack.cli.report import write_results

        write_results(args, folder, key, attack, target, truth, reconstruction, curve, process)
    barrier()
    if process.is_main:
        for state in folder.glob(f"state-{key}*"):
            state.unlink()


def _state_file(folder: Path, key: str, rank: int | None) -> Path:
    return folder / (f"state-{key}.pt" if rank is None else f"state-{key}-share{rank}.pt")


def _labels(args: argparse.Namespace, target: Any, truth: Any, attack: Any) -> Any:
    """The labels that the attack is given; None where it recovers them itself."""
    from attack.cli.requirements import granted_capabilities, labels_are_left_to
    from attack.knowledge.labels import recover_labels
    from attack.knowledge.threat_models import Capability

    if labels_are_left_to(attack, args):
        known = Capability.LABELS in granted_capabilities(args) and truth is not None
        return truth.labels if known else None
    granted = truth.labels if args.pseudo_label_init == "known" and truth is not None else None
    return recover_labels(args.pseudo_label_init, target, truth_labels=granted)


def _prior(args: argparse.Namespace, target: Any) -> Any:
    """The prior image for every image of the batch."""
    from core.pictures import read_image

    image = read_image(args.prior, tuple(target.data.shape), "--prior")
    return image.expand(target.batch_size, *image.shape)


def _arranged(labels: Any, target: Any, attack: Any, device: Any, seed: int) -> Any:
    """Recovered labels where they belong, for attacks that can tell by trying."""
    from attack.knowledge.label_search import arrange_labels
    from attack.settings import InversionConfig

    config = getattr(attack, "config", None)
    if not isinstance(config, InversionConfig):
        return labels
    return arrange_labels(target, labels, config, device=device, seed=seed)


def _run_key(args: argparse.Namespace, attack: Any) -> str:
    """Identifies a run: what decides its numbers."""
    from attack.cli.requirements import threat_record

    decisive = {
        "attack": attack.name,
        "config": attack.plain_settings(),
        "labels": args.pseudo_label_init,
        "labels_only": args.labels_only,
        "threat": threat_record(args),
        "seed": args.seed,
        "metric": [args.metric, args.one_to_one_similarity, args.GInfoR, args.lpips_weights],
        "prior": None if args.prior is None else _sha256(args.prior),
        "checkpoint": _sha256(args.checkpoint),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def finished_record(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of the same run, if it was finished before."""
    path = folder / "record.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record.get("key") == key else None


class _Curve:
    """Watches the attack from outside: PSNR over iterations, and pictures on the way."""

    def __init__(self, args: argparse.Namespace, folder: Path, truth: Any, key: str) -> None:
        self.folder, self.save_every = folder, args.save_every
        self.truth = truth if args.metric else None
        # A continued run keeps the points of the interrupted one.
        self.file = folder / f"state-{key}-curve.json"
        self.points: list[dict[str, float]] = []
        if self.file.exists():
            self.points = json.loads(self.file.read_text())

    def every(self, iterations: int | None) -> int:
        """Iterations between two snapshots."""
        if self.save_every:
            return int(self.save_every)
        if self.truth is None or iterations is None:
            return 0
        return max(1, iterations // SNAPSHOTS_OF_A_CURVE)

    def __call__(self, iteration: int, images: Any) -> None:
        from attack.metrics import assign, psnr
        from core.pictures import save_images
        from core.storage import write_json

        if self.truth is not None:
            ordered = images[assign(images, self.truth.images)]
            mean = float(psnr(ordered, self.truth.images).mean())
            # Iterations after the last saved state are run again.
            earlier = [point for point in self.points if point["iteration"] < iteration]
            self.points = [*earlier, {"iteration": iteration, "psnr": mean}]
            write_json(self.file, self.points)
        if self.save_every:
            name = f"progress_{iteration:06d}.png"
            save_images(self.folder / name, images, title=f"iteration {iteration}")


def search_trial(options: dict[str, Any], config: dict[str, Any], report: Any) -> None:
    """One trial of the search: the attack on the simulated checkpoint with some flags changed."""
    import torch

    from gradients.checkpoint import load_target

    args = argparse.Namespace(**{**options, **config})
    import_plugin(args.plugin)
    args.explicit = sorted({*args.explicit, *config})
    args.epochs = int(config.get("epochs", options["HP_epochs"]))
    target, truth = load_target(args.simulation_checkpoint, "--simulation-checkpoint")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    attack = make_attack(args)
    attack.reconstruct(
        target,
        labels=_labels(args, target, truth, attack),
        device=device,
        seed=args.seed,
        print_every=args.print_freq,
        report=report,
    )


def _search(args: argparse.Namespace) -> None:
    """Find hyper-parameters on the simulated checkpoint and put them into `args`."""
    import functools

    from attack.cli.search import published_space, search

    names = [name for name in TUNABLE if getattr(args, f"{name}_tune")]
    result = search(
        functools.partial(search_trial, vars(args)),
        published_space(*names),
        num_samples=args.num_samples,
        max_concurrent=args.max_concurrent,
        gpus_per_trial=args.ngpus_per_trial,
        min_t=args.min_t,
        max_t=args.max_t,
        seed=args.seed,
        verbose=args.verbose,
    )
    found = {name: result.config[name] for name in names}
    print(f"best setting (gradient loss {result.loss:.4g}): {found}")
    for name, value in found.items():
        setattr(args, name, value)
    args.explicit = sorted({*args.explicit, *names})
