"""The command line of stage 3; without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse

from attack.settings import TOPICS
from core.launch_arguments import CommandParser, add_launch_arguments
from core.settings import add_flags

# The hyper-parameters that `--superparameters-search` can search, as argparse names them.
TUNABLE = ("epochs", "lr", "TV", "BN", "input_norm", "grads_weight")


def build_parser() -> argparse.ArgumentParser:
    """The command line of stage 3, with the published defaults."""
    parser = CommandParser(
        prog="main_run.py", description="Invert a gradient checkpoint and measure the leakage."
    )
    _add_run_arguments(parser)
    for settings in TOPICS.values():
        add_flags(parser, settings, settings.title)
    _add_label_arguments(parser)
    _add_metric_arguments(parser)
    _add_search_arguments(parser)
    add_launch_arguments(parser)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", default="test", help="name of the run")
    parser.add_argument("--root", default="results/", metavar="DIR", help="results go to ROOT/ID")
    parser.add_argument("--checkpoint", metavar="PATH", help="gradient checkpoint of stage 2")
    parser.add_argument(
        "--attack", default=None, help="an attack's published setting; explicit flags still count"
    )
    parser.add_argument(
        "--plugin", default=None, metavar="MODULE", help="imported first; may register attacks, ..."
    )
    parser.add_argument(
        "--threat",
        default=None,
        metavar="NAME",
        help="what the attacker is given: honest-server, honest-server-with-bn, "
        "eavesdropper-no-labels, malicious-server, worst-case, ..., or a letter from A to H "
        "(default: custom, as the flags say)",
    )
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="your function that builds the client's model, for a checkpoint of your own module",
    )
    parser.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="your function of (outputs, targets), for a checkpoint of your own loss",
    )
    parser.add_argument(
        "--prior", metavar="IMAGE", help="file of the image that --start prior uses"
    )
    parser.add_argument(
        "--spread",
        choices=["batch", "restarts"],
        default="batch",
        help="what several processes share: the images of the batch, or the restarts",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        metavar="PATH[=FOLDER]",
        help="further checkpoints, attacked in this process with the same flags, at once where "
        "they share a model; their results go to FOLDER/ID (default: ROOT/ID-2, ROOT/ID-3, ...)",
    )
    parser.add_argument(
        "--targets-at-once",
        type=int,
        default=0,
        metavar="N",
        help="with --beside: targets per batched run (0: all, where that pays; 1: in turn)",
    )
    parser.add_argument("--state-every", type=int, default=500, help="iterations between saves")


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels")
    group.add_argument(
        "--pseudo-label-init",
        default="exact",
        help="exact (what is exact for this update), known, llg, from_grads, or another rule",
    )
    group.add_argument(
        "--labels-only", action="store_true", help="recover labels by every rule, and end"
    )


def _add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument("--metric", action="store_true", help="compare with the true images")
    group.add_argument(
        "--one-to-one-similarity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one assignment for all metrics; off: the best match per metric",
    )
    group.add_argument(
        "--lpips-weights", default=None, metavar="DIR", help="folder of the LPIPS weights"
    )
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
