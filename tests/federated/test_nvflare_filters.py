"""Filters on their own: noise, and withholding."""

from __future__ import annotations

import json
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

import federated
import nvflare_gradinv
from audit import gate_log
from audit.similarity import ImageSimMetric
from core.errors import InputError
from federated.flare.gaussian_privacy import GaussianPrivacy, percentile_of_nonzero
from federated.flare.inverter import Inverter
from federated.flare.rdlv_filter import RelativeDataLeakageValueFilter
from federated.flare.taps import GlobalModelTap
from federated.flare.withholding import DIVERGED, GLOBAL_WEIGHTS, ROUND, VANISHING_WEIGHT
from federated.phantoms.data_set import LIST_PREFIX, make_phantoms
from tests.federated.site_context import Site


def update(**more: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "fc.weight": rng.normal(0, 1e-3, (300, 100)).astype(np.float32),
        "fc.bias": np.zeros(50, np.float32),
        "bn.num_batches_tracked": np.array(2, np.int64),
        **more,
    }


def result(data: Any, kind: DataKind = DataKind.WEIGHT_DIFF) -> Shareable:
    dxo = DXO(kind, data=data)
    dxo.set_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 7)
    dxo.set_meta_prop(AppConstants.CURRENT_ROUND, 0)
    return dxo.to_shareable()


def is_zero_difference(sent: Shareable) -> bool:
    dxo = from_shareable(sent)
    light = dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND) == VANISHING_WEIGHT
    return light and all(not np.asarray(value).any() for value in dxo.data.values())


def record(folder: Path, number: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"leakage_round{number}.json").read_text())


# --- Noise --------------------------------------------------------------------------


def test_the_noise_level_is_sigma0_times_the_percentile_over_the_whole_update(
    tmp_path: Path,
) -> None:
    data = update()
    values = np.abs(np.concatenate([v.ravel().astype(float) for v in data.values()]))
    sigma = 0.5 * np.percentile(values[values > 0], 95)
    site = Site(tmp_path)
    sent = from_shareable(GaussianPrivacy(sigma0=0.5).process(result(update()), site.context)).data
    noise = (sent["fc.weight"].astype(float) - data["fc.weight"]).ravel()
    n = noise.size
    assert noise.std() == pytest.approx(sigma, rel=5 / np.sqrt(2 * n))
    assert abs(noise.mean()) < 5 * sigma / np.sqrt(n)
    # Variables that are all zero get the same noise.
    assert sent["fc.bias"].std() == pytest.approx(sigma, rel=0.5)


def test_noise_keeps_names_shapes_and_types(tmp_path: Path) -> None:
    data = update(half=np.ones((2, 3), np.float16), tensor=torch.ones(4, 2))
    sent = from_shareable(GaussianPrivacy(3.0).process(result(data), Site(tmp_path).context)).data
    assert list(sent) == list(data)
    for name, value in update(half=np.ones((2, 3), np.float16)).items():
        assert isinstance(sent[name], np.ndarray)
        assert (sent[name].dtype, sent[name].shape) == (value.dtype, value.shape)
    assert isinstance(sent["tensor"], torch.Tensor)
    assert sent["tensor"].shape == (4, 2)


def test_noise_of_different_variables_is_independent(tmp_path: Path) -> None:
    data = {name: np.ones(20000, np.float32) for name in "ab"}
    sent = from_shareable(GaussianPrivacy(1.0).process(result(data), Site(tmp_path).context)).data
    assert abs(np.corrcoef(sent["a"], sent["b"])[0, 1]) < 0.05


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4), (None, None)])
def test_a_seed_repeats_the_noise(tmp_path: Path, seeds: tuple[int | None, int | None]) -> None:
    first, second = (
        from_shareable(
            GaussianPrivacy(1.0, seed=seed).process(result(update()), Site(tmp_path).context)
        ).data["fc.weight"]
        for seed in seeds
    )
    assert np.array_equal(first, second) == (seeds == (3, 3))


def test_without_noise_the_update_is_unchanged(tmp_path: Path) -> None:
    sent = from_shareable(GaussianPrivacy(0).process(result(update()), Site(tmp_path).context))
    for name, value in update().items():
        np.testing.assert_array_equal(sent.data[name], value)
    assert sent.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND) == 7


def test_the_percentile_ignores_zeros() -> None:
    values = {"a": np.array([0, 0, 0, -2.0]), "b": np.array(4.0)}
    assert percentile_of_nonzero(values, 50) == 3
    assert percentile_of_nonzero({"a": np.zeros(3)}, 95) == 0


@pytest.mark.parametrize(
    "arguments",
    [{"sigma0": -1}, {"sigma0": float("nan")}, {"sigma0": "x"}, {"max_percentile": 101}],
)
def test_impossible_noise_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        GaussianPrivacy(**arguments)


# --- Withholding --------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.array([np.nan]), np.array([np.inf]), "text", None])
def test_an_update_that_cannot_get_noise_does_not_leave(tmp_path: Path, bad: Any) -> None:
    sent = GaussianPrivacy(1.0).process(result(update(bad=bad)), Site(tmp_path).context)
    if sent.get_return_code() == ReturnCode.OK:
        assert is_zero_difference(sent)
    assert record(tmp_path)["decision"] == "withhold"


def test_data_that_no_filter_can_look_into_does_not_leave(tmp_path: Path) -> None:
    sent = GaussianPrivacy(1.0).process(
        result({"image": np.ones(3)}, DataKind.APP_DEFINED), Site(tmp_path).context
    )
    assert sent.get_return_code() == ReturnCode.EMPTY_RESULT
    no_dxo = Shareable()
    no_dxo["image"] = np.ones(3)
    sent = GaussianPrivacy(1.0).process(no_dxo, Site(tmp_path).context)
    assert sent.get_return_code() == ReturnCode.EMPTY_RESULT
    assert "image" not in sent


def test_metrics_and_errors_pass(tmp_path: Path) -> None:
    metrics = result({"accuracy": 0.5}, DataKind.METRICS)
    context = Site(tmp_path).context
    assert from_shareable(GaussianPrivacy(1.0).process(metrics, context)).data["accuracy"] == 0.5
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply = GaussianPrivacy(1.0).process(failed, context)
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION


def test_weights_are_replaced_by_the_global_ones(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.context.set_prop(GLOBAL_WEIGHTS, {"w": np.full(2, 5.0)}, private=True, sticky=True)
    broken = result({"w": np.array([np.nan, 1.0])}, DataKind.WEIGHTS)
    sent = from_shareable(GaussianPrivacy(1.0).process(broken, site.context))
    np.testing.assert_array_equal(sent.data["w"], [5.0, 5.0])


# --- The leakage filter ---------------------------------------------------------------


class Copying(Inverter):
    """Returns the training image itself, faded."""

    def __init__(self, images: torch.Tensor, share: float) -> None:
        super().__init__()
        self.images, self.share, self.calls = images, share, 0

    def __call__(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> torch.Tensor:
        self.calls += 1
        return self.share * self.images + (1 - self.share) * 0.5


class Breaking(Inverter):
    """Raises."""

    def __call__(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> torch.Tensor:
        raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, scale=0.02, size=32)
    return folder


def leakage_filter(phantoms: Path, **more: Any) -> RelativeDataLeakageValueFilter:
    return RelativeDataLeakageValueFilter(
        data_root=str(phantoms),
        dataset_json=str(phantoms / f"{LIST_PREFIX}9.json"),
        prior_filename=str(phantoms / "prior.png"),
        **more,
    )


def training_image(phantoms: Path) -> torch.Tensor:
    from core.data.list_files import load_datalist
    from core.data.listed_images import ImageListDataset

    samples = load_datalist(phantoms / f"{LIST_PREFIX}9.json", "training")
    return ImageListDataset(phantoms, samples, 32).images()


@pytest.mark.parametrize(("threshold", "withheld"), [(0.1, True), (5.0, False)])
def test_above_the_threshold_the_update_is_withheld(
    phantoms: Path, tmp_path: Path, threshold: float, withheld: bool
) -> None:
    copying = Copying(training_image(phantoms), 1.0)
    site = Site(tmp_path, grad_inverter=copying, sim_metric=ImageSimMetric())
    checked = leakage_filter(phantoms, rdlv_threshold=threshold, save_best_matches=True)
    sent = checked.process(result(update()), site.context)
    assert is_zero_difference(sent) == withheld
    if not withheld:
        np.testing.assert_array_equal(from_shareable(sent).data["fc.weight"], update()["fc.weight"])
    found = record(tmp_path)
    assert found["decision"] == ("withhold" if withheld else "pass")
    assert found["images"][0]["similarity"] == pytest.approx(1)
    assert (tmp_path / "rdvl_round0.npz").is_file()


def test_rdlv_is_relative_to_the_prior(phantoms: Path, tmp_path: Path) -> None:
    from skimage.metrics import structural_similarity

    from core.data.image_files import load_image

    copying = Copying(training_image(phantoms), 0.7)
    site = Site(tmp_path, grad_inverter=copying, sim_metric=ImageSimMetric())
    leakage_filter(phantoms).process(result(update()), site.context)

    def ssim(image: torch.Tensor) -> float:
        pair = (copying.images[0], image)
        x, y = (255 * i.permute(1, 2, 0).double().numpy() for i in pair)
        return structural_similarity(x, y, channel_axis=-1, data_range=256)

    prior = ssim(load_image(phantoms / "prior.png", 32))
    by_hand = (ssim(0.7 * copying.images[0] + 0.15) - prior) / prior
    assert record(tmp_path)["rdlv"] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(
    ("components", "reason"),
    [
        ({"grad_inverter": Breaking(), "sim_metric": ImageSimMetric()}, "out of memory"),
        ({"sim_metric": ImageSimMetric()}, "grad_inverter"),
        ({"grad_inverter": Copying(torch.zeros(1, 3, 32, 32), 1.0)}, "sim_metric"),
        (
            {
                "grad_inverter": Copying(torch.full((1, 3, 32, 32), np.nan), 1.0),
                "sim_metric": ImageSimMetric(),
            },
            "not finite",
        ),
    ],
)
def test_what_cannot_be_measured_does_not_leave(
    phantoms: Path, tmp_path: Path, components: dict[str, Any], reason: str
) -> None:
    site = Site(tmp_path, **components)
    sent = leakage_filter(phantoms).process(result(update()), site.context)
    assert is_zero_difference(sent)
    assert reason in record(tmp_path)["reason"]


def test_an_update_is_withheld_even_if_the_reason_cannot_be_written(phantoms: Path) -> None:
    site = Site(Path("/proc/nowhere"), grad_inverter=Breaking(), sim_metric=ImageSimMetric())
    sent = leakage_filter(phantoms).process(result(update()), site.context)
    assert is_zero_difference(sent)


def stating(number: Any) -> Shareable:
    """An update that states this round."""
    dxo = DXO(DataKind.WEIGHT_DIFF, data=update())
    dxo.set_meta_prop(AppConstants.CURRENT_ROUND, number)
    return dxo.to_shareable()


@pytest.mark.parametrize("stated", [range(6), range(1, 13, 2), [None] * 6], ids=str)
def test_the_site_counts_what_is_measured(phantoms: Path, tmp_path: Path, stated: Any) -> None:
    copying = Copying(training_image(phantoms), 0.5)
    site = Site(tmp_path, grad_inverter=copying, sim_metric=ImageSimMetric())
    checked = leakage_filter(phantoms, frequency=2, start_round=3)
    measured = []
    for number in stated:
        before = copying.calls
        checked.process(stating(number), site.context)
        measured.append(copying.calls - before)
    assert measured == [0, 0, 0, 0, 1, 0]
    verdicts = [entry["verdict"] for entry in gate_log.verify(tmp_path)]
    assert verdicts == ["passed unmeasured"] * 4 + ["passed", "passed unmeasured"]


def test_random_rounds_are_the_site_s_choice(phantoms: Path, tmp_path: Path) -> None:
    copying = Copying(training_image(phantoms), 0.5)
    site = Site(tmp_path, grad_inverter=copying, sim_metric=ImageSimMetric())
    checked = leakage_filter(phantoms, frequency=2, random_rounds=True)
    for number in range(40):
        checked.process(stating(number), site.context)
    # 40 throws of a coin: outside of 6 to 34 once in a million.
    assert 6 <= copying.calls <= 34


@pytest.mark.parametrize("number", [-1, 1.5, True, float("nan"), float("inf"), "0", 2**40])
def test_a_round_that_is_none_does_not_leave(phantoms: Path, tmp_path: Path, number: Any) -> None:
    copying = Copying(training_image(phantoms), 0.5)
    site = Site(tmp_path, grad_inverter=copying, sim_metric=ImageSimMetric())
    sent = leakage_filter(phantoms, start_round=1).process(stating(number), site.context)
    assert is_zero_difference(sent)


def test_rounds_do_not_repeat(phantoms: Path, tmp_path: Path) -> None:
    site = Site(tmp_path)
    checked = GaussianPrivacy(0.1)
    assert not is_zero_difference(checked.process(stating(4), site.context))
    for again in (4, 3, 0):
        assert is_zero_difference(checked.process(stating(again), site.context))
    assert not is_zero_difference(checked.process(stating(7), site.context))


def test_what_one_filter_withheld_the_next_one_leaves_alone(phantoms: Path, tmp_path: Path) -> None:
    copying = Copying(training_image(phantoms), 1.0)
    site = Site(tmp_path, grad_inverter=copying, sim_metric=ImageSimMetric())
    broken = result(update(bad=np.array([np.nan])))
    first = GaussianPrivacy(1.0).process(broken, site.context)
    second = leakage_filter(phantoms).process(first, site.context)
    assert is_zero_difference(second)
    assert copying.calls == 0
    assert "not finite" in record(tmp_path)["reason"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"data_root": "nowhere"},
        {"dataset_json": "nowhere.json"},
        {"frequency": 0},
        *[{"frequency": value} for value in (float("nan"), float("inf"), 1.5, True, "2")],
        *[{"start_round": value} for value in (float("inf"), 0.5, -1, True)],
        *[{"rdlv_threshold": value} for value in (float("nan"), float("inf"), True, "1", None)],
        {"rdlv_threshold": 1.0, "rdlv_reduce": "min"},
        {"data_kinds": ["METRICS"]},
        {"random_rounds": 1},
        {"rdlv_reduce": "mean"},
        {"image_key": ""},
    ],
)
def test_impossible_arguments_are_refused(phantoms: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        RelativeDataLeakageValueFilter(
            **{
                "data_root": str(phantoms),
                "dataset_json": str(phantoms / f"{LIST_PREFIX}9.json"),
                **arguments,
            }
        )


def test_the_tap_keeps_the_global_weights_and_the_round(tmp_path: Path) -> None:
    task = DXO(DataKind.WEIGHTS, data={"w": np.ones(2)}).to_shareable()
    task.set_header(AppConstants.CURRENT_ROUND, 4)
    context = Site(tmp_path).context
    assert GlobalModelTap().process(task, context) is task
    from_shareable(task).data["w"] += 1
    np.testing.assert_array_equal(context.get_prop(GLOBAL_WEIGHTS)["w"], [1, 1])
    assert context.get_prop(ROUND) == 4


@pytest.mark.parametrize("name", federated.__all__)
def test_the_published_names_are_ours(name: str) -> None:
    # Similarities are NVFlare components there, and plain classes where none is needed.
    assert issubclass(getattr(nvflare_gradinv, name), getattr(federated, name))


def test_the_published_module_paths_are_ours() -> None:
    from nvflare_gradinv.filters.gaussian_privacy import GaussianPrivacy as Published
    from nvflare_gradinv.filters.gradinv import GradInversionInverter
    from nvflare_gradinv.filters.image_sim import ImageSimMetric as Metric
    from nvflare_gradinv.filters.rdlv_filter import RelativeDataLeakageValueFilter as Filter
    from nvflare_gradinv.learners.cxr_learner import CXRLearner

    assert Published is GaussianPrivacy
    assert issubclass(Metric, ImageSimMetric)
    assert Filter is RelativeDataLeakageValueFilter
    assert CXRLearner is federated.CXRLearner
    assert GradInversionInverter is federated.GradInversionInverter


# --- The learner ----------------------------------------------------------------------


class Calm:
    """No abort."""

    triggered = False


@pytest.fixture
def learner(phantoms: Path, tmp_path: Path) -> tuple[Any, FLContext]:
    context = Site(tmp_path).context
    built = federated.CXRLearner(
        str(phantoms), str(phantoms / f"{LIST_PREFIX}9.json"), model_name="cnn", image_size=32
    )
    built.initialize({}, context)
    return built, context


def global_task(number: int = 0) -> Shareable:
    from federated.flare.global_model import global_model

    weights = {name: v.numpy() for name, v in global_model().state_dict().items()}
    task = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
    task.set_header(AppConstants.CURRENT_ROUND, number)
    return task


def test_the_learner_sends_a_difference_and_keeps_what_the_inverter_needs(
    learner: tuple[Any, FLContext],
) -> None:
    built, context = learner
    dxo = from_shareable(built.train(global_task(3), context, Calm()))
    assert dxo.data_kind == DataKind.WEIGHT_DIFF
    assert dxo.get_meta_prop(AppConstants.CURRENT_ROUND) == 3
    found = built.local_update(dxo.data, 0.1)
    assert (found.n_images, found.batch_size, len(found.steps)) == (1, 1, 1)
    assert found.running_after is not None


def test_the_local_model_stays_at_a_site_that_withheld_an_update(
    learner: tuple[Any, FLContext],
) -> None:
    built, context = learner
    built.train(global_task(), context, Calm())
    sent = built.get_model_for_validation("best_model", context)
    assert set(from_shareable(sent).data) == set(from_shareable(global_task()).data)
    GaussianPrivacy(1.0).process(result(update(bad=np.array([np.nan]))), context)
    refused = built.get_model_for_validation("best_model", context)
    assert refused.get_return_code() == ReturnCode.EMPTY_RESULT


def test_a_site_that_diverged_sends_nothing_and_says_why(phantoms: Path, tmp_path: Path) -> None:
    context = Site(tmp_path).context
    built = federated.CXRLearner(
        str(phantoms), str(phantoms / f"{LIST_PREFIX}9.json"), model_name="cnn", image_size=32,
        lr=1e30, aggregation_epochs=3,
    )  # fmt: skip
    built.initialize({}, context)
    sent = built.train(global_task(3), context, Calm())
    assert is_zero_difference(sent)
    for filtered in (
        GaussianPrivacy(1.0).process(sent, context),
        leakage_filter(phantoms).process(sent, context),
    ):
        assert is_zero_difference(filtered)
        assert from_shareable(filtered).get_meta_prop(DIVERGED) is None
        assert from_shareable(filtered).get_meta_prop(AppConstants.CURRENT_ROUND) == 3
    found = record(tmp_path, 3)
    assert (found["decision"], found["rdlv"], found["images"]) == ("withhold", None, [])
    assert "diverged" in found["reason"]


def test_a_client_script_that_diverged_goes_on(phantoms: Path) -> None:
    from nvflare.app_common.abstract.fl_model import FLModel

    from federated.flare.client import answer
    from federated.flare.site_training import SiteSettings, SiteTraining

    settings = SiteSettings(
        str(phantoms), str(phantoms / f"{LIST_PREFIX}9.json"), model_name="cnn", image_size=32,
        lr=1e30, aggregation_epochs=3,
    )  # fmt: skip
    site = SiteTraining(settings, torch.device("cpu"))
    sent = answer(site, FLModel(params=site.weights(), current_round=2))
    assert "diverged" in sent.meta[DIVERGED]
    assert not any(value.any() for value in sent.params.values())
    assert 0 <= sent.metrics["accuracy"] <= 1


def test_an_aborted_learner_says_so(learner: tuple[Any, FLContext]) -> None:
    built, context = learner
    aborted = Calm()
    aborted.triggered = True
    reply = built.train(global_task(), context, aborted)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
