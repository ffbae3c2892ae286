"""A federation of eight sites on chest phantoms, of which one attacks its own update.

Plain federated averaging, in this process: every round each site trains one epoch of AdamW over
its 64 images from the global model, and the server averages the states. Site 1 then does what an
audit does: membership by the losses under the rounds' global models, class representatives of the
final model, and the audit of its update of the last round. Beside it a single-site model, trained
on site 1's images alone for as many epochs. Writes `results/audit/federation.json`, numbers only;
what the same command has measured already is not measured again.

    python -m benchmarks.audit_federation
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradinvbench as gib
from audit.class_representatives import class_representatives
from audit.membership import measure_membership
from audit.record import AuditRecord, ClassSection, RateSection
from core.errors import exit_status
from core.launch_arguments import CommandParser, given_flags
from core.local_training import LocalTraining
from core.models.building import ModelSpec, load_parameters
from core.reading import read_json_object
from core.storage import write_record
from core.target import Target, Truth
from federated.phantoms.findings import chest_phantoms

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Federation:
    """What is simulated.

    Attributes:
        sites: How many; the first one attacks its own update.
        images: Of each site.
        non_members: Images of other patients that the attacking site holds out.
        rounds: Of federated averaging.
        size: Side of an image in pixels.
        training: A site's local training in a round.
        arch: The network, with BatchNorm.
        width: Its channels.
        seed: Of patients, parameters and the order of images.
    """

    sites: int = 8
    images: int = 64
    non_members: int = 128
    rounds: int = 20
    size: int = 32
    training: str = "adamw lr=0.001 batch-size=8"
    arch: str = "cnn"
    width: int = 16
    seed: int = 0

    @property
    def model(self) -> ModelSpec:
        """The network."""
        return ModelSpec(self.arch, n_classes=2, image_size=self.size, width=self.width)

    def local(self, round_number: int) -> LocalTraining:
        """Every round goes through a site's images in another order."""
        words = f"{self.training} shuffle={self.seed + round_number}"
        return LocalTraining.parse(words, self.images)


@dataclass(frozen=True)
class Trained:
    """What the attacking site has in the end.

    Attributes:
        rounds: Global models, the initial one first.
        local: What the site sent in the last round.
        single_site: A model of the site's images alone, after each of as many epochs.
        members: Its images.
        non_members: Images that it held out.
        accuracy: Of the final global model on the latter.
    """

    rounds: list[State]
    local: State
    single_site: list[State]
    members: Truth
    non_members: Truth
    accuracy: float


# Flags that change no number.
_PLACES = frozenset(("output", "work"))
# What is measured of it, as sections or a number.
Part = Callable[[Trained], Any]


def simulate(federation: Federation) -> Trained:
    """Train the federation and the single-site model."""
    everyone = federation.sites * federation.images + federation.non_members
    pictures, findings = chest_phantoms(everyone, federation.size, federation.seed)
    images, labels = pictures.expand(-1, 3, -1, -1), findings[:, 0].long()
    parts = [federation.images] * federation.sites + [federation.non_members]
    *sites, held_out = map(Truth, images.split(parts), labels.split(parts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(federation.seed)
        model = federation.model.build().train()
    rounds, single_site, local = [_copy(model)], [_copy(model)], State()
    for number in range(federation.rounds):
        training = federation.local(number)
        sent = [train(model, rounds[-1], site, training) for site in sites]
        local = sent[0]
        rounds.append(averaged(sent))
        single_site.append(train(model, single_site[-1], sites[0], training))
    load_parameters(model, rounds[-1])
    with torch.no_grad():
        right = model.eval()(held_out.images).argmax(1) == held_out.labels
    accuracy = float(right.double().mean())
    return Trained(rounds, local, single_site[1:], sites[0], held_out, accuracy)


def train(model: nn.Module, start: State, site: Truth, training: LocalTraining) -> State:
    """A site's state after its local training."""
    load_parameters(model, start)
    optimiser = training.torch_optimizer(model.parameters())
    for step in training.order or ():
        optimiser.zero_grad()
        chosen = list(step)
        cross_entropy(model(site.images[chosen]), site.labels[chosen]).backward()
        optimiser.step()
    return _copy(model)


def averaged(states: Sequence[State]) -> State:
    """The mean of the sites' states; counters of batches are the same everywhere."""
    return {
        name: torch.stack([s[name] for s in states]).mean(0) if v.is_floating_point() else v
        for name, v in states[0].items()
    }


def _copy(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# -- What the site measures -----------------------------------------------------------------


def client_of(federation: Federation, trained: Trained) -> Target:
    """What an attack sees of the site's update of the last round."""
    model = federation.model.build().train()
    load_parameters(model, trained.rounds[-2])
    update = gib.read_update(trained.rounds[-2], trained.local, kind="weights")
    return gib.target_from_update(
        update, model, (3, federation.size, federation.size),
        batch_size=federation.images, local=federation.local(federation.rounds - 1),
    )  # fmt: skip


def membership(federation: Federation, trained: Trained) -> list[RateSection]:
    """Of the global model, of what the site sent, and of the single-site model."""
    client, images = client_of(federation, trained), (trained.members, trained.non_members)
    return [
        *measure_membership(
            client, trained.rounds[1:], trained.local, *images, single_site=trained.single_site
        )
    ]


def representatives(federation: Federation, trained: Trained) -> list[ClassSection]:
    """Of the final global model, with the protocol's 50 restarts, all of them measured."""
    client, images = client_of(federation, trained), (trained.members, trained.non_members)
    return [*class_representatives(client, trained.rounds[-1], *images, restarts=50)]


def audited(
    federation: Federation,
    trained: Trained,
    budget: float,
    iterations: int | None,
    plants: int | None,
    work: Path,
) -> AuditRecord:
    """The audit of the site's update of the last round."""
    members, others = (
        (part.images, part.labels) for part in (trained.members, trained.non_members)
    )
    return gib.audit(
        trained.rounds[-2],
        trained.local,
        model=federation.model.build().train(),
        members=members,
        non_members=others,
        local=federation.local(federation.rounds - 1),
        membership=False,
        budget=budget,
        iterations=iterations,
        plants=plants,
        report=work,
        device="cpu",
    ).record


def plain(value: Any) -> Any:
    """Sections as plain values."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    is_section = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_section else value


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.audit_federation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=Federation.rounds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=600, help="seconds of the audit itself")
    parser.add_argument("--iterations", type=int, help="of its inversion (default: as it allows)")
    parser.add_argument(
        "--plants", type=int, help="planted updates per setting (default: likewise)"
    )
    parser.add_argument("--output", default="results/audit", metavar="DIR")
    parser.add_argument(
        "--work", default="results/logs/audit_federation", metavar="DIR",
        help="finished stages of an interrupted audit",
    )  # fmt: skip
    return parser


def command_of(argv: Sequence[str] | None = None) -> str:
    """The command line that measures the same again, without where it writes."""
    parser = build_parser()
    given = {k: v for k, v in given_flags(parser, argv).items() if k not in _PLACES}
    flags = [word for name, value in given.items() for word in (f"--{name}", f"{value:g}")]
    return shlex.join([*parser.prog.split(), *flags])


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, measure what is not measured yet, and write the record after every part."""
    args = build_parser().parse_args(argv)
    federation = Federation(rounds=args.rounds, seed=args.seed)
    parts: dict[str, Part] = {
        "accuracy": lambda trained: trained.accuracy,
        "membership": lambda trained: membership(federation, trained),
        "class_representatives": lambda trained: representatives(federation, trained),
        "audit": lambda trained: audited(
            federation, trained, args.budget, args.iterations, args.plants, Path(args.work)
        ),
    }
    path = Path(args.output) / "federation.json"
    for name, seconds in run(federation, parts, path, command_of(argv)):
        print(f"{name}: {seconds:.0f} s", flush=True)


def run(
    federation: Federation, parts: Mapping[str, Part], path: Path, command: str
) -> Iterator[tuple[str, float]]:
    """Measure the parts that a record does not hold; their names, and the seconds they took."""
    record = _started(path, {"command": command, "federation": dataclasses.asdict(federation)})
    missing = [name for name in parts if name not in record]
    trained = simulate(federation) if missing else None
    for name in missing:
        assert trained is not None
        began = time.perf_counter()
        record[name] = plain(parts[name](trained))
        write_record(path, record)
        yield name, time.perf_counter() - began


def _started(path: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """The record so far, if the same command measured it in the same federation."""
    if not path.exists():
        return stated
    found = read_json_object(path, what="record of a federation")
    same = all(found.get(name) == value for name, value in stated.items())
    return {k: v for k, v in found.items() if k != "checksum"} if same else stated


if __name__ == "__main__":
    sys.exit(exit_status(main))
