"""The frameworks' own privacy classes as defenses: their objects are called and do their work."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import vendor_defaults
from benchmarks.utility import Protocol
from benchmarks.vendor_defaults import Case, Plan, compute
from core.errors import InputError
from core.local_training import LocalTraining
from federated.vendors import SparseVector
from federated.vendors.differences import required
from gradients.defenses import ClientView, Gradient, parse_defenses
from gradients.local_update import unrolled_update

LR, STEPS = 0.2, 2


def client(model: nn.Module | None = None, images: int = 4) -> ClientView:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.rand(images, 3, 2, 2), torch.arange(images) % 3
    local = LocalTraining(batches=STEPS, lr=LR)
    return ClientView(model, x, y, torch.Generator().manual_seed(1), local=local)


def update(view: ClientView) -> Gradient:
    return unrolled_update(view.model, view.images, view.labels, view.local, create_graph=False)


def apply(words: str, view: ClientView) -> Gradient:
    (defense,) = parse_defenses(words)
    return defense.apply(update(view), view)


def flat(gradient: Gradient) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def spied(monkeypatch: pytest.MonkeyPatch, kind: Any, method: str) -> list[Any]:
    """The objects whose method was called."""
    seen: list[Any] = []
    original = getattr(kind, method)

    def spy(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(kind, method, spy)
    return seen


def test_nvflares_percentile_filter_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("nvflare.app_common.filters.percentile_privacy")
    seen = spied(monkeypatch, module.PercentilePrivacy, "process_dxo")
    view = client()
    shared = flat(apply("nvflare-percentile:40:0.01", view))
    (vendor,) = seen
    assert (vendor.percentile, vendor.gamma) == (40, 0.01)
    per_step = -LR * flat(update(view)).double()
    cutoff = np.percentile(per_step.abs(), 40)
    expected = torch.where(per_step.abs() < cutoff, 0.0, per_step.clamp(-0.01, 0.01)) / -LR
    assert 0 < int((expected == 0).sum()) < len(expected)
    assert float(expected.abs().max()) == pytest.approx(0.01 / LR)
    torch.testing.assert_close(shared.double(), expected, rtol=1e-4, atol=1e-6)


def test_nvflares_sparse_vector_filter_accounts_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = pytest.importorskip("nvflare.app_common.filters.svt_privacy")
    seen = spied(monkeypatch, module.SVTPrivacy, "process_dxo")
    view = client()
    shared = flat(apply("nvflare-svt", view))
    assert len(seen) == 1
    n = math.ceil(0.1 * len(shared))
    assert 0 < int((shared != 0).sum()) <= n
    # Values of at most gamma, and Laplacian noise of scale 2 gamma n / (n noise_var).
    assert float(shared.abs().max()) * LR > 1e-5
    defense = SparseVector()
    assert defense.accounted(update(view), view) == pytest.approx(0.1 + 0.1 * n)
    assert torch.equal(shared, flat(apply("nvflare-svt", client())))


def test_the_defaults_are_nvflares() -> None:
    pytest.importorskip("nvflare")
    from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
    from nvflare.app_common.filters.svt_privacy import SVTPrivacy

    (percentile, svt) = (parse_defenses(w)[0] for w in ("nvflare-percentile", "nvflare-svt"))
    for ours, theirs, names in (
        (percentile, PercentilePrivacy(), ("percentile", "gamma")),
        (svt, SVTPrivacy(), ("fraction", "epsilon", "noise_var", "gamma", "tau")),
    ):
        vendor = ours.vendor()  # type: ignore[attr-defined]
        assert type(vendor) is type(theirs)
        assert all(getattr(vendor, name) == getattr(theirs, name) for name in names)


def test_nvflares_exclusion_leaves_names_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("nvflare.app_common.filters.exclude_vars")
    seen = spied(monkeypatch, module.ExcludeVars, "process_dxo")
    view = client()
    shared = apply("nvflare-exclude:^3", view)
    assert len(seen) == 1
    assert list(shared) == ["1.weight", "1.bias"]
    for name, value in shared.items():
        torch.testing.assert_close(value, update(view)[name])


def test_flowers_local_dp_mod_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("flwr.clientapp.mod")
    seen = spied(monkeypatch, module.LocalDpMod, "__call__")
    view = client()
    shared = flat(apply("flower-local-dp:0.01:1e-9:1:1e-05", view))
    assert len(seen) == 1
    assert seen[0].clipping_norm == 0.01
    plain = flat(update(view))
    clipped = plain * (0.01 / (LR * STEPS * plain.norm()))
    # In float32, as the parameters travel.
    torch.testing.assert_close(shared, clipped, rtol=1e-3, atol=1e-5)
    noisy = flat(apply("flower-local-dp:1:1:1:1e-05", client()))
    deviation = math.sqrt(2 * math.log(1.25e5)) / (LR * STEPS)
    assert float((noisy - plain).std()) == pytest.approx(deviation, rel=0.3)


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_flowers_clipping_mods_do_the_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("flwr.clientapp.mod")
    name, calls = f"{kind}clipping_mod", []
    original = getattr(module, name)

    def spy(message: Any, context: Any, call_next: Any) -> Any:
        calls.append(message)
        return original(message, context, call_next)

    monkeypatch.setattr(module, name, spy)
    view = client()
    shared, plain = flat(apply(f"flower-{kind}-clipping:0.05", view)), flat(update(view))
    assert len(calls) == 1
    assert float(shared.norm()) * LR * STEPS == pytest.approx(0.05, rel=1e-3)
    assert float(torch.cosine_similarity(shared, plain, dim=0)) > 0.9999


def test_opacus_optimiser_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = pytest.importorskip("opacus.optimizers")
    seen = spied(monkeypatch, optimizers.DPOptimizer, "add_noise")
    view = client()
    shared = apply("opacus:0:1000", view)
    assert len(seen) == STEPS
    for name, value in update(view).items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6)
    noisy = flat(apply("opacus:50:1", client()))
    # The noise of both steps is averaged, each 50 / 2 images.
    assert float(noisy.std()) == pytest.approx(25 / math.sqrt(STEPS), rel=0.3)


def test_opacus_clips_every_image() -> None:
    pytest.importorskip("opacus")
    view = client(images=2)
    one = LocalTraining(lr=LR)
    view = ClientView(view.model, view.images, view.labels, view.generator, local=one)
    gradients = []
    for image, label in zip(view.images, view.labels, strict=True):
        loss = nn.functional.cross_entropy(view.model(image[None]), label[None])
        found = torch.autograd.grad(loss, list(view.model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    clipped = [g * min(1.0, 0.1 / float(g.norm())) for g in gradients]
    torch.testing.assert_close(
        flat(apply("opacus:0:0.1", view)), (clipped[0] + clipped[1]) / 2, rtol=1e-4, atol=1e-6
    )


def test_a_framework_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="runs nowhere's own code, which is not installed"):
        required("nowhere.filters", "nowhere-filter:1", "federated")


PLAN = Plan(images=2, iterations=2, seeds=1, width=4, protocol=Protocol(width=4, rounds=2))
CASE = Case("nvflare-percentile:95:0.01", "percentile 95")


def test_the_table_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvflare")
    (first,) = compute([CASE], tmp_path, PLAN)
    assert set(first.unaware) == set(first.told) == {"1", "4"}
    assert all(len(values) == 2 for values in first.told.values())
    assert first.told["1"] != first.unaware["1"]
    assert "elements are shared" in first.notes["1"][0]
    assert (len(first.accuracy), first.epsilon, first.real_epsilon) == (1, None, None)
    monkeypatch.setattr(vendor_defaults, "leak", None)
    monkeypatch.setattr(vendor_defaults, "train", None)
    assert compute([CASE], tmp_path, PLAN) == [first]
    assert "nvflare-percentile:95:0.01" in (tmp_path / "vendor_defaults.md").read_text()
    with pytest.raises(InputError, match="another plan"):
        compute([CASE], tmp_path, Plan(images=3))
    # By another attack everything leaks anew, and nothing is trained.
    seen = {str(steps): [float(steps)] * 2 for steps in vendor_defaults.STEPS}
    monkeypatch.setattr(
        vendor_defaults, "leak", lambda result, data, steps, plan: result.unaware.update(seen)
    )
    (other,) = compute([CASE], tmp_path, dataclasses.replace(PLAN, attack="spectral-3"))
    assert (other.unaware, other.told, other.accuracy) == (seen, {}, first.accuracy)
    monkeypatch.setattr(vendor_defaults.importlib.util, "find_spec", lambda name: None)
    compute([Case("flower-fixed-clipping:10")], tmp_path, PLAN)
    assert "left out, flwr is not installed in this environment" in capsys.readouterr().out


def test_opacus_noise_meets_the_epsilon() -> None:
    pytest.importorskip("opacus")
    protocol = Protocol(rounds=3, local_steps=2)
    sigma = vendor_defaults.noise_multiplier(3.0, protocol, 874)
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, 8 / 218, 6)]
    assert accountant.get_epsilon(1e-5) == pytest.approx(3.0, abs=0.05)
