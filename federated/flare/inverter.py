"""Inverters: components that reconstruct a site's images from its own update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torchvision.utils import save_image

from audit.inversion import UpdateReconstruction, invert_update
from audit.settings import InversionSettings, load_inversion_settings, settings_from_dict
from audit.updates import LocalUpdate
from core.data.image_files import load_image
from core.errors import InputError
from core.pictures import read_image, save_gallery
from federated.flare.images import chest_spec
from federated.flare.networks import GPU_IMAGE_SIZE, network_spec
from federated.flare.withholding import GLOBAL_WEIGHTS, current_round
from federated.gate.allowed import array_of


class Inverter(FLComponent, ABC):
    """Reconstructs training images from what is about to leave the site."""

    @abstractmethod
    def __call__(
        self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext
    ) -> UpdateReconstruction | torch.Tensor | np.ndarray:
        """Invert an update.

        Args:
            dxo: The update, as NVFlare's data exchange object.
            shareable: The task result that the update came in.
            fl_ctx: NVFlare's context of the site.

        Returns:
            Reconstructions, M x C x H x W in [0, 1] (or samples of another shape), alone or with
            their details.
        """


@runtime_checkable
class KnowsTraining(Protocol):
    """A component that can say how the site trained: `CXRLearner` or `SiteDescription`."""

    def local_update(self, change: Mapping[str, np.ndarray], bn_momentum: float) -> LocalUpdate:
        """The update together with what an attacker knows of the local training."""

    def public_images(self) -> torch.Tensor:
        """Images of other people that anybody may know; P x C x H x W in [0, 1]."""


class GradInversionInverter(Inverter):
    """Inverts the update with one of the methods of `audit.inversion`.

    Args:
        learner_name: Component that knows the local training.
        cfg_file: The inversion's configuration, absolute or relative to the app.
        bn_momentum: Of the network's BatchNorm layers.
        compute_update_sums: Log how much of the update there is.
        print_names: Log the variables' names.
        use_determinism: Deterministic kernels, so that a run can be repeated.
        prior_transforms: Reads the prior image: path to C x H x W in [0, 1].
        save_transforms: Applied to the reconstructions before they are saved.
        save_fmt: Ending of saved reconstructions.
    """

    def __init__(
        self,
        learner_name: str = "learner",
        cfg_file: str = "config/config_inversion.json",
        bn_momentum: float = 0.1,
        compute_update_sums: bool = True,
        print_names: bool = True,
        use_determinism: bool = True,
        prior_transforms: Callable[[str], torch.Tensor] | None = None,
        save_transforms: Callable[[torch.Tensor], torch.Tensor] | None = None,
        save_fmt: str = ".png",
    ) -> None:
        super().__init__()
        for key, value in {"learner_name": learner_name, "cfg_file": cfg_file}.items():
            if not isinstance(value, str):
                raise InputError(f"{key} {value!r}: must be text")
        if not isinstance(bn_momentum, (int, float)) or not 0 < bn_momentum <= 1:
            raise InputError(f"bn_momentum {bn_momentum!r}: must be above 0 and at most 1")
        self.learner_name = learner_name
        self.cfg_file = cfg_file
        self.bn_momentum = bn_momentum
        self.compute_update_sums = compute_update_sums
        self.print_names = print_names
        self.use_determinism = use_determinism
        self.prior_transforms = prior_transforms
        self.save_transforms = save_transforms
        self.save_fmt = save_fmt

    def __call__(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> UpdateReconstruction:
        """See `Inverter`.

        Raises:
            InputError: No learner, no global weights, or an update that is no difference.
        """
        if dxo.data_kind != DataKind.WEIGHT_DIFF:
            raise InputError(f"data of kind {dxo.data_kind}: only WEIGHT_DIFF can be inverted")
        app_root = Path(fl_ctx.get_prop(FLContextKey.APP_ROOT) or ".")
        settings = load_inversion_settings(app_root / self.cfg_file)
        learner = self._learner(dxo, fl_ctx)
        change = {name: array_of(value) for name, value in dxo.data.items()}
        update = learner.local_update(change, self.bn_momentum)
        if self.compute_update_sums:
            self._log_sums(update, fl_ctx)
        found = self._invert(update, settings, learner.public_images())
        self.log_info(
            fl_ctx,
            f"{found.method}: {len(found.images)} reconstructions of {found.iterations} "
            f"iterations in {found.seconds:.1f} s, losses {found.losses}",
        )
        if settings.save_path:
            self._save(found.images, app_root / settings.save_path / _round_name(fl_ctx, dxo))
        return found

    @staticmethod
    def run_inversion(
        cfg: Mapping[str, Any],
        updates: Mapping[str, np.ndarray],
        global_weights: Mapping[str, Any],
        bn_momentum: float = 0.1,
        prior_transforms: Callable[[str], torch.Tensor] | None = None,
        save_transforms: Callable[[torch.Tensor], torch.Tensor] | None = None,
        save_fmt: str = ".png",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The published function of this name: invert an update without a federation.

        Args:
            cfg: The keys of `config_inversion.json` and, as the published inverter fills
                them in, `num_classes`, `local_bs`, `local_num_images`, `local_epoch` and
                `lr_local`.
            updates: Local minus global state, by name.
            global_weights: The global state by name, or that under "model".
            bn_momentum: Of the network's BatchNorm layers.
            prior_transforms: Reads the prior image: path to C x H x W in [0, 1].
            save_transforms: Applied to the reconstructions before they are saved.
            save_fmt: Ending of saved reconstructions; they go to the configuration's
                `save_path`, if it has one.

        Returns:
            N x C x H x W images in [0, 1], and N class indices.

        Raises:
            InputError: A key is missing, or the configuration cannot be used.
        """
        settings = settings_from_dict(cfg)
        inverter = GradInversionInverter(
            bn_momentum=bn_momentum,
            prior_transforms=prior_transforms,
            save_transforms=save_transforms,
            save_fmt=save_fmt,
        )
        update = described_update(cfg, updates, global_weights, bn_momentum)
        found = inverter._invert(update, settings, torch.zeros(0, *update.data.shape))
        if settings.save_path:
            inverter._save(found.images, Path(settings.save_path))
        return found.images, found.labels

    def _learner(self, dxo: DXO, fl_ctx: FLContext) -> KnowsTraining:
        learner = fl_ctx.get_engine().get_component(self.learner_name)
        if not isinstance(learner, KnowsTraining):
            raise InputError(
                f"learner_name {self.learner_name!r}: the job has no such component that knows "
                "the local training (a CXRLearner, or "
                "federated.flare.site_description.SiteDescription)"
            )
        if hasattr(learner, "observe"):
            learner.observe(fl_ctx.get_prop(GLOBAL_WEIGHTS), current_round(dxo, fl_ctx))
        return learner

    def _invert(
        self, update: LocalUpdate, settings: InversionSettings, public: torch.Tensor
    ) -> UpdateReconstruction:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        prior = self._prior(settings, update)
        with torch.backends.cudnn.flags(enabled=True, deterministic=self.use_determinism):
            return invert_update(update, settings, prior=prior, public=public, device=device)

    def _prior(self, settings: InversionSettings, update: LocalUpdate) -> torch.Tensor | None:
        if not settings.img_prior:
            return None
        if self.prior_transforms is not None:
            return torch.as_tensor(self.prior_transforms(settings.img_prior))
        return prior_image(settings.img_prior, update.data.shape, "img_prior")

    def _log_sums(self, update: LocalUpdate, fl_ctx: FLContext) -> None:
        change = update.weight_diff
        if self.print_names:
            self.log_info(fl_ctx, f"inverting {', '.join(change)}")
        buffers = [n for n in change if "running" in n or "num_batches" in n]
        for what, names in (("weight", set(change) - set(buffers)), ("BatchNorm", set(buffers))):
            total = sum(float(change[name].double().abs().sum()) for name in names)
            self.log_info(fl_ctx, f"{what} updates sum up to {total:.4g}")
            if names and not total:
                self.log_warning(fl_ctx, f"the {what} updates are all zero")

    def _save(self, images: torch.Tensor, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shown = images if self.save_transforms is None else self.save_transforms(images)
        if shown.dim() != 4 or shown.shape[1] not in (1, 3):
            rows = {"reconstruction": list(shown)}
            save_gallery(folder / f"recon{self.save_fmt}", rows)
            return
        for index, image in enumerate(shown):
            save_image(image, folder / f"recon_b{index}{self.save_fmt}")


def prior_image(path: str, shape: tuple[int, ...], key: str) -> torch.Tensor:
    """A public image of the samples' shape, in [0, 1].

    Args:
        path: Its file.
        shape: C x H x W.
        key: What it was given as, for messages.

    Raises:
        InputError: No image, or the samples are none.
    """
    if len(shape) == 3 and shape[0] == 3 and shape[1] == shape[2]:
        return load_image(path, shape[1])
    return read_image(path, shape, key)


def described_update(
    cfg: Mapping[str, Any],
    updates: Mapping[str, np.ndarray],
    global_weights: Mapping[str, Any],
    bn_momentum: float,
) -> LocalUpdate:
    """An update with what the published configuration says of the local training.

    Raises:
        InputError: It lacks a key.
    """
    missing = [key for key in ("model_name", "num_classes", "local_bs") if key not in cfg]
    if missing:
        raise InputError(f"the inversion's configuration has no {', '.join(missing)}")
    size, classes = int(cfg.get("resolution", GPU_IMAGE_SIZE)), int(cfg["num_classes"])
    state = global_weights.get("model", global_weights)
    return LocalUpdate(
        model=network_spec(str(cfg["model_name"]), classes, size),
        data=chest_spec(size, classes),
        global_weights={name: torch.as_tensor(value) for name, value in state.items()},
        weight_diff={name: torch.as_tensor(value) for name, value in updates.items()},
        batch_size=int(cfg["local_bs"]),
        n_images=int(cfg.get("local_num_images", cfg["local_bs"])),
        local_epochs=int(cfg.get("local_epoch", 1)),
        learning_rate=float(cfg.get("lr_local", 0.01)),
        bn_momentum=bn_momentum,
    )


def _round_name(fl_ctx: FLContext, dxo: DXO) -> str:
    return f"{fl_ctx.get_identity_name()}_rnd{current_round(dxo, fl_ctx)}"
