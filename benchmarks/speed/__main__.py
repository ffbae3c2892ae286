"""Measure the speed of everything and write records and a table.

python -m benchmarks.speed            the full measurement, on an idle machine
python -m benchmarks.speed --quick    a few cases, two minutes
python -m benchmarks.speed --device cuda    iterations, restarts and levers on a GPU
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError, exit_status

if TYPE_CHECKING:
    from benchmarks.speed.cases import Case

Rows = Iterator[dict[str, Any]]
# Of each method; the middle one counts.
MEMORY_RUNS = 9


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument(
        "--only", metavar="NAMES", help=f"sections, comma-separated: {', '.join(MEASUREMENTS)}"
    )
    parser.add_argument("--cases", metavar="NAMES", help="targets of the section iterations")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the sections gpu-..."
    )
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="per case, after three rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/speed", metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the sections; each writes its record and renews the table."""
    args = build_parser().parse_args(argv)
    sections = args.only.split(",") if args.only else _sections_of(args.device)
    unknown = [name for name in sections if name not in MEASUREMENTS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: unknown; known are {', '.join(MEASUREMENTS)}")
    _check_numbers(args)
    _check_cases(args)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in sections:
        _run_section(name, args)
    print((Path(args.output) / "table.md").read_text(encoding="utf-8"))


def _sections_of(device: str) -> list[str]:
    """The sections that are measured on a device, all on the CPU or all on the GPU."""
    return [name for name in MEASUREMENTS if name.startswith("gpu-") == (device == "cuda")]


def _check_numbers(args: argparse.Namespace) -> None:
    if args.repeats < 1:
        raise InputError(f"--repeats {args.repeats}: must be at least 1")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads}: must be at least 1")


def _check_cases(args: argparse.Namespace) -> None:
    from benchmarks.speed.iterations import check_names

    check_names(args.cases.split(",") if args.cases else [])


def _run_section(name: str, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from benchmarks.speed.pages import read_records
    from benchmarks.speed.render import render
    from core.storage import write_json, write_text

    folder, made = Path(args.output), _provenance(args)
    rows: list[dict[str, Any]] = []
    for row in tqdm(MEASUREMENTS[name](args), desc=name, unit="row"):
        rows.append(row)
        # What is measured stays, also where the rest is interrupted.
        write_json(folder / f"{name}.json", {"rows": rows, "provenance": made})
    write_text(folder / "table.md", render(read_records(folder)))


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    import os

    import torch

    from core.records import provenance

    return {
        **provenance(torch.device(args.device), args.seed),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "quick": args.quick,
    }


def _processor() -> str:
    """Its name as the operating system knows it."""
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _chosen(args: argparse.Namespace) -> list[Case]:
    from benchmarks.speed.cases import CASES
    from benchmarks.speed.iterations import check_names

    if args.cases:
        return check_names(args.cases.split(","))
    return [case for case in CASES.values() if case.quick or not args.quick]


def _iterations(args: argparse.Namespace) -> Rows:
    import torch

    from benchmarks.speed.iterations import measure_case

    for case in _chosen(args):
        seconds = args.seconds / (5 if args.quick else 1)
        yield measure_case(case, args.repeats, seconds, args.seed, torch.get_num_threads())


def _restarts(args: argparse.Namespace) -> Rows:
    from benchmarks.speed.cases import CASES, SMALL_CASE
    from benchmarks.speed.iterations import measure_restarts

    names = [] if args.quick else ["convnet-32px-b1-eval", "resnet18-32px-b1-eval"]
    for case in [SMALL_CASE, *(CASES[name] for name in names)]:
        yield measure_restarts(case, 8, min(args.repeats, 5), args.seed)


def _memory(args: argparse.Namespace) -> Rows:
    from benchmarks.speed.timing import in_subprocess

    for case in ["resnet18-32px-b1-eval" if args.quick else "resnet18-224px-b4-train"]:
        for method in ("R1", "R2", "ours"):
            words = ["--case", case, "--method", method, "--seed", str(args.seed)]
            runs = 1 if args.quick else MEMORY_RUNS
            texts = [in_subprocess("benchmarks.speed.memory", *words) for _ in range(runs)]
            found = [json.loads(text.splitlines()[-1]) for text in texts]
            # What a heap has in holes differs from run to run.
            middle = sorted(found, key=lambda run: run["peak_bytes"])[len(found) // 2]
            yield {"case": case, "method": method, "runs": runs, **middle}


def _processes(args: argparse.Namespace) -> Rows:
    from benchmarks.speed.cases import CASES, SMALL_CASE
    from benchmarks.speed.iterations import measure_processes

    models, modes = ("convnet", "resnet18"), ("eval", "train")
    names = [f"{model}-32px-b8-{mode}" for model in models for mode in modes]
    for name in [SMALL_CASE.name] if args.quick else names:
        for processes in (1, 2) if args.quick else (1, 2, 4):
            yield measure_processes(CASES[name], processes, min(args.repeats, 5), args.seed)


def _levers(args: argparse.Namespace) -> Rows:
    from benchmarks.speed.levers import measure_levers

    yield from measure_levers(args.quick, min(args.repeats, 7), args.seed)


def _parts(args: argparse.Namespace) -> Rows:
    from benchmarks.speed.parts import measure_parts

    yield from measure_parts(args.quick, args.seed)


def _on_device(args: argparse.Namespace, measure: str) -> Rows:
    import torch

    from benchmarks.speed import gpu

    device = torch.device(args.device)
    for case in _chosen(args):
        yield from getattr(gpu, measure)(case, device, args.repeats, args.seed)


def _gpu_iterations(args: argparse.Namespace) -> Rows:
    yield from _on_device(args, "measure_iterations")


def _gpu_restarts(args: argparse.Namespace) -> Rows:
    yield from _on_device(args, "measure_restarts")


def _gpu_levers(args: argparse.Namespace) -> Rows:
    yield from _on_device(args, "measure_levers")


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "iterations": _iterations,
    "restarts": _restarts,
    "memory": _memory,
    "processes": _processes,
    "levers": _levers,
    "parts": _parts,
    "gpu-iterations": _gpu_iterations,
    "gpu-restarts": _gpu_restarts,
    "gpu-levers": _gpu_levers,
}


if __name__ == "__main__":
    sys.exit(exit_status(main))
