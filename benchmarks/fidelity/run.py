"""Computing the trials that a record does not hold yet."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.fidelity.beside import installed, version
from benchmarks.fidelity.declare import Compared, Experiment, Row, Trial
from benchmarks.fidelity.record import OURS, Entry, Record, today
from benchmarks.fidelity.samples import Samples
from core.records import provenance


@dataclass(frozen=True)
class Request:
    """What shall be computed.

    Attributes:
        rows: Which.
        named: Whether the user named them: one that cannot be computed is then an error.
        samples: Where images come from.
        weights: Files of trained weights by name.
        device: Where to compute.
        trials: At most so many of each row; None: all.
        second: Whether other packages run, where they are installed.
    """

    rows: tuple[Row, ...]
    named: bool
    samples: Samples
    weights: Mapping[str, Path]
    device: torch.device
    trials: int | None = None
    second: bool = True


@dataclass(frozen=True)
class Job:
    """One trial of one implementation.

    Attributes:
        row: Of it.
        trial: Which.
        implementation: "ours", or a package.
    """

    row: Row
    trial: Trial
    implementation: str


def jobs(request: Request, record: Record) -> list[Job]:
    """What is missing, the cheapest rows first, our trials before those of other packages."""
    rows = [row for row in request.rows if _can_run(row, request)]
    wanted = [job for row in sorted(rows, key=lambda row: row.seconds) for job in _of(row, request)]
    return [job for job in wanted if not _is_held(job, record)]


def _can_run(row: Row, request: Request) -> bool:
    """Whether a row is computed here; a row that the user named is tried in any case."""
    if row.experiment is None:
        return False
    if request.named:
        return True
    affordable = not row.gpu_hours or request.device.type == "cuda"
    return affordable and set(row.experiment.needs) <= set(request.weights)


def _of(row: Row, request: Request) -> Iterator[Job]:
    assert row.experiment is not None
    numbers = range(min(row.trials, request.trials or row.trials))
    second = row.experiment.second if request.second else ""
    for implementation in [OURS, *([second] if installed(second) else [])]:
        for number in numbers:
            trial = Trial(number, request.samples, request.device, request.weights)
            yield Job(row, trial, implementation)


def _is_held(job: Job, record: Record) -> bool:
    """Whether the record has this trial, of this setting and these samples."""
    experiment = job.row.experiment
    assert experiment is not None
    source = job.trial.samples.source(experiment.kind)
    entry = record.find(job.row.name, source, job.trial.number, job.implementation)
    return entry is not None and entry.setting == fingerprint(experiment)


def run(job: Job, record: Record) -> Entry:
    """Compute a trial and write it into the record."""
    experiment = job.row.experiment
    assert experiment is not None
    compute = experiment.ours
    if job.implementation != OURS:
        assert isinstance(experiment, Compared)
        compute = experiment.beside
    began = time.process_time()
    outcome = compute(job.trial)
    name = OURS if job.implementation == OURS else version(job.implementation)
    entry = Entry(
        row=job.row.name,
        trial=job.trial.number,
        implementation=name,
        samples=job.trial.samples.source(experiment.kind),
        setting=fingerprint(experiment),
        value=outcome.value,
        details=dict(outcome.details),
        seconds=round(time.process_time() - began, 2),
        device=job.trial.device.type,
        date=today(),
    )
    record.keep(entry, provenance(job.trial.device, job.trial.number))
    return entry


def fingerprint(experiment: Experiment) -> str:
    """A hash of what an experiment is made of: an entry of another one is stale."""
    text = json.dumps(_plain(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: object) -> object:
    """Fields of dataclasses and names of functions, for a hash."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args)]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
