"""A site's training script for NVFlare's Client API; the recipe runs it at every site.

python -m federated.client --help
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from federated.flare.site_training import SiteSettings, SiteTraining, TrainingDiverged

if TYPE_CHECKING:
    from nvflare.app_common.abstract.fl_model import FLModel


def build_parser() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = argparse.ArgumentParser(description="Train at a site, for NVFlare's Client API.")
    parser.add_argument("--data_root", help="folder of images")
    parser.add_argument("--dataset_json", help="the site's data list")
    parser.add_argument("--model_name", default="cnn", help="network")
    parser.add_argument("--num_class", type=int, default=2, help="number of classes")
    parser.add_argument("--image_size", type=int, default=32, help="side in pixels")
    parser.add_argument("--batch_size", type=int, default=4, help="images per local step")
    parser.add_argument("--aggregation_epochs", type=int, default=1, help="local epochs per round")
    parser.add_argument("--lr", type=float, default=1e-2, help="local learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images")
    parser.add_argument(
        "--optimizer", default="sgd", help='and its settings, as "adamw weight-decay=0.01"'
    )
    parser.add_argument("--model", help="the site's own network, as mymodule:build")
    parser.add_argument("--loss", help="name of a loss, or mymodule:loss (default: cross-entropy)")
    parser.add_argument("--data", help="the site's own samples, as mymodule:dataset, for the list")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the federation's tasks until there are no more."""
    import nvflare.client as flare

    site = SiteTraining(SiteSettings(**vars(build_parser().parse_args(arguments))))
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        flare.send(answer(site, model))


def answer(site: SiteTraining, model: FLModel) -> FLModel:
    """One round: the weight difference and the global model's accuracy.

    Args:
        site: The site that trains.
        model: The global model, with the number of the round.

    Returns:
        What is sent; result filters see it before.
    """
    from nvflare.apis.dxo import MetaKey
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.app_constant import AppConstants

    from federated.flare.withholding import diverged_meta

    site.load(model.params)
    valid = site.evaluate(site.valid_images)
    number = model.current_round or 0
    steps = site.steps_per_epoch * site.settings.aggregation_epochs
    meta: dict[str, Any] = {MetaKey.NUM_STEPS_CURRENT_ROUND: steps}
    try:
        change = site.train(model.params, number)
    except TrainingDiverged as error:
        change = site.no_change()
        meta = diverged_meta(str(error))
    return FLModel(
        params={name: torch.from_numpy(np.asarray(value)) for name, value in change.items()},
        params_type=ParamsType.DIFF,
        metrics={valid.name: valid.score},
        meta={**meta, AppConstants.CURRENT_ROUND: number},
    )


if __name__ == "__main__":
    main()
