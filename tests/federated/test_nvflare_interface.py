"""What job folders and scripts rely on: flags, component arguments, and their defaults."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

FLAGS = {
    "--app_folder": Path,
    "--output": Path,
    "--n_clients": int,
    "--num_rounds": int,
    "--invert_clients": str,
    "--batch_sizes": str,
    "--data_root": Path,
    "--dataset_json_prefix": str,
    "--dataset_json": str,
    "--prior_file": Path,
    "--sigma0": float,
}
COMPONENTS: dict[str, dict[str, Any]] = {
    "GaussianPrivacy": {"sigma0": 0.1, "max_percentile": 95, "data_kinds": None},
    "RelativeDataLeakageValueFilter": {
        # Needed but for a site's own samples.
        "data_root": None,
        "dataset_json": None,
        "frequency": 1,
        "start_round": 0,
        "inverter_name": "grad_inverter",
        "sim_metric_name": "sim_metric",
        "prior_filename": None,
        "image_key": "image",
        "rdlv_reduce": "max",
        "rdlv_threshold": 1.0,
        "data_kinds": None,
        "save_best_matches": False,
    },
    "GradInversionInverter": {
        "learner_name": "learner",
        "cfg_file": "config/config_inversion.json",
        "bn_momentum": 0.1,
        "compute_update_sums": True,
        "print_names": True,
        "use_determinism": True,
        "prior_transforms": None,
        "save_transforms": None,
        "save_fmt": ".png",
    },
    "CXRLearner": {
        "data_root": "./dataset",
        "dataset_json": "./dataset.json",
        "aggregation_epochs": 1,
        "lr": 1e-2,
        "fedproxloss_mu": 0.0,
        "analytic_sender_id": "analytic_sender",
        "batch_size": 64,
        "num_workers": 0,
        "train_set": "training",
        "valid_set": "validation",
        "test_set": "testing",
        "model_name": "resnet18",
        "num_class": 2,
        "cache_rate": 1.0,
        "seed": 0,
    },
    "ImageSimMetric": {"metrics": None},
}


@pytest.mark.parametrize(("flag", "kind"), FLAGS.items())
def test_flag(flag: str, kind: Any) -> None:
    from federated.experiment.cli.create_job_config import build_parser

    action = build_parser()._option_string_actions[flag]
    assert (action.type or str) is kind


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_arguments(component: str) -> None:
    pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")
    import federated

    parameters = inspect.signature(getattr(federated, component)).parameters
    # New arguments may be added behind these.
    expected = COMPONENTS[component]
    assert {name: parameters[name].default for name in expected} == expected
    assert list(parameters)[: len(expected)] == list(expected)


def test_every_argument_is_kept_under_its_name(tmp_path: Path) -> None:
    """NVFlare's job API writes a component's arguments from its attributes."""
    pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")
    import federated
    from federated.flare.site_description import SiteDescription

    datalist = tmp_path / "list.json"
    datalist.write_text("{}")
    data = {"data_root": str(tmp_path), "dataset_json": str(datalist)}
    built = [
        federated.AuditFilter("mysite:build", "mysite:data"),
        federated.ReceivedModelFilter("mysite:build", "mysite:data"),
        federated.GaussianPrivacy(),
        federated.RelativeDataLeakageValueFilter(**data),
        federated.GradInversionInverter(),
        federated.CXRLearner(**data),
        federated.ImageSimMetric(),
        SiteDescription(**data),
    ]
    for component in built:
        names = list(inspect.signature(type(component)).parameters)
        assert [name for name in names if not hasattr(component, name)] == []
