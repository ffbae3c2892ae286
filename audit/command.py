"""The command `gradinvbench audit`: what does our own update give away?"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import InputError
from core.launch_arguments import CommandParser

if TYPE_CHECKING:
    from audit.data import SiteData
    from audit.request import AuditRequest, AuditSettings

MS6 = "ms6"
# What --received-only writes into the folder of the report.
RECEIVED = "received.json"
# Of a class representative, as the protocol has them.
PROTOCOL_RESTARTS = 50
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?)\s*([a-z]*)")
_OPTIMISER = re.compile(r"(sgd|adamw?)(\s|$)|[a-z-]+=", re.IGNORECASE)
EXAMPLE = """\
--local names the file of the local model, and may be given a second time to say what is known of
the local training (as --local-training does). What is not said is estimated, and stated as such.

    gradinvbench audit --global G.pt --local W.pt --model mymodel:build --loss cross-entropy \\
        --data DIR --local "sgd lr=0.1 momentum=0.9 epochs=1 batch-size=8" --report out/

Nothing is written but under --report (and --keep-images); there is no image and no file name in it.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of an audit."""
    parser = CommandParser(
        prog="gradinvbench audit",
        description="Measure what an update gives away of the images that it was trained on.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_update(parser.add_argument_group("the update"))
    _add_data(parser.add_argument_group("the site's images"))
    _add_audit(parser.add_argument_group("the audit"))
    return parser


def _add_update(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--global", dest="global_state", metavar="FILE", required=True,
        help="the model that the site received",
    )  # fmt: skip
    group.add_argument(
        "--local", action="append", metavar="FILE|WORDS", default=[],
        help="the model that the site produced (or the difference); once more: its training, such "
        'as "adamw lr=1e-3 epochs=1 batch-size=8"',
    )  # fmt: skip
    group.add_argument("--local-training", metavar="WORDS", help="its training, as by --local")
    group.add_argument(
        "--model", metavar="MODULE:FUNCTION", required=True,
        help="your function that builds the model",
    )  # fmt: skip
    group.add_argument(
        "--loss", metavar="NAME",
        help="cross-entropy (default), binary-cross-entropy, mse, ... or MODULE:FUNCTION",
    )  # fmt: skip
    group.add_argument(
        "--rounds", nargs="+", default=[], metavar="FILE",
        help="global models after each round, for the trajectory of losses",
    )  # fmt: skip
    group.add_argument(
        "--final", metavar="FILE",
        help="the federation's final model, for membership and class representatives (default: "
        "the last of --rounds, or --global)",
    )  # fmt: skip
    group.add_argument(
        "--single-site", nargs="+", default=[], metavar="FILE",
        help="a model trained on this site's images alone; of several, one after each round",
    )  # fmt: skip
    group.add_argument(
        "--previous", metavar="FILE",
        help="the model that the site received a round before, to compare with",
    )  # fmt: skip
    group.add_argument(
        "--received-only", action="store_true",
        help="say whether --global looks as if it was made to leak, and stop: nothing needs to be "
        "trained yet, and --local takes words alone",
    )  # fmt: skip
    group.add_argument("--round", type=int, metavar="N", help="of the update, for the report")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", metavar="DIR|MODULE:NAME", required=True,
        help="folder with members/ and non_members/, each with a folder per class of pictures, "
        ".npy arrays or NIfTI volumes; or with members.csv and non_members.csv; or with "
        "members.txt, non_members.txt and tokenizer.json; or an object of yours that gives both",
    )  # fmt: skip
    group.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="side that pictures are resized to, or tokens of a sentence",
    )
    group.add_argument(
        "--classes", default="", metavar="A,B", help="class folders in the order of the outputs"
    )
    group.add_argument("--mean", default="0", metavar="M,...", help="of the normalisation of a DIR")
    group.add_argument("--std", default="1", metavar="S,...", help="its standard deviation")


def _add_audit(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--report", required=True, metavar="DIR", help="where results are written")
    group.add_argument("--budget", default="2h", metavar="TIME", help="such as 90s, 15m or 2h")
    group.add_argument("--attack", default="auto", help="auto: those that the update allows")
    group.add_argument("--iterations", type=int, metavar="N", help="of an inversion")
    group.add_argument("--plants", type=int, metavar="N", help="planted images per setting")
    group.add_argument("--alpha", type=float, default=0.05, help="share of false alarms at most")
    group.add_argument("--seed", type=int, default=0, help="seed of every random number")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    group.add_argument(
        "--no-membership", dest="membership", action="store_false",
        help="leave out membership and class representatives",
    )  # fmt: skip
    group.add_argument(
        "--no-remedies", dest="remedies", action="store_false",
        help="do not look for the smallest defense that helps",
    )  # fmt: skip
    group.add_argument("--protocol", choices=[MS6], help="also write this protocol's report")
    group.add_argument(
        "--keep-images", type=Path, metavar="DIR", help="keep reconstructions there, at the site"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Audit an update, print the page and write the reports; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.received_only:
        return _look(args)
    request, report = read_request(args), Path(args.report)
    from audit.reports import write_reports
    from audit.run import audit
    from audit.show.page import page_of

    record = audit(request, report=report, progress=True)
    write_reports(record, report, args.protocol)
    print(page_of(record))
    return 0


def _look(args: argparse.Namespace) -> int:
    """Look at the received model alone, say what it looks like and write it as numbers."""
    import dataclasses

    from audit.show.received import words_of
    from audit.suspicion import look_before_training
    from core.client import loss_named
    from core.models.own_model import own_architecture
    from core.models.state_files import read_state
    from core.storage import write_record

    settings = _settings(args)
    files = [v for v in args.local if not _OPTIMISER.match(v.strip())]
    words = [v for v in (*args.local, args.local_training) if v and v not in files]
    if files or len(words) > 1:
        raise InputError("--received-only: give the words of the local training alone by --local")
    received = read_state(args.global_state, "--global")
    previous = None if args.previous is None else read_state(args.previous, "--previous")
    model = own_architecture(args.model, args.seed)
    assert model is not None
    found = look_before_training(
        received, model=model, data=_data(args), loss=loss_named(args.loss), previous=previous,
        local=next(iter(words), None), settings=settings,
    )  # fmt: skip
    write_record(Path(args.report) / RECEIVED, dataclasses.asdict(found))
    print(words_of(found))
    return 0


def _data(args: argparse.Namespace) -> SiteData:
    from audit.data import open_data

    return open_data(
        args.data, size=args.size, class_names=[c for c in args.classes.split(",") if c],
        mean=_numbers(args.mean, "--mean"), std=_numbers(args.std, "--std"), seed=args.seed,
    )  # fmt: skip


def read_request(args: argparse.Namespace) -> AuditRequest:
    """The audit that the flags ask for.

    Raises:
        InputError: One sentence on a flag or a file.
    """
    from audit.request import make_request
    from core.client import loss_named
    from core.models.own_model import own_architecture
    from core.models.state_files import read_state

    settings = _settings(args)
    state, words = local_parts(args.local, args.local_training)
    received, sent = read_state(args.global_state, "--global"), read_state(state, "--local")
    model = own_architecture(args.model, args.seed)
    assert model is not None
    return make_request(
        received, sent, model=model, data=_data(args), loss=loss_named(args.loss), local=words,
        settings=settings, rounds=[read_state(path, "--rounds") for path in args.rounds],
        final=None if args.final is None else read_state(args.final, "--final"),
        single_site=[read_state(path, "--single-site") for path in args.single_site],
        previous=None if args.previous is None else read_state(args.previous, "--previous"),
    )  # fmt: skip


def _settings(args: argparse.Namespace) -> AuditSettings:
    import torch

    from audit.request import AuditSettings

    return AuditSettings(
        attack=args.attack, iterations=args.iterations, plants=args.plants,
        budget=seconds(args.budget), alpha=args.alpha, seed=args.seed,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        membership=args.membership, remedies=args.remedies, keep_images=args.keep_images,
        restarts=PROTOCOL_RESTARTS if args.protocol == MS6 else AuditSettings.restarts,
        round_number=args.round,
    )  # fmt: skip


def local_parts(values: Sequence[str], training: str | None = None) -> tuple[str, str | None]:
    """The file of the local model, and the words of its training, from what `--local` was given.

    Args:
        values: One file and at most one text such as "sgd lr=0.1". What exists is a file.
        training: The words where another flag gave them.

    Raises:
        InputError: Not one file, or more than one text.
    """
    words = [v for v in values if _OPTIMISER.match(v.strip()) and not Path(v).exists()]
    files = [value for value in values if value not in words]
    words += [] if training is None else [training]
    if len(files) != 1:
        given = ", ".join(files) or "none"
        raise InputError(f"--local: give one file of the local model ({given} given)")
    if len(words) > 1:
        raise InputError("--local: the local training is given twice")
    return files[0], next(iter(words), None)


def seconds(text: str) -> float:
    """A time such as 90s, 15m, 2h or 1h30m in seconds; a number alone is seconds.

    Raises:
        InputError: It is no such time.
    """
    parts = _DURATION.findall(text.strip().lower())
    whole = "".join(number + unit for number, unit in parts)
    if not parts or whole != re.sub(r"\s", "", text.lower()) or {u for _, u in parts} - set(_UNITS):
        raise InputError(f"--budget {text}: give a time such as 90s, 15m or 2h")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text}: give numbers, with commas in between") from None
