"""How much of a site's training images its update gives away: measured, recorded, read back.

The relative data leakage value (RDLV) says how much closer a reconstruction is to a
training image than what was public anyway, the prior image. Two questions are added that
the value alone leaves open: is the reconstruction closer to this patient than to others
(a null distribution), and could one find the patient with it (identification)?

Source: Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning Unsafe?,
2022, eq. 9, https://arxiv.org/abs/2202.06924 (RDLV).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attack.metrics import relative_leakage
from audit.permutations import holm
from audit.rdlv_archive import read_archive
from audit.similarity import SimMetric, similarity_matrix
from core.array_files import read_arrays
from core.errors import InputError
from core.figures import blank_figure, save_figure
from core.pictures import save_gallery
from core.reading import read_json_object
from core.records import BROKEN
from core.storage import atomic_file, write_record

PASS, WITHHOLD = "pass", "withhold"
# What the published tool's archives say of it.
UNKNOWN = "unknown"
REDUCTIONS = ("max", "min")
# Similarities that are 1 for equal images and never larger.
BOUNDED_BY_ONE = ("ssim", "cosine", "ncc")


@dataclass(frozen=True)
class ImageLeakage:
    """What one training image's best reconstruction gives away.

    Attributes:
        reconstruction: Index of the best reconstruction.
        similarity: Similarity of that reconstruction to the image.
        prior_similarity: Similarity of the prior image to the image.
        rdlv: Relative data leakage value.
        p_value: Share of other patients for whom the reconstructions have at least this
            RDLV (counting the image itself); None without other patients.
            That the largest of several images stands out by chance is not paid for; read
            `p_value_corrected` for that.
        rank: Place of the image among all candidates when they are ordered by their
            similarity to the reconstruction; 1 is the nearest.
        p_value_corrected: The p-value with Holm's correction for looking at all images; None
            without other patients.
    """

    reconstruction: int
    similarity: float
    prior_similarity: float
    rdlv: float
    p_value: float | None
    rank: int
    p_value_corrected: float | None = None


@dataclass
class LeakageReport:
    """The leakage of one update.

    Attributes:
        decision: "pass" or "withhold".
        reason: Why, in a few words.
        rdlv: Reduced over images; NaN where nothing could be measured.
        threshold: Above it the update is withheld.
        metric: Name of the similarity that decides.
        images: One entry per training image.
        null: Quantiles of the RDLV that the reconstructions have for other patients.
        n_others: Number of those patients.
        top1: Share of images that are their reconstruction's nearest candidate.
        chance: That share for a guess.
        relative: N x M x K RDLV of every image, reconstruction and metric.
        closest: N x K numbers of the best reconstruction by each metric.
    """

    decision: str
    reason: str
    rdlv: float
    threshold: float
    metric: str = "ssim"
    images: list[ImageLeakage] = field(default_factory=list)
    null: dict[str, float] | None = None
    n_others: int = 0
    top1: float | None = None
    chance: float | None = None
    relative: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 1)))
    closest: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=np.int64))

    @property
    def withheld(self) -> bool:
        """Whether the update has to stay at the site."""
        return self.decision != PASS

    def statement(self) -> str:
        """The result in sentences a data officer can act on."""
        ending = (
            "The update may leave the site."
            if not self.withheld
            else f"The update does not leave the site: {self.reason}."
        )
        if not self.images:
            return ending
        worst = max(self.images, key=lambda image: image.rdlv)
        closer = "closer" if self.rdlv >= 0 else "further"
        parts = [
            f"The best reconstruction of {_count(len(self.images), 'training image')} is "
            f"{abs(self.rdlv):.0%} {closer} to its original than public knowledge is "
            f"(RDLV {self.rdlv:+.2f}, threshold {self.threshold:.2f})."
        ]
        if worst.p_value is not None:
            verdict = "stands out from" if worst.p_value <= 0.05 else "is within"
            parts.append(
                f"It {verdict} what {_count(self.n_others, 'other patient')} would show "
                f"(p = {worst.p_value:.3f})."
            )
        if self.top1 is not None and self.chance is not None:
            parts.append(
                f"{round(self.top1 * len(self.images))} of {len(self.images)} would be found "
                f"among all candidates (by chance {self.chance:.1%} each)."
            )
        return " ".join([*parts, ending])


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def failed_report(reason: str, threshold: float = 1.0) -> LeakageReport:
    """The report where nothing could be measured: the update stays at the site.

    Args:
        reason: Why nothing could be measured.
        threshold: For the record.
    """
    return LeakageReport(WITHHOLD, reason, math.nan, threshold)


def measure_leakage(
    originals: torch.Tensor,
    reconstructions: torch.Tensor,
    prior: torch.Tensor,
    metric: SimMetric,
    *,
    reduce: str = "max",
    threshold: float = 1.0,
    others: torch.Tensor | None = None,
) -> LeakageReport:
    """Compare reconstructions with the images they may give away.

    The relative data leakage value is that of `attack.metrics.relative_leakage`. Each image
    has the best of all reconstructions; what other patients show is found in the same way,
    so that choosing the best favours nobody.

    Args:
        originals: N x C x H x W in [0, 1], the site's training images.
        reconstructions: M x C x H x W in [0, 1].
        prior: C x H x W in [0, 1], what is public.
        metric: Similarity; its first value decides.
        reduce: "max" or "min", over reconstructions and over images; "min" is for
            distances, of which small ones leak.
        threshold: The update is withheld where the reduced RDLV is above it; with "min",
            where minus the reduced RDLV is: a distance of 0 has an RDLV of -1.
        others: P x C x H x W in [0, 1], images of other patients.

    Returns:
        The report. Where reconstructions or similarities are not finite it says
        "withhold": what cannot be measured must not leave.

    Raises:
        InputError: Unknown reduction, images of different shapes, or none at all.
    """
    _check(originals, reconstructions, prior, others, reduce)
    for name, images in (("reconstructions", reconstructions), ("prior", prior)):
        if not torch.isfinite(images).all():
            return failed_report(f"the {name} are not finite numbers", threshold)
    own = _Compared(metric, originals, reconstructions, prior)
    if not np.isfinite(own.relative).all():
        return failed_report("the similarities are not finite numbers", threshold)
    rest = None if others is None or not len(others) else others
    return _report(
        own,
        None if rest is None else _Compared(metric, rest, reconstructions, prior),
        reduce,
        threshold,
    )


class _Compared:
    """Similarities of some images with the reconstructions and the prior, per metric."""

    def __init__(
        self, metric: SimMetric, images: torch.Tensor, found: torch.Tensor, prior: torch.Tensor
    ) -> None:
        to_found = similarity_matrix(metric, images, found)
        to_prior = similarity_matrix(metric, images, prior[None])
        self.metrics = list(to_found)
        # N x M x K, and N x 1 x K.
        self.similarity = np.stack([to_found[m] for m in self.metrics], -1)
        self.prior = np.stack([to_prior[m] for m in self.metrics], -1)
        with np.errstate(invalid="ignore"):
            self.relative = relative_leakage(self.similarity, self.prior)


def _report(
    own: _Compared, others: _Compared | None, reduce: str, threshold: float
) -> LeakageReport:
    sign = 1.0 if reduce == "max" else -1.0
    best = (sign * own.relative[:, :, 0]).argmax(1)
    rdlv = own.relative[np.arange(len(best)), best, 0]
    reduced = float(rdlv.max() if reduce == "max" else rdlv.min())
    null = None if others is None else (sign * others.relative[:, :, 0]).max(1)
    pool = own.similarity if others is None else np.vstack([own.similarity, others.similarity])
    p_values = None if null is None else [_p_value(v, null) for v in (sign * rdlv).tolist()]
    corrected = None if p_values is None else holm(p_values).tolist()
    images = []
    for index, (chosen, value) in enumerate(zip(best.tolist(), rdlv.tolist(), strict=True)):
        candidates = sign * pool[:, chosen, 0]
        images.append(
            ImageLeakage(
                reconstruction=chosen,
                similarity=float(own.similarity[index, chosen, 0]),
                prior_similarity=float(own.prior[index, 0, 0]),
                rdlv=value,
                p_value=None if p_values is None else p_values[index],
                rank=1 + int((candidates > candidates[index]).sum()),
                p_value_corrected=None if corrected is None else corrected[index],
            )
        )
    above = sign * reduced > threshold
    # What a perfect reconstruction of the image that the prior shows least would reach.
    shown = own.prior[..., 0]
    reach = float(relative_leakage(np.ones_like(shown), shown).max())
    out_of_reach = reduce == "max" and own.metrics[0] in BOUNDED_BY_ONE and reach <= threshold
    return LeakageReport(
        decision=WITHHOLD if above else PASS,
        reason=f"its RDLV {reduced:+.3f} is {'above' if above else 'not above'} "
        f"the threshold {threshold:.3f}"
        + (f", which nothing can exceed: a perfect copy has {reach:.3f}" if out_of_reach else ""),
        rdlv=reduced,
        threshold=threshold,
        metric=own.metrics[0],
        images=images,
        null=None if null is None else _quantiles(sign * null),
        n_others=0 if others is None else len(others.similarity),
        top1=float(np.mean([image.rank == 1 for image in images])),
        chance=1 / len(pool),
        relative=own.relative,
        closest=(sign * own.relative).argmax(1),
    )


def _p_value(value: float, null: np.ndarray) -> float:
    """Share of the null distribution at or above `value`, the value itself counted in."""
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def _quantiles(null: np.ndarray) -> dict[str, float]:
    named = {"median": 0.5, "q95": 0.95, "max": 1.0}
    return {name: float(np.quantile(null, q)) for name, q in named.items()}


def _check(
    originals: torch.Tensor,
    reconstructions: torch.Tensor,
    prior: torch.Tensor,
    others: torch.Tensor | None,
    reduce: str,
) -> None:
    if reduce not in REDUCTIONS:
        raise InputError(f"rdlv_reduce {reduce!r}: choose from {', '.join(REDUCTIONS)}")
    if not len(originals) or not len(reconstructions):
        raise InputError("there are no originals or no reconstructions to compare")
    shape = tuple(originals.shape[1:])
    shapes = [reconstructions.shape[1:], prior.shape] + (
        [] if others is None else [others.shape[1:]]
    )
    if any(tuple(s) != shape for s in shapes):
        raise InputError(f"reconstructions, prior and other images must have the shape {shape}")


# --- Records ------------------------------------------------------------------------

# The published filter's spelling, so that its tools find the files.
ARCHIVE_NAME = "rdvl_round{}.npz"
RECORD_NAME = "leakage_round{}.json"
PICTURE_NAME = "matches_round{}.png"


@dataclass
class LeakageRecord:
    """One site's result of one round, as it was written.

    Attributes:
        site: Name of the site.
        round_number: From 0.
        decision: "pass" or "withhold"; "unknown" in what the published tool wrote.
        reason: Why the update was passed or withheld.
        rdlv: Reduced over images; None where nothing could be measured.
        rdlv_per_image: RDLV of every training image.
        content: Everything that was recorded.
        path: The record's file.
    """

    site: str
    round_number: int
    decision: str
    reason: str
    rdlv: float | None
    rdlv_per_image: list[float]
    content: dict[str, Any]
    path: Path

    def best_matches(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Originals and their best reconstructions (N x C x H x W in [0, 1]), if kept."""
        archive = self.path.with_name(ARCHIVE_NAME.format(self.round_number))
        if not archive.is_file():
            return None
        arrays = read_arrays(archive)
        if "best_match_recons" not in arrays:
            return None
        if "best_match_inputs" not in arrays:
            raise InputError(f"{archive} holds reconstructions without their originals")
        return arrays["best_match_inputs"], arrays["best_match_recons"]


def write_leakage(
    folder: str | Path,
    site: str,
    round_number: int,
    report: LeakageReport,
    reconstructions: torch.Tensor | None = None,
    originals: torch.Tensor | None = None,
    *,
    details: Mapping[str, Any] | None = None,
    keep_images: bool = True,
) -> Path:
    """Write a site's result of one round: archive, record and picture, each atomically.

    Args:
        folder: The site's results.
        site: Name of the site.
        round_number: From 0.
        report: The measured leakage.
        reconstructions: M x C x H x W in [0, 1]; None where there are none.
        originals: N x C x H x W in [0, 1].
        details: Plain values to keep beside: attack, settings, noise, provenance.
        keep_images: Whether best matches are kept. They show training images and never
            leave the site's own folder.

    Returns:
        The JSON record's file.
    """
    folder = Path(folder)
    matches = None
    if keep_images and report.images and reconstructions is not None and originals is not None:
        chosen = [image.reconstruction for image in report.images]
        matches = originals.cpu().numpy(), reconstructions[chosen].cpu().numpy()
    with atomic_file(folder / ARCHIVE_NAME.format(round_number)) as file:
        np.savez(file, **_arrays(report, site, round_number, matches))
    if matches is not None:
        _draw_matches(folder / PICTURE_NAME.format(round_number), report, *matches)
    path = folder / RECORD_NAME.format(round_number)
    write_record(path, _finite({**_content(report, site, round_number), **(details or {})}))
    return path


def _arrays(
    report: LeakageReport,
    site: str,
    round_number: int,
    matches: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, Any]:
    """The published archive's keys."""
    chosen = np.array([image.reconstruction for image in report.images], dtype=np.int64)
    best = report.relative[np.arange(len(chosen)), chosen] if len(chosen) else np.zeros((0, 1))
    arrays = {
        "img_recon_sim_reduced": best,
        "img_recon_sim": report.relative,
        "has_closest_idx": np.asarray(bool(len(chosen))),
        "closest_idx": report.closest,
        "site": np.asarray(site),
        "round": np.asarray(round_number),
    }
    if matches is not None:
        arrays |= {"best_match_inputs": matches[0], "best_match_recons": matches[1]}
    return arrays


def _content(report: LeakageReport, site: str, round_number: int) -> dict[str, Any]:
    arrays = ("relative", "closest")
    values = {key: value for key, value in asdict(report).items() if key not in arrays}
    return {"site": site, "round": round_number, "statement": report.statement(), **values}


def _finite(value: Any) -> Any:
    """JSON has no NaN: None stands for what could not be measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _draw_matches(
    path: Path, report: LeakageReport, originals: np.ndarray, found: np.ndarray
) -> None:
    """Originals above their best reconstructions."""
    shown = min(len(originals), 16)
    if originals.ndim != 4 or originals.shape[1] != 3:
        named = {"original": originals, "reconstruction": found}
        rows = {name: list(torch.from_numpy(a[:shown])) for name, a in named.items()}
        values = [f"{image.rdlv:+.2f}" for image in report.images[:shown]]
        save_gallery(path, rows, {"reconstruction": values}, title="RDLV of each sample")
        return
    figure = blank_figure(1.2 * shown + 0.6, 3.0, constrained=False)
    axes = figure.subplots(2, shown, squeeze=False)
    for row, pictures in zip(axes, (originals, found), strict=True):
        for ax, picture in zip(row, pictures, strict=False):
            ax.imshow(picture.transpose(1, 2, 0).clip(0, 1))
            ax.set_axis_off()
    for ax, image in zip(axes[1], report.images, strict=False):
        ax.set_title(f"{image.rdlv:+.2f}", fontsize=8)
    axes[0, 0].set_title("original; below: RDLV", fontsize=8, loc="left")
    save_figure(figure, path, dpi=120, tight=True)


def read_leakage(workspace: str | Path) -> list[LeakageRecord]:
    """Every site's results of every round anywhere below a folder, in that order.

    Archives of the published tool, which have no record beside them, count as well.

    Raises:
        InputError: There is no such folder, it holds no results, or a record is broken.
    """
    workspace = Path(workspace)
    if not workspace.is_dir():
        raise InputError(f"{workspace} is not a folder")
    records = [_read(path) for path in sorted(workspace.rglob(RECORD_NAME.format("*")))]
    records += [_read_archive(path) for path in _published_archives(workspace)]
    if not records:
        raise InputError(
            f"{workspace} holds no leakage results ({RECORD_NAME.format('N')} or "
            f"{ARCHIVE_NAME.format('N')}); "
            "has a federation with the leakage filter run there?"
        )
    return sorted(records, key=lambda r: (r.site, r.round_number, str(r.path)))


def _published_archives(workspace: Path) -> list[Path]:
    """Archives that no record of ours stands beside."""
    found = sorted(workspace.rglob(ARCHIVE_NAME.format("*")))
    return [path for path in found if not path.with_name(_record_of(path)).is_file()]


def _record_of(archive: Path) -> str:
    start, end = ARCHIVE_NAME.split("{}")
    return RECORD_NAME.format(archive.name.removeprefix(start).removesuffix(end))


def _read_archive(path: Path) -> LeakageRecord:
    """A result of the published tool: values by image, without a verdict."""
    found = read_archive(path)
    values: list[float] = found.reduced[:, 0].tolist()
    largest = max(values, default=None)
    content = {
        "site": found.site, "round": found.round_number, "rdlv": largest,
        "images": [{"rdlv": value} for value in values],
        "decision": UNKNOWN, "statement": "written by the published tool, which states no verdict",
    }  # fmt: skip
    return LeakageRecord(
        found.site, found.round_number, UNKNOWN, "", largest, values, content, path
    )


def _read(path: Path) -> LeakageRecord:
    content = read_json_object(path, what="leakage record")
    try:
        return LeakageRecord(
            site=str(content["site"]),
            round_number=int(content["round"]),
            decision=str(content["decision"]),
            reason=str(content["reason"]),
            rdlv=None if content["rdlv"] is None else float(content["rdlv"]),
            rdlv_per_image=[float(image["rdlv"]) for image in content["images"]],
            content=content,
            path=path,
        )
    except BROKEN as error:
        raise InputError(f"the leakage record {path} is broken ({error!r:.200})") from None
