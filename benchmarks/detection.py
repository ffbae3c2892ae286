"""What a client notices of a malicious server: every attack against every detector.

Writes `results/detection/detection.json` after every part, and continues one that is there. A part
is one network in one federation of four clients, trained honestly on the embedded photographs
round after round: with one local step a round (FedSGD) or four (FedAvg), by the parity of the
seed. A client looks at what it receives, by itself and against the round before. In an early, a
middle and a late round the server sends what an attack makes of that round's model instead, at
several strengths. Networks that an attack puts a block in front of have that block, initialised
and trained honestly, in all their honest rounds.

    python -m benchmarks.detection
    python -m benchmarks detection
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from attack.attacks import OptimizationAttack, get_attack
from attack.metrics import assign, psnr
from audit.detectors import Received, detector_names, scores_of
from audit.detectors.calibration import joint_p_value, rounds_needed
from audit.detectors.honest import Samples, honest_scores
from benchmarks.markdown import row_of
from core.data.data_sets import load_data, take_samples
from core.data.specs import DataSpec
from core.errors import InputError, exit_status
from core.figures import save_figure, subplots
from core.launch_arguments import CommandParser
from core.losses import as_loss
from core.models.building import ModelSpec, build_model
from core.models.malicious import Imprinted, Separated, parse_malice
from core.reading import read_json_object
from core.records import read_record
from core.storage import write_record, write_text
from core.target import Target, Truth
from gradients.client import ClientSettings, share_update
from gradients.malicious_server import sent_to_clients, tamper
from gradients.sums import Aggregation, share_sum

RECORD, PAGE, FIGURE = "detection.json", "detection.md", "detection.png"
# Attack that reads what each kind of server makes leak.
READ_BY = {
    "imprint": "robbing-the-fed",
    "loki": "loki",
    "ares": "ares",
    "trap": "trap-weights",
    "fishing": "fishing",
    "fishing-feature": "fishing",
    "eggv": "eggv",
}
# By network, what the server does to it; the block that it needs is in the network's name.
ATTACKS: dict[str, tuple[str, ...]] = {
    "mlp": ("trap:1", "trap:4", "trap:16", "ares:8", "ares:32", "ares:64"),
    "cnn": ("fishing:3", "fishing-feature:3", "ares:8", "ares:32", "ares:128",
            ),
    "lenet": ("eggv:20", "eggv:100"),
    "cnn behind imprint:32": ("imprint:32",),
    "cnn behind imprint:128": ("imprint:128",),
    "cnn behind loki:32:2": ("loki:32:2",),
    "cnn behind loki:128:2": ("loki:128:2",),
}  # fmt: skip
BEHIND = " behind "
# Of each network: its architecture, and the width of its first stage.
ARCHITECTURES = {"mlp": ("mlp", 64), "cnn": ("fedavg_cnn", 8), "lenet": ("lenet", 8)}
ALPHA = 0.05
MODES = ("alone", "against")
_DIGITS, _RESAMPLES = 5, 400


@dataclass(frozen=True)
class Protocol:
    """How every network is trained and looked at.

    Attributes:
        data: Name of the images.
        image_size: Their side.
        clients: How many.
        images: Of each client.
        batch: Of a local step.
        rounds: Of a federation.
        local_steps: Of FedAvg; FedSGD takes one.
        lr: Learning rate.
        malicious_rounds: In which the server may cheat instead.
        looked_at: Images of its own that the client looks at a model with.
        site_rounds: Honest rounds that a site makes by itself to calibrate with.
        further: Honest rounds after a malicious one, for its accuracy.
        victims: Images that an attack is to recover.
        iterations: Of an attack by optimisation.
    """

    data: str = "photo-patches"
    image_size: int = 16
    clients: int = 4
    images: int = 64
    batch: int = 16
    rounds: int = 40
    local_steps: int = 4
    lr: float = 0.1
    malicious_rounds: tuple[int, ...] = (3, 20, 39)
    looked_at: int = 24
    site_rounds: int = 39
    further: int = 20
    victims: int = 8
    iterations: int = 150


PROTOCOL = Protocol()
SEEDS = tuple(range(6))


@dataclass(frozen=True)
class Look:
    """Scores of one received model.

    Attributes:
        round: Of the federation.
        sent: What the server did, in the words of `--malicious`; empty: nothing.
        alone: By detector; None: infinite.
        against: The same with the round before at hand.
    """

    round: int
    sent: str
    alone: dict[str, float | None]
    against: dict[str, float | None]


@dataclass
class Part:
    """One network in one federation.

    Attributes:
        network: See `ATTACKS`.
        seed: Of everything.
        looks: At every received model, honest and malicious.
        accuracy: Percent of the validation images, `further` rounds after the middle malicious
            round, by what was sent in it; "" is the honest federation's.
        recovered: Images at 20 dB of PSNR or more that the attack recovers from the update of the
            middle malicious round, by what was sent.
        site: p-values of honest and malicious rounds under a site's own calibration, by what was
            sent.
    """

    network: str
    seed: int
    looks: list[Look] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    recovered: dict[str, int] = field(default_factory=dict)
    site: dict[str, list[float]] = field(default_factory=dict)


# --- The federation --------------------------------------------------------------------------


@dataclass(frozen=True)
class Federation:
    """Four clients, a validation set and images of the server's own.

    Attributes:
        spec: Shape and normalisation.
        clients: Samples of each.
        validation: Samples that nobody trains on.
        public: Normalised images of the server's own, and their classes.
        victims: Images of the client that an update is made of, in [0, 1].
        local_steps: Of a round.
        protocol: See `Protocol`.
    """

    spec: DataSpec
    clients: tuple[Samples, ...]
    validation: Samples
    public: tuple[torch.Tensor, torch.Tensor]
    victims: Truth
    local_steps: int
    protocol: Protocol

    def step(self, model: nn.Module, generator: torch.Generator, client: int) -> nn.Module:
        """A client's local training from a model."""
        own = self.clients[client]
        plan = self.protocol
        return own.trained(
            model, generator, lr=plan.lr, steps=self.local_steps, size=plan.batch
        )  # fmt: skip

    def round(self, model: nn.Module, seed: int) -> nn.Module:
        """The mean of what all clients make of a model."""
        generator = torch.Generator().manual_seed(seed)
        trained = [self.step(model, generator, k) for k in range(len(self.clients))]
        mean = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, *others in zip(
                mean.parameters(), *(m.parameters() for m in trained), strict=True
            ):
                parameter.copy_(torch.stack(others).mean(0))
        return mean


def federation(seed: int, protocol: Protocol) -> Federation:
    """The federation of a seed."""
    data = load_data(protocol.data, image_size=protocol.image_size)
    n = protocol.clients * protocol.images
    order = np.random.default_rng(seed).permutation(len(data.train_plain)).tolist()
    loss = as_loss("cross-entropy")

    def samples(source: Any, places: Sequence[int]) -> Samples:
        inputs, labels = take_samples(source, places, data.spec)
        return Samples(data.spec.normalize(inputs), labels, loss)

    shards = [order[k : k + protocol.images] for k in range(0, n, protocol.images)]
    public = samples(data.train_plain, order[n : n + 4 * protocol.images])
    held_out = samples(data.val, range(len(data.val)))
    inputs, labels = take_samples(data.train_plain, shards[0][: protocol.victims], data.spec)
    return Federation(
        data.spec,
        tuple(samples(data.train_plain, shard) for shard in shards),
        held_out,
        (public.inputs, public.targets),
        Truth(inputs, labels),
        1 if seed % 2 == 0 else protocol.local_steps,
        protocol,
    )


def network(name: str, spec: DataSpec, seed: int) -> tuple[ModelSpec, nn.Module]:
    """An honest network with its block, if it has one, and how its inner one is built."""
    inner, _, block = name.partition(BEHIND)
    side = spec.shape[1]
    arch, width = ARCHITECTURES[inner]
    described = ModelSpec(arch, spec.n_classes, side, width=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(described)
        if block:
            malice = parse_malice(block, spec.n_classes)
            if malice.kind == "imprint":
                model = Imprinted(model, side, malice.number)
            else:
                model = Separated(model, side, malice.number, malice.clients)
    return described, model.eval()


def cheated(
    model: nn.Module, described: ModelSpec, word: str, made: Federation
) -> tuple[ModelSpec, nn.Module]:
    """What the server sends instead of an honest model."""
    spec = dataclasses.replace(described, malicious=word)
    inner = model.model if isinstance(model, (Imprinted, Separated)) else model
    assert isinstance(inner, nn.Module)
    sent = tamper(
        copy.deepcopy(inner), spec, *made.public, batch_size=made.protocol.victims
    )  # fmt: skip
    return spec, sent.eval()


# --- One part ------------------------------------------------------------------------------------


def measure(name: str, seed: int, protocol: Protocol, attacks: Sequence[str]) -> Part:
    """Train one network in one federation, look at every round, and cheat in some."""
    part, made = Part(name, seed), federation(seed, protocol)
    described, model = network(name, made.spec, seed)
    own = made.clients[0]
    watched = Samples(own.inputs[: protocol.looked_at], own.targets[: protocol.looked_at], own.loss)
    before = watched.view(model)
    middle = protocol.malicious_rounds[len(protocol.malicious_rounds) // 2]
    rounds: list[nn.Module] = [model]
    for number in range(1, protocol.rounds):
        model = made.round(model, 1000 * seed + number)
        rounds.append(model)
        view = watched.view(model)
        part.looks.append(_look(number, "", view, before))
        if number in protocol.malicious_rounds:
            known = _site_scores(watched, made, rounds[-2:], seed) if number == middle else None
            if known is not None:
                _calibrated(part, "", scores_of(Received(view, before)), known)
            for word in attacks:
                spec, sent = cheated(model, described, word, made)
                seen = watched.view(sent)
                part.looks.append(_look(number, word, seen, before))
                if known is not None:
                    _calibrated(part, word, scores_of(Received(seen, before)), known)
                    part.accuracy[word] = _accuracy_after(sent, made, number, seed)
                    part.recovered[word] = recovered(spec, sent, made, seed)
        before = view
    part.accuracy[""] = _accuracy_after(rounds[middle], made, middle, seed)
    return part


def _look(number: int, sent: str, now: Any, before: Any) -> Look:
    alone, against = scores_of(Received(now)), scores_of(Received(now, before))
    return Look(number, sent, _stored(alone), _stored(against))


def _stored(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {
        name: float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
        for name, value in scores.items()
    }


def _site_scores(
    watched: Samples, made: Federation, last: Sequence[nn.Module], seed: int
) -> dict[str, list[float]]:
    """Scores of honest rounds that the looking client makes by itself, by detector."""

    def alone(model: nn.Module, generator: torch.Generator) -> nn.Module:
        return made.step(model, generator, 0)

    rounds = honest_scores(watched, alone, last[1], last[0], seed)
    found = list(itertools.islice(rounds, made.protocol.site_rounds))
    return {name: [scores[name] for scores in found] for name in detector_names()}


def _calibrated(
    part: Part, sent: str, scores: Mapping[str, float], known: Mapping[str, list[float]]
) -> None:
    part.site.setdefault(sent, []).append(round(joint_p_value(scores, known), _DIGITS))


def _accuracy_after(model: nn.Module, made: Federation, number: int, seed: int) -> float:
    """Percent of the validation images after further honest rounds."""
    for further in range(1, made.protocol.further + 1):
        model = made.round(model, 1000 * seed + number + further)
    with torch.no_grad():
        right = model(made.validation.inputs).argmax(1) == made.validation.targets
    return round(100 * float(right.double().mean()), 2)


def recovered(spec: ModelSpec, sent: nn.Module, made: Federation, seed: int) -> int:
    """Images of 20 dB or more that the server's own attack recovers from one update."""
    target, truth = _update(spec, sent, made), made.victims
    name = READ_BY[spec.malicious.partition(":")[0]]
    kind = get_attack(name)
    attack = (
        kind(kind.published.changed(iterations=made.protocol.iterations))
        if issubclass(kind, OptimizationAttack)
        else kind()
    )
    try:
        found = attack.reconstruct(
            target, labels=truth.labels, device=torch.device("cpu"), seed=seed
        )  # fmt: skip
    except InputError:  # No image passes, or none activates a neuron.
        return 0
    quality = psnr(found.images[assign(found.images, truth.images)], truth.images)
    return int((quality >= 20).sum())


def _update(spec: ModelSpec, sent: nn.Module, made: Federation) -> Target:
    """What one client, or those that the model tells apart, share in one local step."""
    settings, truth = ClientSettings(train_mode=False), made.victims
    clients = parse_malice(spec.malicious, spec.n_classes).clients
    batch = (truth.images, truth.labels, settings)
    if clients > 1:
        models = sent_to_clients(sent, spec)
        return share_sum(models, spec, made.spec, *batch, Aggregation(clients))
    target = share_update(copy.deepcopy(sent), spec, made.spec, *batch)
    assert target is not None
    return target


# --- The record ----------------------------------------------------------------------------------


def compute(
    networks: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    folder: Path,
    protocol: Protocol = PROTOCOL,
    progress: bool = False,
) -> list[Part]:
    """Measure the parts that a record lacks; the record is written after each.

    Args:
        networks: What the server does to each.
        seeds: Of each network.
        folder: Of the record, the page and the figure.
        protocol: See `Protocol`.
        progress: Whether to show a bar.

    Raises:
        InputError: The folder holds a record of another protocol.
    """
    parts = _parts_so_far(folder / RECORD, protocol)
    done = {(part.network, part.seed) for part in parts}
    wanted = [(name, seed) for seed in seeds for name in networks]
    bar = tqdm(wanted, desc="detection", unit=" parts", disable=not progress)
    for name, seed in bar:
        bar.set_postfix_str(f"{name}, seed {seed}")
        if (name, seed) in done:
            continue
        parts.append(measure(name, seed, protocol, networks[name]))
        _write(parts, folder, protocol)
    if parts:
        write_text(folder / PAGE, page_of(folder))
        draw(parts, folder / FIGURE)
    return parts


def _parts_so_far(path: Path, protocol: Protocol) -> list[Part]:
    if not path.exists():
        return []
    stored = read_json_object(path, what="record of detection")
    if stored.get("protocol") != _plain(protocol):
        raise InputError(f"{path} was measured under another protocol; give another --output")
    return read_record(path, "detection", _parts)


def _plain(protocol: Protocol) -> dict[str, Any]:
    return {**asdict(protocol), "malicious_rounds": list(protocol.malicious_rounds)}


def _parts(stored: Mapping[str, Any]) -> list[Part]:
    return [
        Part(**{**part, "looks": [Look(**look) for look in part["looks"]]})
        for part in stored["parts"]
    ]


def _write(parts: Sequence[Part], folder: Path, protocol: Protocol) -> None:
    write_record(
        folder / RECORD,
        {
            "command": "python -m benchmarks.detection",
            "protocol": _plain(protocol),
            "alpha": ALPHA,
            "summary": [asdict(row) for row in rows_of(parts)],
            "parts": [asdict(part) for part in parts],
        },
    )


# --- What it says --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One attack at one strength against every detector.

    Attributes:
        network: See `ATTACKS`.
        sent: What the server did.
        mode: "alone" or "against".
        honest: Honest rounds that it is compared with.
        malicious: Malicious rounds.
        auroc: By detector: the area and the ends of its 95 % bootstrap interval.
    """

    network: str
    sent: str
    mode: str
    honest: int
    malicious: int
    auroc: dict[str, tuple[float, float, float]]


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """Every attack, with areas under the ROC curve."""
    rows = []
    for name in dict.fromkeys(part.network for part in parts):
        own = [part for part in parts if part.network == name]
        words = dict.fromkeys(look.sent for part in own for look in part.looks if look.sent)
        for word, mode in itertools.product(words, MODES):
            areas = {}
            for detector in detector_names():
                honest, cheating = (
                    values(own, "", mode, detector),
                    values(own, word, mode, detector),
                )
                areas[detector] = area_with_interval(honest, cheating)
            rows.append(Row(name, word, mode, len(honest), len(cheating), areas))
    return rows


def values(parts: Sequence[Part], sent: str, mode: str, detector: str) -> np.ndarray:
    """Scores of the rounds in which that was sent."""
    found = (getattr(look, mode)[detector] for part in parts for look in part.looks
             if look.sent == sent)  # fmt: skip
    return np.array([math.inf if value is None else value for value in found])


def area(honest: np.ndarray, cheating: np.ndarray) -> float:
    """Area under the ROC curve: pairs in which the malicious round scores higher, ties half."""
    ordered = np.sort(honest)
    below = np.searchsorted(ordered, cheating, "left") + np.searchsorted(ordered, cheating, "right")
    return float(below.mean() / (2 * len(honest)))


def area_with_interval(honest: np.ndarray, cheating: np.ndarray) -> tuple[float, float, float]:
    """The area and the ends of its 95 % interval, by bootstrap over rounds of both kinds."""
    rng = np.random.default_rng(0)
    drawn = [area(rng.choice(honest, len(honest)), rng.choice(cheating, len(cheating)))
             for _ in range(_RESAMPLES)]  # fmt: skip
    low, high = np.quantile(drawn, [0.025, 0.975])
    return round(area(honest, cheating), 4), round(float(low), 4), round(float(high), 4)


@dataclass(frozen=True)
class Alarms:
    """Alarms of all detectors together, against the honest rounds of the other seeds.

    Attributes:
        false: Share of the honest rounds; not a number where there are too few others.
        found: Share of the malicious rounds, by what was sent.
    """

    false: float
    found: dict[str, float]


def alarms_of(parts: Sequence[Part], mode: str) -> Alarms:
    """Rounds whose joint p-value among other federations' honest rounds is at most `ALPHA`."""
    false: list[bool] = []
    found: dict[str, list[bool]] = {}
    for part in parts:
        others = [p for p in parts if p.network == part.network and p.seed != part.seed]
        known = {d: values(others, "", mode, d).tolist() for d in detector_names()}
        if len(next(iter(known.values()))) < rounds_needed(ALPHA):
            continue
        for look in part.looks:
            given = getattr(look, mode)
            scores = {d: math.inf if given[d] is None else given[d] for d in known}
            alarm = joint_p_value(scores, known) <= ALPHA
            found.setdefault(look.sent, []).append(alarm) if look.sent else false.append(alarm)
    shares = {word: float(np.mean(alarms)) for word, alarms in found.items()}
    return Alarms(float(np.mean(false)) if false else math.nan, shares)


def draw(parts: Sequence[Part], path: Path) -> None:
    """ROC curves of every detector, a panel for each kind of attack, against the round before."""
    kinds = dict.fromkeys(
        look.sent.partition(":")[0] for part in parts for look in part.looks if look.sent
    )
    columns = min(4, len(kinds))
    figure, axes = subplots(-(-len(kinds) // columns), columns, 3.2, 3.0)
    for panel, kind in itertools.zip_longest(axes.flat, kinds):
        if kind is None:
            panel.set_axis_off()
            continue
        for number, detector in enumerate(detector_names()):
            false, true = _curve(parts, kind, detector)
            style = ("-", "--", ":", "-.")[number % 4]
            panel.plot(false, true, style, linewidth=1.2, label=detector)
        panel.set(title=kind, xlabel="false alarms", ylabel="found", xlim=(0, 1), ylim=(0, 1.02))
    axes.flat[0].legend(fontsize=6)
    save_figure(figure, path, dpi=110)


def _curve(parts: Sequence[Part], kind: str, detector: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over networks of the share found, at shares of false alarms from 0 to 1."""
    grid, curves = np.linspace(0, 1, 201), []
    for name in dict.fromkeys(part.network for part in parts):
        own = [part for part in parts if part.network == name]
        honest = np.sort(values(own, "", "against", detector))
        # Above the k-th smallest lie all but k, at most the share that is allowed.
        levels = np.concatenate([[-math.inf], honest])[
            np.ceil((1 - grid) * len(honest) - 1e-9).astype(int)
        ]
        words = dict.fromkeys(
            k.sent for p in own for k in p.looks if k.sent.partition(":")[0] == kind
        )
        for word in words:
            cheating = values(own, word, "against", detector)
            curves.append((cheating[None] > levels[:, None]).mean(1))
    return grid, np.mean(curves, axis=0)


# --- The page ------------------------------------------------------------------------------------


def page_of(folder: Path) -> str:
    """The page of the documents that shows the record in a folder, in Markdown."""
    return read_record(folder / RECORD, "detection", _page)


def _page(stored: Mapping[str, Any]) -> str:
    parts, protocol = _parts(stored), Protocol(**stored["protocol"])
    rows = [Row(**row) for row in stored["summary"]]
    names = detector_names()
    alone, against = alarms_of(parts, "alone"), alarms_of(parts, "against")
    honest = sum(1 for part in parts for look in part.looks if not look.sent)
    tables = {
        mode: "\n".join(_matrix_line(row, names) for row in rows if row.mode == mode)
        for mode in MODES
    }
    site = [p for part in parts for p in part.site.get("", [])]
    return _PAGE.format(
        honest=honest,
        networks=len({part.network for part in parts}),
        seeds=len({part.seed for part in parts}),
        rounds=protocol.rounds - 1,
        site_rounds=protocol.site_rounds,
        victims=protocol.victims,
        further=protocol.further,
        alpha=f"{100 * ALPHA:g}",
        names=" | ".join(names),
        rulers=" | ".join("---:" for _ in names),
        alone=tables["alone"],
        against=tables["against"],
        detectors="\n".join(_detector_line(rows, name) for name in names),
        false_alone=f"{100 * alone.false:.1f}",
        false_against=f"{100 * against.false:.1f}",
        false_site=f"{100 * float(np.mean(np.array(site) <= ALPHA)):.1f}" if site else "–",
        site_checks=len(site),
        attacks="\n".join(_attack_lines(parts, alone, against)),
    )


def _matrix_line(row: Row, names: Sequence[str]) -> str:
    cells = [row.network, f"`{row.sent}`", *(f"{row.auroc[name][0]:.2f}" for name in names)]
    return row_of(cells)


def _detector_line(rows: Sequence[Row], name: str) -> str:
    """A detector's area over all attacks, each attack counting once."""
    cells = [name]
    for mode in MODES:
        own = np.array([row.auroc[name] for row in rows if row.mode == mode])
        mean = own.mean(0)
        worst = own[:, 0].min()
        cells.append(f"{mean[0]:.2f} ({mean[1]:.2f} to {mean[2]:.2f}), least {worst:.2f}")
    return row_of(cells)


def _attack_lines(parts: Sequence[Part], alone: Alarms, against: Alarms) -> Iterator[str]:
    for name in dict.fromkeys(part.network for part in parts):
        own = [part for part in parts if part.network == name]
        usual = float(np.mean([part.accuracy[""] for part in own]))
        yield f"| {name} | honest | | | | | {usual:.0f} |"
        for word in dict.fromkeys(w for part in own for w in part.recovered):
            seen = [p for part in own for p in part.site.get(word, [])]
            cells = [
                name,
                f"`{word}`",
                f"{np.mean([part.recovered[word] for part in own]):.1f}",
                _percent(alone.found.get(word)),
                _percent(against.found.get(word)),
                _percent(float(np.mean(np.array(seen) <= ALPHA)) if seen else None),
                f"{np.mean([part.accuracy[word] for part in own]):.0f}",
            ]
            yield row_of(cells)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


_PAGE = """# What a client notices of a malicious server

<!-- Written by docs/generate.py from results/detection/detection.json. -->
A malicious server sends a model that was made to leak. A client holds that model before it trains,
and may hold the one of the round before. `audit/detectors/` has what it can look at with samples of
its own; [an audit](audit-my-update.md) runs all of it first.

{honest} honest rounds of {networks} small networks in {seeds} federations each, {rounds} rounds
long, with one local step a round (FedSGD) or four (FedAvg). Attacks cheat in an early, a middle and
a late round. An area under the ROC curve of 1 tells every malicious round from every honest one;
0.5 is guessing, and below it an attack looks more honest than honesty.

## Detectors

The mean area over all attacks, its 95 % interval (bootstrap over rounds, which are not independent
within a federation), and the area against the attack that hides best.

| detector | the received model alone | against the round before |
| :--- | :--- | :--- |
{detectors}

## Attack x detector, the received model alone

| network | server | {names} |
| :--- | :--- | {rulers} |
{alone}

## Attack x detector, against the round before

| network | server | {names} |
| :--- | :--- | {rulers} |
{against}

## What an attack gets, whether it is found, and whether its model still trains

- *Recovered*: images of {victims} at 20 dB or more that the server's attack recovers.
- *Found*: percent of the malicious rounds that all detectors together call suspicious, compared
  with the honest rounds of the other federations, at a level of {alpha} %. Honest rounds with an
  alarm: {false_alone} % with the model alone, {false_against} % against the round before.
- *Found by a site*: the same where the site knows no honest rounds but makes {site_rounds} by
  itself, from the round before, and trains as it always does. Honest rounds with an alarm:
  {false_site} % of {site_checks}.
- *Accuracy*: percent, {further} honest rounds after that model was sent.

| network | server | recovered | found, alone | found, against | found by a site | accuracy |
| :--- | :--- | ---: | ---: | ---: | ---: | ---: |
{attacks}

`python -m benchmarks.detection` computes all of it and continues a record that is not finished; the
ROC curves are in `results/detection/detection.png`.
"""


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="federations per network")
    parser.add_argument(
        "--network", action="append", choices=list(ATTACKS), help="only this one (repeatable)"
    )
    parser.add_argument("--output", default="results/detection", metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the record, the page and the figure."""
    args = build_parser().parse_args(argv)
    if args.seeds < 1:
        raise InputError("--seeds must be at least 1")
    chosen = {name: ATTACKS[name] for name in args.network or ATTACKS}
    folder = Path(args.output)
    compute(chosen, range(args.seeds), folder, progress=True)
    print((folder / PAGE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(exit_status(main))
