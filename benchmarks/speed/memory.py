"""Peak memory of one method on one case, in a process of its own.

python -m benchmarks.speed.memory --case resnet18-224px-b4-eval --method ours
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from benchmarks.speed.cases import CASES, make_problem
from benchmarks.speed.iterations import METHODS
from benchmarks.speed.timing import forget_peak, peak_bytes, resident_bytes
from core.errors import exit_status


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Run three iterations and print the peak, and what was there before, as JSON."""
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    imports = resident_bytes()
    problem = make_problem(CASES[args.case], args.seed)
    forget_peak()
    held = resident_bytes()
    iteration = METHODS[args.method](problem)
    for _ in range(3):
        iteration()
    print(json.dumps({"peak_bytes": peak_bytes(), "held_bytes": held, "import_bytes": imports}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
