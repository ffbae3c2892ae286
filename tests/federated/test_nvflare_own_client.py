"""A site's own model, loss, data and local training in NVFlare's components."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants, ValidateType

import federated
from attack.matching.replica import Replica
from audit.inversion import invert_update, target_from_update
from audit.settings import InversionSettings
from core.errors import InputError
from federated.flare.global_model import global_model
from federated.flare.inverter import GradInversionInverter
from federated.flare.rdlv_filter import RelativeDataLeakageValueFilter
from federated.flare.similarity import ImageSimMetric
from federated.flare.site_description import SiteDescription
from federated.flare.site_training import SiteSettings, SiteTraining
from federated.flare.taps import GlobalModelTap
from tests.federated.site_context import Site

MODULE = '''
"""A site's own code."""

import torch
from torch import nn

import gradinvbench as gib


def head(features, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, outputs))


def image_model():
    body = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(8, 8, 5, 1, 2))
    model = nn.Sequential(body, nn.Sigmoid(), head(8 * 64, 3))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    return model


def frozen_model():
    model = image_model()
    model[0][0].requires_grad_(False)
    return model


def volume_model():
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Sigmoid(), head(4 * 512, 2))


def signal_model():
    return nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.Sigmoid(), head(6 * 24, 3))


def table_model():
    return nn.Sequential(nn.Linear(7, 20), nn.Tanh(), nn.Linear(20, 2))


def distance(outputs, targets):
    return (outputs - targets).square().mean()


def samples(shape, outputs, values=False, n=1, bounded=True):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.rand((n + 12, *shape), generator=generator)
    if len(shape) > 1:
        # Neighbours are alike, as in an image.
        for dim in range(2, inputs.dim()):
            inputs = (inputs + inputs.roll(1, dim) + inputs.roll(2, dim)) / 3
    inputs = inputs if bounded else 4 * inputs - 2
    targets = torch.rand((n + 12, outputs), generator=generator)
    targets = targets if values else (targets > 0.5).float()
    return gib.GivenData((inputs[:n], targets[:n]), (inputs[n:], targets[n:]))


def image():
    return samples((1, 16, 16), 3)


def images():
    return samples((1, 16, 16), 3, n=4)


def volume():
    return samples((1, 8, 8, 8), 2)


def signal():
    return samples((2, 24), 3, values=True)


def row():
    return samples((7,), 2, values=True, bounded=False)
'''


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module in a folder of the Python path, as an app's custom folder is."""
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "flare_site.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("flare_site", None)


def client(model: str, loss: str, data: str, **more: Any) -> dict[str, Any]:
    return {
        "model": f"flare_site:{model}", "loss": loss, "data": f"flare_site:{data}",
        **{"batch_size": 2, "lr": 0.05, **more},
    }  # fmt: skip


IMAGES = client("image_model", "binary-cross-entropy", "images", aggregation_epochs=2)


def site(**arguments: Any) -> SiteTraining:
    torch.manual_seed(0)
    return SiteTraining(SiteSettings(None, None, **arguments), torch.device("cpu"))


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        "sgd momentum=0.9 nesterov=yes weight-decay=0.01",
        "adam clip-norm=0.05",
        "adamw weight-decay=0.1",
        "sgd schedule=cosine min-lr=0.01",
        "adam schedule=step step-size=2 gamma=0.5",
        "sgd accumulate=2 momentum=0.9",
        "adamw accumulate=2 schedule=cosine clip-norm=0.05",
    ],
)
def test_the_inverter_simulates_what_the_site_trained(optimizer: str) -> None:
    """torch.optim at the site and the attacker's unrolled steps agree at the true samples."""
    own = site(**IMAGES, optimizer=optimizer, fedproxloss_mu=0.1)
    own.model.double()
    start = own.weights()
    update = own.local_update(own.train(start, 1), start, 1)
    truth = own.train_images
    inputs = own.data.normalize(truth.images()).double()
    replica = Replica(target_from_update(update), torch.device("cpu"), torch.float64)
    found = replica.update(inputs, truth.labels().double(), create_graph=False)
    sent = torch.cat([g.flatten() for g in update.gradient.values()]).double()
    simulated = torch.cat([g.flatten() for g in found])
    assert (simulated - sent).norm() < 1e-4 * sent.norm()


@pytest.mark.parametrize("kept", ["schedule=cosine", "accumulate=2"])
def test_an_inverter_that_is_not_told_simulates_something_else(kept: str) -> None:
    # Otherwise the test above would pass for a site that ignores its settings.
    own = site(**IMAGES, optimizer=f"sgd {kept}")
    own.model.double()
    start = own.weights()
    change = own.train(start, 1)
    plain = site(**IMAGES).train(start, 1)
    assert max(np.abs(change[name] - plain[name]).max() for name in change) > 1e-4
    assert kept in own.local_update(change, start, 1).local.word


def test_batches_that_cannot_be_accumulated_are_refused() -> None:
    own = site(**IMAGES, optimizer="sgd accumulate=3")
    message = r"optimizer 'sgd accumulate=3': .*accumulate 3 does not divide the 2 batches"
    with pytest.raises(InputError, match=message):
        own.train(own.weights(), 0)


def test_frozen_parameters_are_no_part_of_the_update() -> None:
    own = site(**{**IMAGES, "model": "flare_site:frozen_model"})
    start = own.weights()
    update = own.local_update(own.train(start, 0), start, 0)
    assert "0.0.weight" in update.weight_diff
    assert "0.0.weight" not in update.gradient
    assert "0.2.weight" in update.gradient


def measured(
    tmp_path: Path, own: dict[str, Any], metric: str, method: str = "full", **inversion: Any
) -> dict[str, Any]:
    """The record of one round: tap, description, inverter and filter around real training."""
    folder = tmp_path / "app"
    (folder / "config").mkdir(parents=True)
    settings = {"method": method, "save_path": "found", "prior_weight": 0, **inversion}
    (folder / "config" / "config_inversion.json").write_text(json.dumps(settings))
    context = Site(
        folder,
        learner=SiteDescription(**own),
        grad_inverter=GradInversionInverter(print_names=False),
        sim_metric=ImageSimMetric(metric),
    ).context
    training = site(**own)
    start = training.weights()
    task = DXO(DataKind.WEIGHTS, data=start).to_shareable()
    task.set_header(AppConstants.CURRENT_ROUND, 0)
    GlobalModelTap().process(task, context)
    dxo = DXO(DataKind.WEIGHT_DIFF, data=training.train(start, 0))
    dxo.set_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1)
    measure = RelativeDataLeakageValueFilter(
        data=own["data"], rdlv_threshold=1e6, save_best_matches=True
    )
    sent = from_shareable(measure.process(dxo.to_shareable(), context))
    record = json.loads((folder / "leakage_round0.json").read_text())
    assert any(np.asarray(v).any() for v in sent.data.values()) == (record["decision"] == "pass")
    if record["decision"] == "pass":
        assert (folder / "matches_round0.png").is_file()
        assert any((folder / "found").rglob("recon*.png"))
    return record


def test_several_findings_and_adamw_are_measured(tmp_path: Path) -> None:
    """One channel, binary cross-entropy and three steps of AdamW."""
    own = client(
        "image_model", "binary-cross-entropy", "image", aggregation_epochs=3,
        lr=1e-3, optimizer="adamw weight-decay=0.01",
    )  # fmt: skip
    record = measured(tmp_path, own, "ssim", "spectral", iterations=250)
    assert record["metric"] == "ssim"
    (one,) = record["images"]
    assert one["similarity"] > 0.5
    assert one["similarity"] > 2 * one["prior_similarity"]
    assert one["rank"] == 1
    granted = " ".join(record["attack"]["granted"])
    assert "adamw" in granted
    assert "binary-cross-entropy" in granted


@pytest.mark.parametrize(
    ("model", "loss", "data", "metric", "method"),
    [
        ("volume_model", "binary-cross-entropy", "volume", "ssim", "full"),
        ("signal_model", "mse", "signal", "ssim", "full"),
        ("signal_model", "mse", "signal", "ncc", "spectral"),
        ("table_model", "mse", "row", "ncc", "full"),
    ],
)
def test_samples_of_other_shapes_are_measured(
    tmp_path: Path, model: str, loss: str, data: str, metric: str, method: str
) -> None:
    own = client(model, loss, data)
    record = measured(tmp_path, own, metric, method, iterations=300, learning_rate=0.05)
    assert record["metric"] == metric
    assert record["images"][0]["similarity"] > 0.8
    assert record["attack"]["labels_from"] == "exact"


def test_a_similarity_that_does_not_fit_withholds_and_says_why(tmp_path: Path) -> None:
    record = measured(tmp_path, client("table_model", "mse", "row"), "ssim", iterations=2)
    assert record["decision"] == "withhold"
    assert "sim_metric ssim does not fit rows of a table" in record["reason"]


def test_the_published_attack_is_for_published_clients(tmp_path: Path) -> None:
    own = site(**client("image_model", "binary-cross-entropy", "image"))
    start = own.weights()
    update = own.local_update(own.train(start, 0), start, 0)
    with pytest.raises(InputError, match="method published: is for images"):
        invert_update(update, InversionSettings(method="published", start="grey"))


def test_reported_losses_vanish_with_the_reconstruction() -> None:
    """Optimised findings are targets in the end, and not variables that stand for them."""
    own = site(**client("image_model", "binary-cross-entropy", "image"))
    start = own.weights()
    update = own.local_update(own.train(start, 0), start, 0)
    settings = InversionSettings(
        labels="joint", start="grey", iterations=600, smoothing=0, learning_rate=0.05, tv_weight=0
    )
    found = invert_update(update, settings)
    assert found.labels.shape == (1, 3)
    assert found.losses["gradient"] == pytest.approx(found.trace[-1]["objective"], abs=1e-3)
    assert found.losses["gradient"] < 0.02


class Calm:
    """No abort."""

    triggered = False


@pytest.mark.parametrize(
    ("own", "name"),
    [
        (IMAGES, "accuracy"),
        (client("signal_model", "flare_site:distance", "signal"), "negative_loss"),
    ],
)
def test_the_learner_trains_and_validates(tmp_path: Path, own: dict[str, Any], name: str) -> None:
    context = Site(tmp_path).context
    learner = federated.CXRLearner(None, None, **own)  # type: ignore[arg-type]
    learner.initialize({}, context)
    weights = {k: v.numpy() for k, v in global_model(model=own["model"]).state_dict().items()}

    def task(kind: str | None = None) -> Shareable:
        made = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
        made.set_header(AppConstants.CURRENT_ROUND, 0)
        made.set_header(AppConstants.VALIDATE_TYPE, kind)
        return made

    sent = from_shareable(learner.train(task(), context, Calm()))
    assert set(sent.data) == set(weights)
    found = learner.validate(task(ValidateType.MODEL_VALIDATE), context, Calm())
    scores = from_shareable(found).data
    assert {f"train_{name}", f"val_{name}"} <= set(scores)
    assert all(np.isfinite(scores[f"{part}_{name}"]) for part in ("train", "val"))


def test_the_same_seed_gives_the_same_global_model() -> None:
    first, second = (global_model(seed=3, model="flare_site:image_model") for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "your own samples need your own model"),
        ({"model": "flare_site:nothing"}, "model flare_site:nothing: flare_site has no nothing"),
        ({"loss": "hinge"}, "hinge"),
        ({"loss": 3}, "loss 3: must be text"),
        ({"optimizer": "adamw epochs=3"}, "the others are arguments of their own"),
        ({"optimizer": "adamw momentum=0.9"}, "momentum"),
        ({"optimizer": "sgd accumulate=0"}, "accumulate must be a whole number"),
        ({"optimizer": "sgd accumulate=two"}, "accumulate=two"),
        ({"optimizer": "sgd schedule=linear"}, "schedule 'linear' is none of"),
        ({"optimizer": "sgd batches=2"}, "the others are arguments of their own"),
        ({"data": None}, "data_root None: must be a path"),
    ],
)
def test_what_a_site_cannot_use_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SiteDescription(**{**IMAGES, **change})


def test_data_that_do_not_fit_the_model_are_refused_before_training() -> None:
    own = site(**{**IMAGES, "data": "flare_site:signal"})
    with pytest.raises(InputError, match="does not take images of shape 2 x 24"):
        _ = own.train_images
