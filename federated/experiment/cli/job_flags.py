"""The flags that say what federation to run, common to two commands."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from federated.experiment.settings import FederationSettings


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what federation to run."""
    add = parser.add_argument
    add("--n_clients", type=int, default=1, help="1 takes the high-risk client 9 alone")
    add("--num_rounds", type=int, default=100, help="rounds of the federation")
    add("--min_clients", type=int, help="updates that a round needs (default: all clients')")
    add("--invert_clients", default="9", help="clients that measure leakage, such as 1,5,9")
    add("--batch_sizes", help="one per client, such as 4,4,4,4,8,8,8,8,1 (default: published)")
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", type=Path, help="folder of images (default: phantoms)")
    data.add_argument(
        "--dataset_json_prefix", "--dataset_json", help="lists are PREFIX + client + .json"
    )
    data.add_argument("--prior_file", type=Path, help="public image to start from and compare with")
    data.add_argument("--scale", type=float, default=1.0, help="share of the phantoms' sizes")
    data.add_argument("--image_size", type=int, default=32, help="side in pixels")
    data.add_argument("--num_class", type=int, default=2, help="number of classes")
    training = parser.add_argument_group("training")
    training.add_argument("--model_name", default="cnn", help="network (resnet18 for 224 px, GPU)")
    training.add_argument("--lr", type=float, default=0.01, help="local learning rate")
    training.add_argument("--local_epochs", type=int, default=1, help="local epochs per round")
    training.add_argument("--seed", type=int, default=0, help="of first weights and image order")
    own = parser.add_argument_group("own client")
    own.add_argument("--model", help="the sites' own network, as mymodule:build")
    own.add_argument("--loss", help="name of a loss, or mymodule:loss (default: cross-entropy)")
    own.add_argument("--data", help="the sites' own samples, as mymodule:dataset, for the lists")
    own.add_argument("--optimizer", help="and its settings, as 'adamw weight-decay=0.01'")
    leakage = parser.add_argument_group("leakage")
    leakage.add_argument("--rdlv_threshold", type=float, default=1.0, help="withhold above it")
    leakage.add_argument("--frequency", type=int, default=1, help="measure every so many rounds")
    leakage.add_argument("--method", default="full", help="full, bn, published, or an attack")
    leakage.add_argument("--iterations", type=int, default=300, help="of the inversion")


def federation_settings(args: argparse.Namespace) -> FederationSettings:
    """What a command line says, parsed with the flags of `add_job_flags`."""
    names = [field.name for field in dataclasses.fields(FederationSettings)]
    return FederationSettings(**{name: getattr(args, name) for name in names})
