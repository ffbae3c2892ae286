"""Everything that waits for a GPU, one part after the other, within a time.

python -m benchmarks.speed.gpu_suite                all parts, at most 25 minutes
python -m benchmarks.speed.gpu_suite --only tests,iterations
python -m benchmarks.speed.gpu_suite --list

Tests that need a GPU, the iteration, levers (CUDA graphs, compilation, bf16) with the picture
beside them, restarts and targets that fill the card, ranks that share it, attacks of the published
24,000 iterations at 224 px, and then published settings that are too long for a processor. Each
part is a process with a time of its own. Records and `suite.json` are written as they come;
interrupted or cut, the same command goes on with what is missing. `make gpu` is this command.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from core.errors import InputError, exit_status
from core.launch_arguments import CommandParser
from core.reading import read_json_object
from core.storage import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "speed" / "gpu"
STATE = "suite.json"
BUDGET = 25.0
FINISHED, CUT, FAILED = "finished", "cut", "failed"
# What a part is given to write its record after it was asked to end.
GRACE = 10.0
# A part that is begun with less shows nothing.
LEAST_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    Attributes:
        name: Short and unique.
        what: For people.
        words: After `python -m`; `{device}`, `{output}` and `{minutes}` are filled in.
        minutes: It takes at most.
    """

    name: str
    what: str
    words: tuple[str, ...]
    minutes: float


def _section(name: str, what: str, minutes: float, *more: str) -> Part:
    words = ("benchmarks.speed", "--device", "{device}", "--only", f"gpu-{name}", "--resume")
    return Part(name, what, (*words, "--output", "{output}", *more), minutes)


PARTS = (
    Part(
        "tests",
        "tests that need a GPU",
        ("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml={output}/tests.xml"),
        5.0,
    ),
    _section("iterations", "seconds of an iteration, by model and batch", 3.0, "--repeats", "9"),
    Part(
        "images",
        "24,000 iterations at 224 px",
        ("benchmarks.speed.gpu_images", "--device", "{device}", "--batches", "1,8",
         "--cuda-graphs", "--resume", "--output", "{output}"),
        8.0,
    ),
    _section("levers", "CUDA graphs, compilation, bf16", 6.0, "--repeats", "7"),
    _section("restarts", "restarts in one call", 2.0),
    _section("targets", "targets in one call", 2.0),
    _section("ranks", "ranks on one card", 2.0),
    Part(
        "fidelity",
        "published settings",
        ("benchmarks", "fidelity", "--device", "{device}", "--budget", "{minutes}"),
        10.0,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        part: Its name.
        status: "finished", "cut" at the end of its time, or "failed".
        seconds: It took.
        device: The device's name.
        torch: Version.
        tests: Counts by outcome, of the tests.
    """

    part: str
    status: str
    seconds: float
    device: str
    torch: str
    tests: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Suite:
    """Parts, where and for how long.

    Attributes:
        parts: In the order in which they run.
        device: "cuda", or "cpu" to try the command itself.
        device_name: As the driver says it.
        folder: Of all records.
        seconds: For all parts.
        again: Run parts again that have finished.
        clock: Tells the time in seconds.
    """

    parts: Sequence[Part]
    device: str
    device_name: str
    folder: Path = RESULTS
    seconds: float = 60 * BUDGET
    again: bool = False
    clock: Callable[[], float] = time.monotonic


def run(suite: Suite) -> list[Outcome]:
    """Run what is missing; returns what became of every part, of earlier runs too.

    Raises:
        KeyboardInterrupt: The part that ran was ended; the next run begins with it.
    """
    import torch

    suite.folder.mkdir(parents=True, exist_ok=True)
    known = _known(suite, torch.__version__)
    began = suite.clock()
    for part in suite.parts:
        if part.name in known and known[part.name].status == FINISHED and not suite.again:
            print(f"{part.name}: finished before", flush=True)
            continue
        left = suite.seconds - (suite.clock() - began)
        if left < LEAST_SECONDS:
            print(f"{part.name}: no time is left; the same command goes on", flush=True)
            continue
        limit = min(60 * part.minutes, left)
        print(f"{part.name}: {part.what}, at most {limit / 60:.1f} minutes", flush=True)
        known[part.name] = _run_part(part, suite, limit, torch.__version__)
        state = {"parts": [asdict(known[p.name]) for p in PARTS if p.name in known]}
        write_json(suite.folder / STATE, state)
        print(f"{part.name}: {_told(known[part.name])}", flush=True)
    return list(known.values())


def _known(suite: Suite, version: str) -> dict[str, Outcome]:
    """What an earlier run on the same device with the same torch left."""
    path = suite.folder / STATE
    if not path.exists():
        return {}
    state = read_json_object(path, "--output", "state of the suite")
    found = [Outcome(**entry) for entry in state["parts"]]
    return {o.part: o for o in found if (o.device, o.torch) == (suite.device_name, version)}


def _run_part(part: Part, suite: Suite, limit: float, version: str) -> Outcome:
    log = suite.folder / "logs" / f"{part.name}.txt"
    log.parent.mkdir(exist_ok=True)
    filled = {"device": suite.device, "output": str(suite.folder), "minutes": f"{limit / 60:.2f}"}
    words = [sys.executable, "-m", *(word.format(**filled) for word in part.words)]
    begun = suite.clock()
    with log.open("wb") as output:
        status = _wait(words, output.fileno(), limit)
    tests = _counted(suite.folder / "tests.xml") if part.name == "tests" else None
    if status is None:
        outcome = CUT
    else:
        outcome = FINISHED if status == 0 else FAILED
    spent = suite.clock() - begun
    return Outcome(part.name, outcome, spent, suite.device_name, version, tests)


def _wait(words: Sequence[str], output: int, limit: float) -> int | None:
    """Status of a command; None where it was ended because its time was over."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started: asked first, then killed."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _counted(report: Path) -> dict[str, int] | None:
    """How many tests passed, failed and were left out, by pytest's own report."""
    if not report.exists():
        return None
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    # The report names the machine.
    counted = [{k: int(s.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
               for s in suites]  # fmt: skip
    report.unlink()
    total = {key: sum(one[key] for one in counted) for key in counted[0]} if counted else {}
    failed = total.pop("failures", 0) + total.pop("errors", 0)
    skipped = total.get("skipped", 0)
    passed = total.get("tests", 0) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped}


def _told(outcome: Outcome) -> str:
    words = f"{outcome.status} after {outcome.seconds:.0f} s"
    if outcome.tests is not None:
        words += f", {', '.join(f'{n} {kind}' for kind, n in outcome.tests.items())}"
    return words


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.speed.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--list", action="store_true", help="show the parts and end")
    parser.add_argument("--only", metavar="PART,...", help=f"of {names}")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="MINUTES", help="for all (default: 25)"
    )
    parser.add_argument("--again", action="store_true", help="also parts that have finished")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to try the command"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts and renew the pages that show their records."""
    args = build_parser().parse_args(argv)
    chosen = _chosen(args.only)
    if not args.budget > 0:
        raise InputError("--budget must be above 0 minutes")
    if args.list:
        for part in chosen:
            print(f"{part.name:12} {part.minutes:4.0f} min  {part.what}")
        return
    suite = Suite(
        chosen, args.device, _device_name(args.device), args.output.resolve(), 60 * args.budget,
        args.again,
    )  # fmt: skip
    outcomes = run(suite)
    if args.output.resolve() == RESULTS:
        _renew_pages()
    failed = [o.part for o in outcomes if o.status == FAILED]
    if failed:
        logs = suite.folder / "logs"
        raise InputError(f"failed: {', '.join(failed)}; what they said stands in {logs}")


def _chosen(only: str | None) -> list[Part]:
    if only is None:
        return list(PARTS)
    wanted = only.split(",")
    unknown = [name for name in wanted if name not in {part.name for part in PARTS}]
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        raise InputError(f"--only {unknown[0]}: unknown; known are {known}")
    return [part for part in PARTS if part.name in wanted]


def _device_name(device: str) -> str:
    import torch

    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError("no CUDA GPU: torch sees none here (--device cpu tries the command)")
    return torch.cuda.get_device_name()


def _renew_pages() -> None:
    from benchmarks.speed.pages import main as renew

    renew([])


if __name__ == "__main__":
    sys.exit(exit_status(main))
