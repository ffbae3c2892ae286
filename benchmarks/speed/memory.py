"""Peak memory of one method on one case, in a process of its own.

python -m benchmarks.speed.memory --case resnet18-224px-b4-eval --method ours
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from benchmarks.speed import references
from benchmarks.speed.cases import CASES, Case, make_problem
from benchmarks.speed.iterations import METHODS
from benchmarks.speed.timing import forget_peak, peak_bytes, resident_bytes
from core.errors import exit_status
from core.models.building import ModelSpec

# Batches that are too large for a small machine in one piece.
LARGE = (
    Case(ModelSpec("resnet18", 10, 32, "cifar"), 128, False),
    Case(ModelSpec("resnet18", 1000, 224), 32, False),
)
ALL_CASES = {**CASES, **{case.name: case for case in LARGE}}
ITERATIONS = 3


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(ALL_CASES), required=True)
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--images-at-once", type=int, default=0, metavar="N", help="of ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Run three iterations and print the peak, and what was there before, as JSON."""
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    imports = resident_bytes()
    problem = make_problem(ALL_CASES[args.case], args.seed)
    forget_peak()
    held = resident_bytes()
    if args.images_at_once:
        iteration = references.ours_in_pieces(problem, args.images_at_once)
    else:
        iteration = METHODS[args.method](problem)
    # The first one may compare two ways.
    taken = []
    for _ in range(ITERATIONS):
        begun = time.process_time()
        iteration()
        taken.append(time.process_time() - begun)
    found = {"peak_bytes": peak_bytes(), "held_bytes": held, "import_bytes": imports}
    print(json.dumps({**found, "seconds": min(taken)}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
