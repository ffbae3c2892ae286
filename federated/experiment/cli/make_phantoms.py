"""Command: draw the chest phantoms of the federated stage, with the lists of nine sites.

python -m federated.make_phantoms --output data/phantoms --scale 0.1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.errors import exit_status
from core.launch_arguments import CommandParser


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m federated.make_phantoms",
        description="Draw procedural chest radiographs of two classes for nine sites.",
    )
    parser.add_argument("--output", required=True, help="folder for images, lists and prior.png")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published sizes")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of all patients")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from federated.phantoms.data_set import LIST_PREFIX, make_phantoms

    counts = make_phantoms(args.output, scale=args.scale, size=args.size, seed=args.seed)
    sites = sum(n for name, n in counts.items() if name.startswith("site-"))
    print(
        f"{args.output}: {sites} training images of 9 sites, {counts['validation']} validation, "
        f"{counts['testing']} testing; lists {LIST_PREFIX}N.json"
    )
