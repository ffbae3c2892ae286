"""The filter that measures what an update would give away, before it leaves the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import DXO
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from audit.inversion import UpdateReconstruction
from audit.leakage import LeakageReport, measure_leakage, write_leakage
from audit.similarity import SimMetric
from core.data.image_files import load_image
from core.data.list_files import load_datalist
from core.data.listed_images import ImageListDataset
from core.errors import InputError
from core.records import provenance
from federated.flare.inverter import Inverter
from federated.flare.withholding import FailClosedFilter, WithheldError, current_round

TRAIN_SET = "training"
# Other patients come from the first of these that a list has. The attack may know the
# validation images; test images it has never seen.
OTHERS_SETS = ("testing", "validation")
# Other patients that the null distribution is drawn from, at most.
MAX_OTHERS = 200


class MeasuredLeakError(WithheldError):
    """The update leaks too much; its result is written already."""


class RelativeDataLeakageValueFilter(FailClosedFilter):
    """Inverts the site's own outgoing update and withholds it if it leaks too much.

    Every `frequency`-th round from `start_round` on, an `Inverter` reconstructs images
    from the update as it would leave (put this filter after `GaussianPrivacy`), and the
    relative data leakage value (RDLV) compares them with the training images. Results are
    written to the site's app folder; see `audit.leakage.write_leakage`.

    Source: Hatamizadeh et al., Do Gradient Inversion Attacks Make Federated Learning
        Unsafe?, 2022, https://arxiv.org/abs/2202.06924.

    Args:
        data_root: Folder that the list's paths start from.
        dataset_json: The site's data list.
        frequency: Measure every that many rounds.
        start_round: The first round to measure.
        inverter_name: Component that inverts.
        sim_metric_name: Component that compares images.
        prior_filename: Image that was public before; grey if None.
        image_key: Name of the images in the list; only "image" is known.
        rdlv_reduce: "max", or "min" for metrics of which small values leak.
        rdlv_threshold: Above it the update is withheld.
        data_kinds: Kinds of data to filter; `["WEIGHT_DIFF", "WEIGHTS"]` if None.
        save_best_matches: Keep training images beside their reconstructions, for figures.

    Raises:
        InputError: Missing folder or list, or impossible values.
    """

    def __init__(
        self,
        data_root: str,
        dataset_json: str,
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
    ) -> None:
        super().__init__(data_kinds)
        if not isinstance(data_root, str) or not Path(data_root).is_dir():
            raise InputError(f"data_root: there is no folder {data_root!r}")
        if not isinstance(dataset_json, str) or not Path(dataset_json).is_file():
            raise InputError(f"dataset_json: there is no file {dataset_json!r}")
        if frequency < 1 or start_round < 0:
            raise InputError("frequency must be at least 1 and start_round not below 0")
        if image_key != "image":
            raise InputError(f"image_key {image_key!r}: data lists name their images 'image'")
        if rdlv_reduce not in ("max", "min"):
            raise InputError(f"rdlv_reduce {rdlv_reduce!r}: choose max or min")
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

    def process_update(self, dxo: DXO, fl_ctx: FLContext) -> DXO:
        """See `FailClosedFilter.process_update`."""
        number = current_round(dxo, fl_ctx)
        if number < self.start_round or number % self.frequency:
            return dxo
        found = self._component(self.inverter_name, Inverter, fl_ctx)(dxo, Shareable(), fl_ctx)
        images = torch.as_tensor(getattr(found, "images", found)).float()
        originals = self._images(TRAIN_SET, images.shape[-1])
        report = self._measure(originals, images, fl_ctx)
        details = {**self._details(), **_attack_details(found)}
        write_leakage(
            self._folder(fl_ctx), fl_ctx.get_identity_name(), number, report, images, originals,
            details=details, keep_images=self.save_best_matches,
        )  # fmt: skip
        self.log_info(fl_ctx, f"round {number}: {report.statement()}", fire_event=False)
        if report.withheld:
            raise MeasuredLeakError(report.reason)
        return dxo

    def record_withheld(self, error: Exception, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Write a result that says why nothing was measured."""
        if not isinstance(error, MeasuredLeakError):
            super().record_withheld(error, shareable, fl_ctx)

    def _measure(
        self, originals: torch.Tensor, found: torch.Tensor, fl_ctx: FLContext
    ) -> LeakageReport:
        size = found.shape[-1]
        prior = torch.full_like(originals[0], 0.5)
        if self.prior_filename:
            prior = load_image(self.prior_filename, size)
        return measure_leakage(
            originals,
            found,
            prior,
            self._component(self.sim_metric_name, SimMetric, fl_ctx),
            reduce=self.rdlv_reduce,
            threshold=self.rdlv_threshold,
            others=self._others(size),
        )

    def _images(self, section: str, size: int, most: int | None = None) -> torch.Tensor:
        """Of a section in [0, 1]; N x 3 x size x size."""
        samples = load_datalist(self.dataset_json, section)[:most]
        return ImageListDataset(self.data_root, samples, size).images()

    def _others(self, size: int) -> torch.Tensor | None:
        """Images of other patients; None if the list has none."""
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
