"""Stage 3 as a command: invert a gradient checkpoint and measure what was recovered."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.launch_arguments import (
    CommandParser,
    LaunchSettings,
    add_launch_arguments,
    given_flags,
)
from core.plugins import import_plugin

# Flag (as argparse names it) -> field of InversionConfig.
FIELDS = {
    "epochs": "iterations",
    "lr": "lr",
    "lr_min": "lr_min",
    "lr_schedule": "schedule",
    "warmup": "warmup",
    "optim": "optimizer",
    "gradient_loss_fun": "objective",
    "layers": "layers",
    "signed": "signed",
    "soft_sign": "soft_sign",
    "grads_weight": "gradient_weight",
    "TV": "tv",
    "tv_kind": "tv_kind",
    "BN": "bn",
    "features": "features",
    "input_norm": "input_norm",
    "colour": "colour",
    "patch": "patch",
    "patch_size": "patch_size",
    "Group": "group",
    "group_start": "group_start",
    "group_every": "group_every",
    "registration": "registration",
    "balance": "balance",
    "balance_end": "balance_end",
    "balance_hold": "balance_hold",
    "coordinates": "coordinates",
    "box": "box",
    "input_noise": "input_noise",
    "start": "start",
    "n_seed": "restarts",
    "restarts_at_once": "restarts_at_once",
    "halving": "halving",
    "race": "race",
    "MinCombine": "combine",
    "T_in": "combine_every",
    "min_grads_loss": "smallest_loss",
    "target_tv": "target_tv",
    "patience": "patience",
    "time_budget": "time_budget",
    "hvp": "hvp",
    "polish": "polish",
    "joint_labels": "joint_labels",
    "exact_bn": "exact_bn",
    "bn_from_update": "bn_from_update",
    "double": "double",
    "adaptive": "adaptive",
    "compile": "compile",
    "cuda_graphs": "cuda_graphs",
    "precision": "precision",
    "channels_last": "channels_last",
}
TUNABLE = ("epochs", "lr", "TV", "BN", "input_norm", "grads_weight")
SNAPSHOTS_OF_A_CURVE = 20


def build_parser() -> argparse.ArgumentParser:
    """The command line of stage 3, with the published defaults."""
    parser = CommandParser(
        prog="main_run.py", description="Invert a gradient checkpoint and measure the leakage."
    )
    parser.add_argument("--id", default="test", help="name of the run")
    parser.add_argument("--root", default="results/", metavar="DIR", help="results go to ROOT/ID")
    parser.add_argument("--checkpoint", metavar="PATH", help="gradient checkpoint of stage 2")
    parser.add_argument(
        "--attack", default=None, help="an attack's published setting; explicit flags still count"
    )
    parser.add_argument(
        "--plugin", default=None, metavar="MODULE", help="imported first; may register attacks, ..."
    )
    _add_threat_arguments(parser)
    _add_loss_arguments(parser)
    _add_loop_arguments(parser)
    _add_speed_arguments(parser)
    _add_label_arguments(parser)
    _add_combination_arguments(parser)
    _add_metric_arguments(parser)
    _add_search_arguments(parser)
    add_launch_arguments(parser)
    return parser


def _add_threat_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("threat model")
    group.add_argument(
        "--threat",
        default=None,
        metavar="NAME",
        help="what the attacker is given: honest-server, honest-server-with-bn, "
        "eavesdropper-no-labels, malicious-server, worst-case, ... (default: custom, as the "
        "flags say)",
    )
    group.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the client's defense into account (default: only with --attack auto)",
    )


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective and priors")
    group.add_argument(
        "--gradient-loss-fun", choices=["sim", "L2", "layer-sim", "layer-L2"], default="sim"
    )
    group.add_argument("--layers", default=None, help="linear, exp, decay, first:K or last:K")
    group.add_argument("--grads-weight", type=float, default=1.0)
    group.add_argument("--TV", type=float, default=0.1, help="weight of total variation")
    group.add_argument("--tv-kind", default="anisotropic", help="isotropic, double-opponents, ...")
    group.add_argument("--BN", type=float, default=0.0, help="weight of the BatchNorm statistics")
    group.add_argument(
        "--exact-bn", action="store_true", help="the target's batch statistics, not running ones"
    )
    group.add_argument(
        "--bn-from-update",
        action="store_true",
        help="those that the client's running statistics after its training give away",
    )
    group.add_argument(
        "--features", type=float, default=0.0, help="weight of the last layer's features"
    )
    group.add_argument("--input-norm", type=float, default=0.0)
    group.add_argument("--colour", type=float, default=0.0, help="weight of the colour prior")
    group.add_argument("--patch", type=float, default=0.0, help="weight of the patch prior (ViT)")
    group.add_argument("--patch-size", type=int, default=16)
    group.add_argument(
        "--balance",
        type=float,
        default=None,
        help="step along the priors relative to the objective's, instead of fixed weights",
    )
    group.add_argument("--balance-end", type=float, default=None, help="what it falls to")
    group.add_argument(
        "--balance-hold", type=float, default=0.0, help="it stays while the objective is below"
    )


def _add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--n-seed", type=int, default=1, help="restarts")
    group.add_argument(
        "--restarts-at-once", type=int, default=0, metavar="N", help="per batched call (0: auto)"
    )
    group.add_argument(
        "--spread",
        choices=["batch", "restarts"],
        default="batch",
        help="what several processes share: the images of the batch, or the restarts",
    )
    group.add_argument("--halving", action="store_true", help="drop the worse restarts early")
    group.add_argument(
        "--race",
        type=int,
        default=0,
        metavar="N",
        help="starts that compete for the iterations of each restart",
    )
    group.add_argument("--optim", default="Adam", help="Adam, AdamW, SGD or LBFGS")
    group.add_argument("--epochs", type=int, default=15000, help="iterations")
    group.add_argument("--lr", type=float, default=0.1)
    group.add_argument("--lr-min", type=float, default=1e-3, help="end of the cosine schedule")
    group.add_argument("--lr-schedule", default="cosine", help="cosine, step or constant")
    group.add_argument("--warmup", type=int, default=0, metavar="N")
    group.add_argument(
        "--signed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="sign of the image gradient only (default: with sim)",
    )
    group.add_argument(
        "--soft-sign", action="store_true", help="tanh in place of the sign (with --no-signed)"
    )
    group.add_argument("--min-grads-loss", action="store_true", help="keep the smallest loss")
    group.add_argument("--target-tv", type=float, default=0.28, help="stop below (0: never)")
    group.add_argument("--patience", type=int, default=0, metavar="N")
    group.add_argument("--time-budget", type=float, default=None, metavar="SECONDS")
    group.add_argument("--input-noise", type=float, default=0.0)
    group.add_argument("--start", default="normal", help="normal, uniform, zeros, pattern, prior")
    group.add_argument("--prior", metavar="IMAGE", help="file of the image that --start prior uses")
    group.add_argument("--coordinates", default="pixels", help="pixels, dct or dct:EXPONENT")
    group.add_argument("--box", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--hvp", choices=["auto", "exact", "difference"], default="auto")
    group.add_argument("--polish", type=int, default=0, help="final iterations of L-BFGS")
    group.add_argument("--double", action="store_true", help="compute in float64")
    group.add_argument("--state-every", type=int, default=500, help="iterations between saves")


def _add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed (off by default: each moves the last digits)")
    group.add_argument(
        "--compile", action="store_true", help="compile the two passes of the difference"
    )
    group.add_argument(
        "--cuda-graphs", action="store_true", help="capture and replay them (CUDA only)"
    )
    group.add_argument(
        "--precision",
        choices=["float32", "tf32", "bf16"],
        default="float32",
        help="of matrix products, as long as the gradient stays the same",
    )
    group.add_argument("--channels-last", action="store_true", help="memory layout on tensor cores")


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels")
    group.add_argument(
        "--pseudo-label-init", default="llg", help="llg, from_grads, known, or another rule"
    )
    group.add_argument("--joint-labels", action="store_true", help="optimise the labels as well")
    group.add_argument(
        "--labels-only", action="store_true", help="recover labels by every rule, and end"
    )


def _add_combination_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several restarts (E2EGI)")
    group.add_argument("--MinCombine", action="store_true", help="fuse restarts by minimum loss")
    group.add_argument("--Group", type=float, default=0.0, help="weight of group consistency")
    group.add_argument(
        "--group-start", type=float, default=0.0, metavar="SHARE", help="of the iterations"
    )
    group.add_argument("--group-every", type=int, default=1, metavar="N", help="renewal")
    group.add_argument("--registration", action="store_true", help="align restarts (GradInversion)")
    group.add_argument("--T-init-rate", type=float, default=0.3)
    group.add_argument("--total-T-in-rate", type=float, default=0.3)
    group.add_argument("--T-in", type=int, default=1000)
    group.add_argument("--T-end-rate", type=float, default=0.4)


def _add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument("--metric", action="store_true", help="compare with the true images")
    group.add_argument(
        "--one-to-one-similarity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one assignment for all metrics; off: the best match per metric",
    )
    group.add_argument("--lpips-weights", default=None, metavar="DIR")
    group.add_argument("--GInfoR", action="store_true", help="gradient information ratio table")
    group.add_argument("--save-every", type=int, default=0, help="iterations between pictures")
    group.add_argument("--quiet", action="store_true", help="no tables on screen")


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hyper-parameter search (Ray Tune)")
    group.add_argument("--superparameters-search", action="store_true")
    group.add_argument("--simulation-checkpoint", metavar="PATH")
    group.add_argument("--max-concurrent", type=int, default=8)
    group.add_argument("--num-samples", type=int, default=16)
    group.add_argument("--ngpus-per-trial", type=float, default=0.5)
    for name in TUNABLE:
        flag = name.replace("_", "-")
        group.add_argument(f"--{flag}-tune", action="store_true", help=f"search --{flag}")
    group.add_argument("--max-t", type=int, default=3000)
    group.add_argument("--min-t", type=int, default=2000)
    group.add_argument("--HP-epochs", type=int, default=5000, help="iterations of a trial")
    group.add_argument("--verbose", type=int, default=3)


def main(argv: list[str] | None = None) -> None:
    """Run stage 3.

    Raises:
        InputError: One sentence on what is wrong with the command line or a file.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.explicit = sorted(given_flags(parser, argv))
    import_plugin(args.plugin)
    _take_label_rule(args)
    _check(args)

    from core.processes.launch import launch

    if args.superparameters_search:
        _search(args)
    launch(run, LaunchSettings.from_arguments(args), args)


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
    from core.processes.launch import check_launch
    from gradients.checkpoint import load_target

    check_launch(LaunchSettings.from_arguments(args))
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
        config.acceleration.check_device("cuda" if cuda else "cpu")


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
    from attack.settings import InversionConfig

    values = {field: getattr(args, flag) for flag, field in FIELDS.items()}
    values["adaptive"] = bool(args.adaptive)
    if args.signed is None:
        # L-BFGS measures curvature by differences of true gradients.
        values["signed"] = args.gradient_loss_fun == "sim" and args.optim != "LBFGS"
    values["target_tv"] = args.target_tv or None
    values["stages"] = (args.T_init_rate, args.total_T_in_rate, args.T_end_rate)
    if args.attack is None:
        config = InversionConfig(**values)
        config.validate()
        return type("SeedAttack", (OptimizationAttack,), {"name": "seed"})(config)
    attack = get_attack(args.attack)
    given = {FIELDS[flag]: values[FIELDS[flag]] for flag in args.explicit if flag in FIELDS}
    if not issubclass(attack, OptimizationAttack):
        granted = {"granted": granted_capabilities(args), "adaptive": adapts(args)}
        return attack.configured(given | granted)
    config = dataclasses.replace(attack.published, **given)
    config.validate()
    return attack(config)


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
        snapshot_every=curve.every(getattr(attack, "config", None)),
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

    config = getattr(attack, "config", None)
    decisive = {
        "attack": attack.name,
        "config": None if config is None else dataclasses.asdict(config),
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

    def every(self, config: Any) -> int:
        """Iterations between two snapshots."""
        if self.save_every:
            return int(self.save_every)
        if self.truth is None or config is None:
            return 0
        return max(1, int(config.iterations) // SNAPSHOTS_OF_A_CURVE)

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
