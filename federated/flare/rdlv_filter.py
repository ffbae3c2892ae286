"""The filter that measures what an update would give away, before it leaves the site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from audit.inversion import UpdateReconstruction
from audit.leakage import LeakageReport, measure_leakage, write_leakage
from audit.pairwise_rdlv import compute_rdlv
from audit.similarity import ImageSimMetric, SimMetric
from core.data.data_sets import DataSets, take_samples
from core.data.list_files import load_datalist
from core.data.listed_images import ImageListDataset
from core.data.specs import DataSpec
from core.errors import InputError
from core.records import provenance
from federated.flare.inverter import Inverter, prior_image
from federated.flare.own_samples import OwnSamples, site_data
from federated.flare.site_training import check_list
from federated.flare.withholding import FailClosedFilter
from federated.gate.passage import Schedule, WithheldError

TRAIN_SET = "training"
# Other patients come from the first of these that a list has. The attack may know the
# validation images; test images it has never seen.
OTHERS_SETS = ("testing", "validation")
# Other patients that the null distribution is drawn from, at most.
MAX_OTHERS = 200
# Side in pixels below which a reconstruction tells nothing, and passes for harmless.
SMALLEST_SIDE = 16
# How far values may lie outside of 0 to 1: rounding, no more.
OUT_OF_RANGE = 0.05


class MeasuredLeakError(WithheldError):
    """The update leaks too much; its result is written already."""


class RelativeDataLeakageValueFilter(FailClosedFilter):
    """Inverts the site's own outgoing update and withholds it if it leaks too much.

    Every `frequency`-th update from number `start_round` on, an `Inverter` reconstructs images
    from the update as it would leave (put this filter after `GaussianPrivacy`), and the
    relative data leakage value (RDLV) compares them with the training images. Results are
    written to the site's app folder; see `audit.leakage.write_leakage`.

    Source: Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning
        Unsafe?, 2022, https://arxiv.org/abs/2202.06924.

    Args:
        data_root: Folder that the list's paths start from; not needed with `data`.
        dataset_json: The site's data list; likewise.
        frequency: Measure every that many updates. The site counts them itself, from 0: what
            the server states as the round decides nothing.
        start_round: The first update to measure.
        inverter_name: Component that inverts.
        sim_metric_name: Component that compares images.
        prior_filename: Image that was public before; grey if None.
        image_key: What the list calls the path of an image.
        rdlv_reduce: "max", or "min" for metrics of which small values leak (distances).
        rdlv_threshold: The update is withheld where its RDLV is above it; with "min", where
            minus its RDLV is, which is 1 for a perfect reconstruction.
        data_kinds: Kinds of data to filter; `["WEIGHT_DIFF", "WEIGHTS"]` if None.
        save_best_matches: Keep training images beside their reconstructions, for figures.
        random_rounds: Measure each update with probability 1 / frequency instead, which the
            server cannot foresee.
        data: The site's own samples, `module:function` of the job's custom folder (see
            `core.data.given.GivenData`), in place of the list: the truth to compare with. Its
            validation samples are the other patients, and their mean is what was public
            before, without a prior image. SSIM fits images, signals and volumes in [0, 1]; for
            tables and values without bounds give the component `sim_metric_name` "ncc",
            "cosine" or "norm".

    Raises:
        InputError: Missing folder or list, or impossible values.
    """

    def __init__(
        self,
        data_root: str | None = None,
        dataset_json: str | None = None,
        frequency: int = 1,
        start_round: int = 0,
        inverter_name: str = "grad_inverter",
        sim_metric_name: str = "sim_metric",
        prior_filename: str | None = None,
        image_key: str = "image",
        rdlv_reduce: str = "max",
        rdlv_threshold: float = 1.0,
        data_kinds: list[str] | None = None,
        save_best_matches: bool = False,
        random_rounds: bool = False,
        data: str | None = None,
    ) -> None:
        super().__init__(data_kinds)
        if not isinstance(data or "", str):
            raise InputError(f"data {data!r}: must be text")
        if not data:
            check_list(data_root, dataset_json)
        self._schedule = Schedule(frequency, start_round, random_rounds)
        if rdlv_reduce not in ("max", "min"):
            raise InputError(f"rdlv_reduce {rdlv_reduce!r}: choose max or min")
        _check_threshold(rdlv_threshold, rdlv_reduce)
        if not isinstance(image_key, str) or not image_key:
            raise InputError(f"image_key {image_key!r}: must be the key of images in the data list")
        self.data_root = data_root
        self.dataset_json = dataset_json
        self.frequency = frequency
        self.start_round = start_round
        self.inverter_name = inverter_name
        self.sim_metric_name = sim_metric_name
        self.prior_filename = prior_filename
        self.image_key = image_key
        self.rdlv_reduce = rdlv_reduce
        self.rdlv_threshold = rdlv_threshold
        self.save_best_matches = save_best_matches
        self.random_rounds = random_rounds
        self.data = data

    def process_update(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        """See `FailClosedFilter.process_update`."""
        passage = self._passage
        if not self._schedule.due(passage.count):
            self.unmeasured(f"update {passage.count} with {self._schedule}", fl_ctx)
            return dxo
        found = self._component(self.inverter_name, Inverter, fl_ctx)(dxo, Shareable(), fl_ctx)
        if self.data:
            images = _checked_samples(getattr(found, "images", found), self._own.spec)
            originals = OwnSamples(self._own.train, self._own.spec).images()
        else:
            images = _checked_images(getattr(found, "images", found))
            originals = self._images(TRAIN_SET, images.shape[-1])
        report = self._measure(originals, images, fl_ctx)
        details = {**self._details(), **_attack_details(found)}
        number = passage.name
        write_leakage(
            self._folder(fl_ctx), fl_ctx.get_identity_name(), number, report, images, originals,
            details=details, keep_images=self.save_best_matches,
        )  # fmt: skip
        passage.reason = report.reason
        self.log_info(fl_ctx, f"round {number}: {report.statement()}", fire_event=False)
        if report.withheld:
            raise MeasuredLeakError(report.reason)
        return dxo

    @staticmethod
    def compute_rdlv(
        train_loader: Iterable[Mapping[str, Any]],
        recons: Sequence[Any],
        sim_metric: SimMetric,
        reduce: str | None = "max",
        recon_transforms: Callable[[Any], Any] | None = None,
        image_key: str = "image",
        prior: Any = None,
        fl_ctx: FLContext | None = None,
    ) -> tuple[np.ndarray, np.ndarray, list[list[Any]], np.ndarray | None]:
        """The published function of this name, see `audit.pairwise_rdlv.compute_rdlv`."""
        return compute_rdlv(
            train_loader, recons, sim_metric, reduce, recon_transforms, image_key, prior, fl_ctx
        )

    def setting(self) -> dict[str, Any]:
        """See `FailClosedFilter.setting`."""
        return {
            **super().setting(),
            **asdict(self._schedule),
            "rdlv_reduce": self.rdlv_reduce,
            "rdlv_threshold": self.rdlv_threshold,
        }

    def record_withheld(self, error: Exception, fl_ctx: FLContext) -> None:
        """Write a result that says why nothing was measured."""
        if not isinstance(error, MeasuredLeakError):
            super().record_withheld(error, fl_ctx)

    def _measure(
        self, originals: torch.Tensor, found: torch.Tensor, fl_ctx: FLContext
    ) -> LeakageReport:
        metric = self._component(self.sim_metric_name, SimMetric, fl_ctx)
        if self.data:
            _check_metric(metric, self._own.spec)
        others = self._others(found.shape[-1])
        return measure_leakage(
            originals,
            found,
            self._prior(originals, others),
            metric,
            reduce=self.rdlv_reduce,
            threshold=self.rdlv_threshold,
            others=others,
        )

    def _prior(self, originals: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        """What was public before, of the originals' shape."""
        shape = tuple(originals.shape[1:])
        if self.prior_filename:
            return prior_image(self.prior_filename, shape, "prior_filename")
        if not self.data:
            return torch.full_like(originals[0], 0.5)
        if others is not None:
            return others.mean(0)
        return self._own.spec.denormalize(torch.zeros(1, *shape))[0]

    @cached_property
    def _own(self) -> DataSets:
        assert self.data
        return site_data(self.data)

    def _images(self, section: str, size: int, most: int | None = None) -> torch.Tensor:
        """Of a section in [0, 1]; N x 3 x size x size."""
        assert self.data_root is not None
        assert self.dataset_json is not None
        samples = load_datalist(self.dataset_json, section, key=self.image_key)[:most]
        return ImageListDataset(self.data_root, samples, size).images()

    def _others(self, size: int) -> torch.Tensor | None:
        """Images of other patients; None if there are none."""
        if self.data:
            own = self._own
            most = min(MAX_OTHERS, len(own.val))
            return take_samples(own.val, range(most), own.spec)[0] if most else None
        for section in OTHERS_SETS:
            try:
                found = self._images(section, size, MAX_OTHERS)
            except InputError as error:
                self.logger.info(f"no other patients from the list: {error}")
                continue
            if len(found):
                return found
        return None

    def _component(self, name: str, kind: type[Any], fl_ctx: FLContext) -> Any:
        component = fl_ctx.get_engine().get_component(name)
        if not isinstance(component, kind):
            raise InputError(
                f"the job's component {name!r} is {type(component).__name__}, not a {kind.__name__}"
            )
        return component

    def _folder(self, fl_ctx: FLContext) -> Path:
        return Path(fl_ctx.get_prop(FLContextKey.APP_ROOT))

    def _details(self) -> dict[str, Any]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "filter": {
                "frequency": self.frequency,
                "start_round": self.start_round,
                "rdlv_reduce": self.rdlv_reduce,
                "prior_filename": self.prior_filename,
            },
            "provenance": provenance(device, seed=0),
        }


def _check_threshold(threshold: Any, reduce: str) -> None:
    """Refuse a threshold that no reconstruction can exceed, whatever leaks."""
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not math.isfinite(threshold):
        raise InputError(f"rdlv_threshold {threshold!r}: must be a finite number")
    if reduce == "min" and threshold >= 1:
        raise InputError(
            f"rdlv_threshold {threshold!r}: with rdlv_reduce 'min' a perfect reconstruction "
            "reaches 1; give a smaller one"
        )


def _checked_images(found: Any) -> torch.Tensor:
    """Reconstructions as they can be measured.

    Raises:
        WithheldError: They are no images: what cannot be measured does not leave.
    """
    images = torch.as_tensor(found)
    if images.ndim != 4 or not len(images):
        raise WithheldError(f"the inverter gave no images but shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise WithheldError(f"the reconstructions are of type {images.dtype}, not real numbers")
    if min(images.shape[-2:]) < SMALLEST_SIDE:
        raise WithheldError(
            f"the reconstructions have {tuple(images.shape[-2:])} pixels: at fewer than "
            f"{SMALLEST_SIDE} a side nothing can be recognised and nothing is measured"
        )
    images = images.float()
    finite = images[torch.isfinite(images)]
    if len(finite) and float((finite - finite.clamp(0, 1)).abs().max()) > OUT_OF_RANGE:
        raise WithheldError("the reconstructions lie outside of 0 to 1: they are no images")
    return images


def _checked_samples(found: Any, spec: DataSpec) -> torch.Tensor:
    """Reconstructions of a site's own samples as they can be measured.

    Raises:
        WithheldError: They are of another shape or range: what cannot be measured does not leave.
    """
    samples = torch.as_tensor(found)
    if not len(samples) or tuple(samples.shape[1:]) != spec.shape:
        raise WithheldError(
            f"the inverter gave samples of shape {tuple(samples.shape[1:])}, the site's are "
            f"{spec.shape}"
        )
    samples = samples.float()
    finite = samples[torch.isfinite(samples)]
    if len(finite) and float((finite - spec.clamp(finite)).abs().max()) > OUT_OF_RANGE:
        raise WithheldError("the reconstructions lie outside of 0 to 1, where the samples lie")
    return samples


def _check_metric(metric: SimMetric, spec: DataSpec) -> None:
    """Refuse a similarity that says nothing of such samples."""
    needs_windows = isinstance(metric, ImageSimMetric) and "ssim" in metric.metrics
    if needs_windows and (len(spec.shape) < 2 or not spec.bounded):
        kind = "rows of a table" if len(spec.shape) < 2 else "values outside of 0 to 1"
        raise InputError(f"sim_metric ssim does not fit {kind}: choose ncc, cosine or norm")


def _attack_details(found: UpdateReconstruction | Any) -> dict[str, Any]:
    if not isinstance(found, UpdateReconstruction):
        return {}
    kept = (
        "method",
        "iterations",
        "seconds",
        "losses",
        "labels_from",
        "granted",
        "status",
        "settings",
    )
    return {"attack": {name: getattr(found, name) for name in kept}}
