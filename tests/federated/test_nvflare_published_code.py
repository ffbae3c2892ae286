"""Code that was written for the published package: its names, calls and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")

from nvflare.apis.dxo import DXO, DataKind

import nvflare_gradinv
from audit.inversion import invert_update
from audit.leakage import measure_leakage, read_leakage
from audit.settings import settings_from_dict
from core.errors import InputError
from federated.experiment.cli import plot_rdlv_per_round, plot_rdlv_vs_gauss
from federated.experiment.runs import read_runs
from federated.phantoms.data_set import LIST_PREFIX, make_phantoms
from nvflare_gradinv.filters.image_sim import ImageSimMetric, SimMetric
from nvflare_gradinv.utils.rdlv_io import load_rdlv_results, save_rdlv_results
from tests.federated.site_context import Site
from tests.federated.sites import update_of

SIZE = 16


class Nearness(SimMetric):
    """A similarity as an extension of the published package has it."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = ["nearness"]
        self.contexts: list[Any] = []

    def __call__(self, source, reference, fl_ctx, is_channel_first=False):  # type: ignore[no-untyped-def]
        assert is_channel_first
        assert torch.is_tensor(source)
        self.contexts.append(fl_ctx)
        return {"nearness": 1 / (1 + float((source - reference).abs().mean()))}


class Guess(nvflare_gradinv.Inverter):
    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.images = images

    def __call__(self, dxo, shareable, fl_ctx):  # type: ignore[no-untyped-def]
        return self.images


def results(folder: Path, site: str, number: int, values: list[float]) -> Path:
    """An archive as numpy writes it, by hand."""
    path = folder / site / "simulate_job" / f"app_{site}" / f"rdvl_round{number}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    reduced = np.array(values)[:, None]
    np.savez(
        path,
        img_recon_sim_reduced=reduced,
        img_recon_sim=np.repeat(reduced[:, None], 2, 1),
        has_closest_idx=np.asarray(True),
        closest_idx=np.zeros((len(values), 1), int),
        site=np.asarray(site),
        round=np.asarray(number),
    )
    return path


def workspace(folder: Path, sigma0: float, accuracy: float) -> None:
    """A run of the published tool."""
    for number in (0, 1):
        path = results(folder, "site-9", number, [0.7 - 0.01 * sigma0, 0.2])
    config = path.parent / "config"
    config.mkdir()
    noise = {"path": "nvflare_gradinv.GaussianPrivacy", "args": {"sigma0": sigma0}}
    content = {"task_result_filters": [{"filters": [noise]}]}
    (config / "config_fed_client.json").write_text(json.dumps(content))
    scores = folder / "server" / "simulate_job" / "cross_site_val" / "cross_val_results.json"
    scores.parent.mkdir(parents=True)
    best = {"SRV_best_FL_global_model.pt": {"test_accuracy": accuracy}}
    scores.write_text(json.dumps({"site-9": best}))


def test_archives_of_the_published_tool_are_drawn(tmp_path: Path) -> None:
    for sigma0, accuracy in ((0.0, 0.97), (10.0, 0.9)):
        workspace(tmp_path / f"run{sigma0:g}", sigma0, accuracy)
    records = read_leakage(tmp_path / "run0")
    assert [(r.site, r.round_number, r.rdlv_per_image) for r in records] == [
        ("site-9", 0, [0.7, 0.2]),
        ("site-9", 1, [0.7, 0.2]),
    ]
    assert {r.decision for r in records} == {"unknown"}
    assert plot_rdlv_per_round.main(["--workspace", str(tmp_path / "run0")]) == 0
    assert plot_rdlv_vs_gauss.main(["--workspaces", str(tmp_path)]) == 0
    assert (tmp_path / "rdlv_vs_gauss.png").stat().st_size > 1000
    found = {run.sigma0: run.test_accuracy for run in read_runs(tmp_path)}
    assert found == {0.0: 0.97, 10.0: 0.9}


def test_a_record_of_ours_counts_once(tmp_path: Path) -> None:
    results(tmp_path, "site-1", 0, [0.5])
    (record,) = read_leakage(tmp_path)
    content = {**record.content, "reason": "", "decision": "pass", "rdlv": 0.25}
    record.path.with_name("leakage_round0.json").write_text(json.dumps(content))
    (ours,) = read_leakage(tmp_path)
    assert (ours.decision, ours.rdlv) == ("pass", 0.25)


@pytest.mark.parametrize("kind", ["cut", "pickled", "text", "other keys"])
def test_a_damaged_archive_is_named(tmp_path: Path, kind: str) -> None:
    path = results(tmp_path, "site-1", 0, [0.5])
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "pickled":
        np.savez(path, **{"img_recon_sim_reduced": np.array([{}], dtype=object)})
    elif kind == "text":
        path.write_text("nothing")
    else:
        np.savez(path, other=np.zeros(3))
    said = r"(: img_recon_sim_reduced\.npy holds object| is broken| is no whole)"
    with pytest.raises(InputError, match=rf"rdvl_round0\.npz{said}"):
        read_leakage(tmp_path)


def test_rdlv_io_gives_back_what_it_was_given(tmp_path: Path) -> None:
    values = torch.rand(2, 3, 2)
    matches = [[torch.rand(3, 4, 4), np.ones((3, 4, 4))] for _ in range(2)]
    closest = values.argmax(1)
    save_rdlv_results(
        save_path=str(tmp_path / "one"),
        img_recon_sim_reduced=values.amax(1),
        img_recon_sim=values,
        closest_idx=closest,
        site="site-9",
        round_number=4,
        best_matches=matches,
    )
    found = load_rdlv_results(str(tmp_path / "one.npz"))
    np.testing.assert_allclose(found["img_recon_sim"], values.numpy())
    np.testing.assert_array_equal(found["closest_idx"], closest.numpy())
    assert (found["site"], found["round"]) == ("site-9", 4)
    np.testing.assert_array_equal(found["best_match_inputs"][1], matches[1][0].numpy())
    save_rdlv_results(tmp_path / "two.npz", values, values, None, "site-1", 0)
    assert load_rdlv_results(tmp_path / "two.npz")["closest_idx"] is None
    assert "best_match_recons" not in load_rdlv_results(tmp_path / "two.npz")


@pytest.mark.parametrize(
    "metric", [ImageSimMetric(["ssim", "norm"]), Nearness()], ids=["ours", "own"]
)
def test_compute_rdlv_pair_by_pair_is_the_filters_measurement(metric: SimMetric) -> None:
    originals, found, prior = torch.rand(3, 3, 9, 9), torch.rand(4, 3, 9, 9), torch.rand(3, 9, 9)
    loader = DataLoader([{"photo": 255 * image} for image in originals], batch_size=1)
    reduced, values, matches, closest = nvflare_gradinv.RelativeDataLeakageValueFilter.compute_rdlv(
        train_loader=loader,
        recons=found,
        sim_metric=metric,
        recon_transforms=lambda image: 255 * image,
        image_key="photo",
        prior=255 * prior,
    )
    report = measure_leakage(originals, found, prior, metric)
    np.testing.assert_allclose(values, report.relative, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(closest, report.closest)
    assert reduced[:, 0] == pytest.approx([image.rdlv for image in report.images], rel=1e-4)
    assert torch.equal(matches[1][1], found[report.images[1].reconstruction])


def test_run_inversion_is_the_audits(tmp_path: Path) -> None:
    update = update_of(2, 2, size=SIZE)
    cfg = {
        "model_name": "cnn", "num_classes": 2, "resolution": SIZE, "iterations": 12,
        "local_bs": 2, "local_num_images": 2, "local_epoch": 1, "lr_local": 0.01,
        "start_rand": True, "save_path": str(tmp_path / "found"),
        "criterion": "BCEWithLogitsLoss", "save_every": 500,
    }  # fmt: skip
    weights = {name: value.numpy() for name, value in update.global_weights.items()}
    change = {name: value.numpy() for name, value in update.weight_diff.items()}
    images, labels = nvflare_gradinv.GradInversionInverter.run_inversion(
        cfg=cfg, updates=change, global_weights={"model": weights}, bn_momentum=0.1
    )
    expected = invert_update(update, settings_from_dict(cfg), public=torch.zeros(0, 3, SIZE, SIZE))
    assert torch.equal(images, expected.images)
    assert torch.equal(labels, expected.labels)
    assert len(list((tmp_path / "found").glob("recon_b*.png"))) == 2
    del cfg["num_classes"]
    with pytest.raises(InputError, match="has no num_classes"):
        nvflare_gradinv.GradInversionInverter.run_inversion(cfg, change, weights)


def test_the_filter_runs_an_extensions_metric_on_images_of_another_key(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "data", scale=0.02, size=SIZE)
    path = tmp_path / "data" / f"{LIST_PREFIX}9.json"
    content = json.loads(path.read_text())
    for section in content.values():
        for entry in section:
            entry["xray"] = entry.pop("image")
    path.write_text(json.dumps(content))
    metric = Nearness()
    images = torch.rand(1, 3, SIZE, SIZE)
    site = Site(tmp_path, grad_inverter=Guess(images), sim_metric=metric)
    checked = nvflare_gradinv.RelativeDataLeakageValueFilter(
        data_root=str(tmp_path / "data"), dataset_json=str(path), image_key="xray",
        rdlv_threshold=50.0,
    )  # fmt: skip
    shared = DXO(DataKind.WEIGHT_DIFF, data={"w": np.ones(2, np.float32)}).to_shareable()
    checked.process(shared, site.context)
    record = json.loads((tmp_path / "leakage_round0.json").read_text())
    assert (record["metric"], record["decision"]) == ("nearness", "pass")
    assert metric.contexts


def test_the_published_package_has_what_its_extensions_build_on() -> None:
    from nvflare.apis.fl_component import FLComponent

    from audit import similarity

    for name in ("SimMetric", "ImageSimMetric"):
        component = getattr(nvflare_gradinv, name)
        assert issubclass(component, FLComponent)
        assert issubclass(component, getattr(similarity, name))
    assert ImageSimMetric("norm").metrics == ["norm"]
