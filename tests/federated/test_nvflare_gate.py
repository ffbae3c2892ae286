"""What leaves a site is what is allowed, and the site's own log says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants

from audit import gate_log
from audit.similarity import ImageSimMetric
from core.errors import InputError
from federated.flare.audit_filter import AuditFilter
from federated.flare.gaussian_privacy import GaussianPrivacy
from federated.flare.inverter import Inverter
from federated.flare.rdlv_filter import RelativeDataLeakageValueFilter
from federated.flare.withholding import GLOBAL_WEIGHTS, VANISHING_WEIGHT, FailClosedFilter
from federated.phantoms.data_set import LIST_PREFIX, make_phantoms
from tests.federated.site_context import Site

# What must never be found in anything that leaves.
SECRET = np.arange(64, dtype=np.float32) + 0.125


class Gives(Inverter):
    """Reconstructs what it was told to."""

    def __init__(self, images: Any) -> None:
        super().__init__()
        self.images, self.calls = images, 0

    def __call__(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> Any:
        self.calls += 1
        return self.images


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, scale=0.02, size=32)
    return folder


def weights() -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.ones(3)}


def result(kind: str = DataKind.WEIGHT_DIFF, data: Any = None, **meta: Any) -> Shareable:
    return DXO(kind, data=weights() if data is None else data, meta=meta).to_shareable()


def everything(value: Any) -> bytes:
    """All bytes that a result would carry."""
    if isinstance(value, DXO):
        return everything(value.data) + everything(value.meta)
    if isinstance(value, dict):
        return b"".join(str(k).encode() + everything(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return b"".join(map(everything, value))
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    return value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()


def leaks(sent: Shareable) -> bool:
    return SECRET.tobytes() in everything(dict(sent)) or b"0.125" in everything(dict(sent))


def with_key(planted: Any) -> Shareable:
    sent = result()
    sent["extra"] = planted
    return sent


def with_header(planted: Any) -> Shareable:
    sent = result()
    sent.set_header("extra", planted)
    return sent


def failed(code: str) -> Shareable:
    sent = result(data={"w": SECRET})
    sent.set_return_code(code)
    sent["more"] = SECRET
    return sent


PLANTED: dict[str, Any] = {
    "meta": lambda: result(extra=SECRET),
    "meta text": lambda: result(extra="0.125 1.125"),
    "key": lambda: with_key(SECRET),
    "nested key": lambda: with_key({"deep": [{"er": SECRET}]}),
    "header": lambda: with_header(SECRET),
    "nested variable": lambda: result(data={**weights(), "z": {"deep": SECRET}}),
    "variable of objects": lambda: result(data={"z": np.array([SECRET, None], object)}),
    "complex variable": lambda: result(data={"z": SECRET.astype(complex)}),
    "list variable": lambda: result(data={"z": SECRET.tolist()}),
    "metrics that are an array": lambda: result(DataKind.METRICS, {"accuracy": SECRET}),
    "metrics within metrics": lambda: result(DataKind.METRICS, {"a": {"b": SECRET}}),
    "many metrics": lambda: result(
        DataKind.METRICS, {f"m{i}": float(v) for i, v in enumerate(np.tile(SECRET, 2))}
    ),
    "initial metrics": lambda: result(**{MetaKey.INITIAL_METRICS: {"a": SECRET}}),
    "steps": lambda: result(**{MetaKey.NUM_STEPS_CURRENT_ROUND: SECRET}),
    "long name": lambda: result(data={"0.125 " * 40: np.ones(1)}),
    "execution error": lambda: failed(ReturnCode.EXECUTION_EXCEPTION),
    "task aborted": lambda: failed(ReturnCode.TASK_ABORTED),
    "an invented code": lambda: failed("0.125"),
    "app defined": lambda: result(DataKind.APP_DEFINED, {"x": SECRET}),
    "collection": lambda: result(
        DataKind.COLLECTION, {"a": DXO(DataKind.WEIGHT_DIFF, weights(), {"extra": SECRET})}
    ),
    "small metrics of many parts": lambda: result(
        DataKind.COLLECTION,
        {f"p{i}": DXO(DataKind.METRICS, {"x": float(v)}) for i, v in enumerate(np.tile(SECRET, 2))},
    ),
    "parts of parts": lambda: result(
        DataKind.COLLECTION,
        {
            f"p{i}": DXO(
                DataKind.COLLECTION,
                {f"q{j}": DXO(DataKind.METRICS, {"x": float(v)}) for j, v in enumerate(SECRET[:9])},
            )
            for i in range(9)
        },
    ),
    "initial metrics of many parts": lambda: result(
        DataKind.COLLECTION,
        {
            f"p{i}": DXO(DataKind.WEIGHT_DIFF, weights(), {MetaKey.INITIAL_METRICS: {"x": 0.125}})
            for i in range(40)
        },
    ),
    "names of parts": lambda: result(
        DataKind.COLLECTION,
        {f"{i} 0.125 " * 10: DXO(DataKind.METRICS, {}) for i in range(64)},
    ),
    "names of metrics": lambda: result(
        DataKind.METRICS, {f"{i} 0.125 " * 10: 1.0 for i in range(64)}
    ),
    "the name of a part that is withheld": lambda: result(
        DataKind.COLLECTION, {"0.125\n" * 99: DXO(DataKind.WEIGHT_DIFF, weights())}
    ),
    "collection of metrics": lambda: result(
        DataKind.COLLECTION, {"a": DXO(DataKind.METRICS, {"x": SECRET})}
    ),
}


# One withholds what it cannot measure, the other lets it pass: without a tap neither can.
GATES: dict[str, Callable[[], FailClosedFilter]] = {
    "noise": lambda: GaussianPrivacy(0),
    "audit": lambda: AuditFilter("no:model", "no:data"),
    "audit that records": lambda: AuditFilter("no:model", "no:data", record_only=True),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_stays(tmp_path: Path, planted: str, gate: str) -> None:
    sent = GATES[gate]().process(PLANTED[planted](), Site(tmp_path).context)
    assert not leaks(sent)
    (line,) = gate_log.verify(tmp_path)
    assert line["filter"] in ("GaussianPrivacy", "AuditFilter")


def test_an_order_of_variables_says_nothing(tmp_path: Path) -> None:
    turned = dict(reversed(weights().items()))
    site = Site(tmp_path).context
    site.set_prop(GLOBAL_WEIGHTS, weights(), private=True, sticky=True)
    sent = [GaussianPrivacy(0).process(result(data=d), site) for d in (weights(), turned)]
    first, second = (list(from_shareable(each).data) for each in sent)
    assert first == second


def test_names_of_no_variable_stay_where_an_update_is_withheld(tmp_path: Path) -> None:
    site = Site(tmp_path).context
    site.set_prop(GLOBAL_WEIGHTS, weights(), private=True, sticky=True)
    planted = {f"0.125 {i}": np.ones((1, 125, 0)) for i in range(99)}
    sent = GaussianPrivacy(0).process(result(data={**weights(), **planted}), site)
    assert not leaks(sent)
    zeros = from_shareable(sent).data
    assert {name: value.shape for name, value in zeros.items()} == {"w": (3, 4), "b": (3,)}
    assert not any(value.any() for value in zeros.values())


def test_what_aggregation_needs_leaves(tmp_path: Path) -> None:
    meta = {
        MetaKey.NUM_STEPS_CURRENT_ROUND: 7,
        AppConstants.CURRENT_ROUND: 3,
        MetaKey.INITIAL_METRICS: {"accuracy": 0.5, "auc": None, "loss": np.float32(1.5)},
    }
    given = result(**meta)
    given.set_header(AppConstants.NUM_ROUNDS, 9)
    sent = GaussianPrivacy(0).process(given, Site(tmp_path).context)
    dxo = from_shareable(sent)
    assert {key: dxo.get_meta_prop(key) for key in meta} == meta
    assert sent.get_header(AppConstants.NUM_ROUNDS) == 9
    for name, value in weights().items():
        np.testing.assert_array_equal(dxo.data[name], value)


def test_variables_of_another_model_stay(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.context.set_prop(GLOBAL_WEIGHTS, weights(), private=True, sticky=True)
    good = GaussianPrivacy(0).process(result(), site.context)
    np.testing.assert_array_equal(from_shareable(good).data["w"], weights()["w"])
    for data in ({**weights(), "z": SECRET}, {**weights(), "b": SECRET}):
        assert not leaks(GaussianPrivacy(0).process(result(data=data), site.context))


@pytest.mark.parametrize("steps", [VANISHING_WEIGHT, 7])
def test_a_stated_vanishing_weight_switches_nothing_off(
    phantoms: Path, tmp_path: Path, steps: float
) -> None:
    given = {MetaKey.NUM_STEPS_CURRENT_ROUND: steps}
    noisy = GaussianPrivacy(1.0).process(result(**given), Site(tmp_path).context)
    assert not np.array_equal(from_shareable(noisy).data["w"], weights()["w"])
    inverter = Gives(torch.rand(1, 3, 32, 32))
    site = Site(tmp_path, grad_inverter=inverter, sim_metric=ImageSimMetric())
    leakage_filter(phantoms).process(result(**given), site.context)
    assert inverter.calls == 1


@pytest.mark.parametrize(
    "value",
    [torch.full((12,), 1e-300, dtype=torch.float64), np.full(12, 1e-300), np.full(12, -0.0)],
    ids=["tiny tensor", "tiny array", "signs of zeros"],
)
def test_what_only_looks_like_nothing_is_measured(
    phantoms: Path, tmp_path: Path, value: Any
) -> None:
    inverter = Gives(torch.rand(1, 3, 32, 32))
    site = Site(tmp_path, grad_inverter=inverter, sim_metric=ImageSimMetric())
    leakage_filter(phantoms).process(result(data={"w": value}), site.context)
    assert inverter.calls == 1


def leakage_filter(phantoms: Path, **more: Any) -> RelativeDataLeakageValueFilter:
    return RelativeDataLeakageValueFilter(
        str(phantoms), str(phantoms / f"{LIST_PREFIX}9.json"), **more
    )


def training_image(phantoms: Path) -> torch.Tensor:
    from core.data.list_files import load_datalist
    from core.data.listed_images import ImageListDataset

    samples = load_datalist(phantoms / f"{LIST_PREFIX}9.json", "training")
    return ImageListDataset(phantoms, samples, 32).images()


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(1, 3, 1, 1),
        torch.rand(1, 3, 32, 32) > 0.5,
        torch.rand(1, 3, 32, 32).to(torch.complex64),
        torch.full((1, 3, 32, 32), 200.0),
        torch.rand(1, 3, 32, 32) * 255,
        torch.rand(3, 32, 32),
        torch.rand(0, 3, 32, 32),
        torch.full((1, 3, 32, 32), float("inf")),
        "nothing",
        None,
    ],
    ids=["1 px", "bool", "complex", "200", "0..255", "3-D", "none", "inf", "text", "None"],
)
def test_reconstructions_that_are_no_images_are_no_proof(
    phantoms: Path, tmp_path: Path, images: Any
) -> None:
    site = Site(tmp_path, grad_inverter=Gives(images), sim_metric=ImageSimMetric())
    sent = leakage_filter(phantoms).process(result(), site.context)
    assert not np.any(from_shareable(sent).data["w"])


@pytest.mark.parametrize(("share", "withheld"), [(1.0, True), (0.0, False)])
def test_with_distances_small_ones_leak(
    phantoms: Path, tmp_path: Path, share: float, withheld: bool
) -> None:
    original = training_image(phantoms)
    found = share * original + (1 - share) * torch.rand_like(original)
    site = Site(tmp_path, grad_inverter=Gives(found), sim_metric=Distance())
    checked = leakage_filter(phantoms, rdlv_reduce="min", rdlv_threshold=0.5)
    sent = checked.process(result(), site.context)
    assert (not np.any(from_shareable(sent).data["w"])) == withheld


class Distance(ImageSimMetric):
    """Euclidean distance: 0 for equal images."""

    def __init__(self) -> None:
        super().__init__("norm")


def test_a_threshold_that_nothing_reaches_is_said(phantoms: Path, tmp_path: Path) -> None:
    found = training_image(phantoms)
    site = Site(tmp_path, grad_inverter=Gives(found), sim_metric=ImageSimMetric())
    prior = str(phantoms / "prior.png")
    leakage_filter(phantoms, rdlv_threshold=100.0, prior_filename=prior).process(
        result(), site.context
    )
    assert (
        "nothing can exceed" in json.loads((tmp_path / "leakage_round0.json").read_text())["reason"]
    )


# --- The log ------------------------------------------------------------------------


def test_every_result_is_a_line_of_the_log(tmp_path: Path) -> None:
    site, gate = Site(tmp_path), GaussianPrivacy(0.5)
    gate.process(result(**{AppConstants.CURRENT_ROUND: 0}), site.context)
    gate.process(result(data={"w": np.array([np.nan])}), site.context)
    gate.process(result(DataKind.METRICS, {"accuracy": 0.5}), site.context)
    gate.process(make_reply(ReturnCode.TASK_ABORTED), site.context)
    entries = gate_log.verify(tmp_path)
    assert [e["verdict"] for e in entries] == ["passed", "withheld", "no update", "no result"]
    assert [e["round"] for e in entries] == [0, None, None, None]
    assert entries[0]["setting"] == {
        "data_kinds": ["WEIGHT_DIFF", "WEIGHTS"], "max_percentile": 95, "sigma0": 0.5,
    }  # fmt: skip
    assert len({entry["sent"] for entry in entries}) == 4


@pytest.mark.parametrize("change", ["edit", "remove", "insert", "swap", "damage"])
def test_a_changed_log_is_noticed(tmp_path: Path, change: str) -> None:
    for number in range(4):
        gate_log.append(tmp_path, {"round": number, "verdict": "withheld"})
    path = tmp_path / gate_log.LOG_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "edit":
        lines[1] = lines[1].replace(b"withheld", b"passed")
    elif change == "remove":
        del lines[1]
    elif change == "insert":
        lines.insert(1, lines[1])
    elif change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines[1] = lines[1][:20] + b"\n"
    assert len(gate_log.verify(path)) == 4
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"line [23]"):
        gate_log.verify(path)
    assert gate_log.main([str(path)]) == 2


def test_without_a_log_nothing_leaves(tmp_path: Path) -> None:
    site = Site(tmp_path / "nowhere")
    sent = GaussianPrivacy(0.5).process(result(), site.context)
    assert not np.any(from_shareable(sent).data["w"])


def test_the_log_grows_after_a_damaged_end(tmp_path: Path) -> None:
    gate_log.append(tmp_path, {"round": 0})
    with open(tmp_path / gate_log.LOG_NAME, "ab") as file:
        file.write(b"{half a line")
    with pytest.raises(InputError, match="damaged"):
        gate_log.append(tmp_path, {"round": 1})
