"""`audit`: what a site's own update gives away of its training images."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from audit.command import seconds
from audit.data import SiteData, site_data
from audit.decision import Verdict
from audit.record import AuditRecord
from audit.request import AuditSettings, make_request
from audit.run import audit as measure
from core.data.given import GivenData, Samples
from core.errors import InputError
from core.losses import Function, Loss
from core.models.architecture import Architecture
from core.models.state_files import State
from core.target import LocalTraining
from gradients.shared_update import Source

# Inputs with targets: a data set, or two tensors.
Given = Samples | tuple[torch.Tensor, torch.Tensor]
# Arguments whose flag has another name; else a flag's dashes are underscores here.
_ARGUMENTS = {
    "--data": "members and non_members",
    "--global": "global_state",
    "--local": "local_state",
    "--round": "round_number",
}


class Audit:
    """What an audit found.

    Args:
        record: All of it.

    Attributes:
        record: All of it, as numbers.
    """

    def __init__(self, record: AuditRecord) -> None:
        self.record = record

    @property
    def verdict(self) -> Verdict:
        """Leaks, no leak found, or cannot tell."""
        return Verdict(self.record.verdict)

    def __str__(self) -> str:
        from audit.show.page import page_of

        return page_of(self.record)

    def __repr__(self) -> str:
        return f"Audit: {self.record.statement}"

    def save(self, folder: str | Path) -> None:
        """Write `audit.json` and `audit.html`: numbers only, no image."""
        from audit.reports import write_reports

        write_reports(self.record, Path(folder))


def audit(
    global_state: Source,
    local_state: Source,
    *,
    model: nn.Module | Architecture,
    members: Given,
    non_members: Given,
    loss: str | Function | Loss | None = None,
    local: LocalTraining | str | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    attack: str = "auto",
    iterations: int | None = None,
    plants: int | None = None,
    budget: float | str = 7200.0,
    alpha: float = 0.05,
    membership: bool = True,
    remedies: bool = True,
    rounds: Sequence[State] = (),
    final: State | None = None,
    single_site: Sequence[State] = (),
    restarts: int = 4,
    round_number: int | None = None,
    previous: State | None = None,
    keep_images: str | Path | None = None,
    report: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Audit:
    """Measure what an update gives away of the images that it was trained on.

    Args:
        global_state: What the site received: a file, a module, or tensors by name.
        local_state: What it produced, or the difference of the two.
        model: The architecture; its own parameters are not used.
        members: The images of the training with their targets: a data set, or two tensors.
        non_members: Images of the same site that were not in the training, chosen by chance from
            the same images and prepared alike.
        loss: What the site minimises, see `losses()`; default: cross-entropy.
        local: What is known of its training, such as "sgd lr=0.1 batch-size=8"; what is not
            said is estimated, and stated as such.
        mean: Of the normalisation that the model expects.
        std: Its standard deviation.
        attack: A name in `attacks()`; "auto": those that the update allows.
        iterations: Of an inversion; default: as the budget allows.
        plants: Planted images per setting of the power; default: as the budget allows.
        budget: Seconds for the whole audit, or a time such as "15m" or "2h".
        alpha: At most this share of audits without a leak says "leaks".
        membership: Measure how well members are told from non-members, too.
        remedies: Measure the update again under defenses, if it leaks.
        rounds: Global models after each round, for the trajectory of losses.
        final: The federation's final model, for membership and class representatives; default:
            the last of the rounds, or what the site received.
        single_site: A model trained on these members alone; of several, one after each round.
        restarts: Of each class representative.
        round_number: Which round the update is of, for the report.
        previous: What the site received a round before, to compare what it received with.
        keep_images: Folder that reconstructions are kept in.
        report: Folder for the numbers of finished stages; an interrupted audit goes on there.
        seed: Of every random number.
        device: Where to compute; default: a GPU if there is one.
        progress: Show a bar.

    Returns:
        Prints as a page; `record` holds all numbers.

    Raises:
        InputError: One sentence on what cannot be used.
    """
    with _arguments_named():
        settings = AuditSettings(
            attack=attack, iterations=iterations, plants=plants, alpha=alpha, seed=seed,
            budget=seconds(budget) if isinstance(budget, str) else budget,
            device=str(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            membership=membership, remedies=remedies, restarts=restarts, round_number=round_number,
            keep_images=None if keep_images is None else Path(keep_images),
        )  # fmt: skip
        request = make_request(
            global_state, local_state, model=model, loss=loss, local=local, settings=settings,
            data=_site(members, non_members, mean, std, seed), rounds=rounds, final=final,
            single_site=single_site, previous=previous,
        )  # fmt: skip
    return Audit(
        measure(request, report=None if report is None else Path(report), progress=progress)
    )


@contextlib.contextmanager
def _arguments_named() -> Iterator[None]:
    """Within the block, errors name the arguments of `audit` in place of the command's flags."""
    try:
        yield
    except InputError as error:
        told = re.sub(r"^--local(?=:)", "local", str(error))
        named = re.sub(r"--[a-z][a-z-]*", lambda found: _argument_of(found[0]), told)
        raise InputError(named) from None


def _argument_of(flag: str) -> str:
    return _ARGUMENTS.get(flag, flag[2:].replace("-", "_"))


def _site(
    members: Given, non_members: Given, mean: float | Sequence[float],
    std: float | Sequence[float], seed: int,
) -> SiteData:  # fmt: skip
    return site_data(GivenData(members, non_members, mean=mean, std=std), seed, "members")
