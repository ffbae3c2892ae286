"""Parameters from the files that people have, and what a client sent against what it received."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradinvbench as gib
from core.errors import InputError
from core.models.building import ModelSpec, build_model
from core.models.state_files import fit, read_state, renamed, state_in
from gradients.received_model import build_received_model, read_pretrained
from training.initial_model import load_pretrained

SPEC = ModelSpec("resnet18", 4, 16, "cifar", width=4)


def network(seed: int = 0) -> nn.Module:
    """Batch norm, a buffer, a frozen layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    model[0].requires_grad_(False)
    return model


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(SPEC)


Wrap = Callable[[dict[str, torch.Tensor]], dict[str, Any]]


def prefixed(prefix: str) -> Wrap:
    return lambda state: {prefix + name: value for name, value in state.items()}


WRAPPERS: dict[str, Wrap] = {
    "plain": dict,
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "Opacus": prefixed("_module."),
    "Lightning": lambda state: {"state_dict": prefixed("model.")(state), "epoch": 3},
    "compiled in parallel": prefixed("module._orig_mod."),
    "tutorial": lambda state: {"epoch": 2, "model_state_dict": state, "optimizer": {"lr": 0.1}},
    "net": lambda state: {"net": state, "acc": np.float64(93.1), "best": np.bool_(True)},
    "nested": lambda state: {"model": {"state_dict": prefixed("module.")(state)}},
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("stage", ["train", "extract"])
def test_pretrained_takes_what_people_have(tmp_path: Path, wrap: str, stage: str) -> None:
    trained = resnet(1)
    torch.save(WRAPPERS[wrap](trained.state_dict()), tmp_path / "model.pth")
    if stage == "train":
        model = resnet(2)
        load_pretrained(model, str(tmp_path / "model.pth"), "resnet18")
    else:
        model = build_received_model(SPEC, read_pretrained(tmp_path / "model.pth"))
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_backbone_keeps_the_initial_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {n: v for n, v in resnet(1).state_dict().items() if not n.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pth")
    with caplog.at_level(logging.WARNING):
        model = build_received_model(SPEC, read_pretrained(tmp_path / "backbone.pth"))
    assert "classifier fc is initialised anew" in caplog.text
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])
    assert torch.equal(model.state_dict()["fc.weight"], build_received_model(SPEC).fc.weight)  # type: ignore[arg-type, union-attr]


def test_heads_that_the_model_is_built_without_are_left_out(tmp_path: Path) -> None:
    trained = resnet(1).state_dict()
    torch.save(trained | {"aux1.fc.weight": torch.ones(2, 2)}, tmp_path / "aux.pth")
    model = build_received_model(SPEC, read_pretrained(tmp_path / "aux.pth"))
    assert torch.equal(model.state_dict()["conv1.weight"], trained["conv1.weight"])


def test_a_deeper_network_s_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    deeper = build_model(ModelSpec("resnet34", 4, 16, "cifar", width=4))
    torch.save(deeper.state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(InputError) as error:
        build_received_model(SPEC, read_pretrained(tmp_path / "deeper.pth"))
    assert "not the model's: layer1.2.conv1.weight" in str(error.value)
    # Not all of some hundred names.
    assert len(str(error.value)) < 500


def test_names_that_differ_are_told_with_the_nearest(tmp_path: Path) -> None:
    state = {n.replace("layer1", "stage1"): v for n, v in resnet(1).state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"nearest to layer1\.0\.conv1\.weight: stage1\.0\."):
        build_received_model(SPEC, read_pretrained(tmp_path / "other.pth"))


def test_files_of_other_packages(tmp_path: Path) -> None:
    state = {n: v for n, v in network(1).state_dict().items() if v.dim()}
    np.savez(tmp_path / "model.npz", **{n: v.numpy() for n, v in state.items()})
    assert read_state(tmp_path / "model.npz", "--x").keys() == state.keys()
    safetensors = pytest.importorskip("safetensors.torch")
    half = {n: v.bfloat16() for n, v in state.items()}
    safetensors.save_file(half, tmp_path / "model.safetensors")
    read = read_state(tmp_path / "model.safetensors", "--x")
    assert all(torch.equal(read[n], half[n]) for n in half)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pth", "absent.npz", "absent.pth"])
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    if name.startswith("a."):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(InputError, match=r"^--x: "):
        read_state(tmp_path / name, "--x")


def test_a_file_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="holds no model parameters"):
        state_in({"epoch": 3, "model": {"arch": "resnet18"}})


def test_names_are_left_alone_where_no_prefix_helps() -> None:
    state = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    assert renamed(state, ["c.weight"]) == state
    # The model itself is wrapped and the file is not.
    assert next(iter(renamed(state, ["module.a.weight"]))) == "module.a.weight"
    # Both are wrapped, each in its own way.
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    assert next(iter(renamed(compiled, ["module.a.weight"]))) == "module.a.weight"
    assert fit(state, network()).unexpected == ("a.weight", "b.weight")


# -- Reading an update -----------------------------------------------------------


def trained_a_step(model: nn.Module) -> nn.Module:
    """The model after a step of SGD in train mode; its first layer is frozen."""
    after = copy.deepcopy(model)
    torch.manual_seed(3)
    inputs, labels = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.SGD([p for p in after.parameters() if p.requires_grad], 0.1)
    nn.functional.cross_entropy(after(inputs), labels).backward()
    optimizer.step()
    return after


def as_lists(state: dict[str, torch.Tensor]) -> list[np.ndarray]:
    return [value.numpy() for value in state.values()]


def difference(before: nn.Module, after: nn.Module) -> dict[str, torch.Tensor]:
    old, new = before.state_dict(), after.state_dict()
    return {name: new[name] - old[name] for name in old}


FORMS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "state": lambda before, after: after.state_dict(),
    "wrapped": lambda before, after: prefixed("_orig_mod.")(after.state_dict()),
    "lists": lambda before, after: as_lists(after.state_dict()),
    "lists without counters": lambda before, after: as_lists(
        {n: v for n, v in after.state_dict().items() if "num_batches" not in n}
    ),
    "difference": difference,
    "difference as lists": lambda before, after: as_lists(difference(before, after)),
    "module": lambda before, after: after,
}


@pytest.mark.parametrize("form", FORMS)
def test_an_update_is_the_difference_in_every_form(form: str) -> None:
    before = network()
    after = trained_a_step(before)
    update = gib.read_update(before, FORMS[form](before, after))
    expected = difference(before, after)
    for name, value in update.change.items():
        assert torch.allclose(value.double(), expected[name].double(), atol=1e-6), name
    assert update.looks_like == ("difference" if "difference" in form else "weights")
    assert update.certain
    assert update.names("unchanged") == ("0.weight", "0.bias")
    assert update.names("shared") == ("1.weight", "1.bias", "3.weight", "3.bias")
    assert "1.running_mean" in update.names("buffer")
    running = update.running_after()
    assert running is not None
    assert torch.allclose(running["1.running_var"], after[1].running_var, atol=1e-6)  # type: ignore[index, arg-type]
    moved = [expected[name].double() for name in update.names("shared")]
    norm = float(torch.cat([value.flatten() for value in moved]).norm())
    assert update.norm == pytest.approx(norm, rel=1e-5)


def test_files_half_precision_and_a_part_of_the_parameters(tmp_path: Path) -> None:
    before = network()
    after = trained_a_step(before).state_dict()
    torch.save(before.state_dict(), tmp_path / "before.pt")
    sent = {name: value.bfloat16() for name, value in after.items() if name.startswith("3.")}
    torch.save({"model_state_dict": sent}, tmp_path / "after.tar")
    update = gib.read_update(tmp_path / "before.pt", tmp_path / "after.tar")
    assert update.names("shared") == ("3.weight", "3.bias")
    assert "0.weight" in update.names("absent")
    assert update.running_after() is None
    assert "bfloat16" in repr(update)
    frame = update.to_frame()
    assert frame.loc["3.weight", "number format"] == "bfloat16"
    assert "3.weight" in str(update)
    assert "3.weight" in update._repr_html_()


def test_masks_with_infinity_are_no_change() -> None:
    before = {"w": torch.ones(3), "mask": torch.tensor([0.0, float("-inf")])}
    after = {"w": torch.ones(3) * 1.01, "mask": before["mask"].clone()}
    update = gib.read_update(before, after)
    assert update.change["mask"].tolist() == [0, 0]


def test_a_doubtful_kind_is_stated() -> None:
    torch.manual_seed(0)
    before = {"w": torch.randn(400)}
    sent = {"w": 0.8 * before["w"] + 0.8 * torch.randn(400)}
    assert not gib.read_update(before, sent).certain
    assert "state it with kind=" in repr(gib.read_update(before, sent))
    told = gib.read_update(before, sent, kind="difference")
    assert told.certain
    assert torch.equal(told.change["w"], sent["w"])


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "NaN": ({"w": torch.ones(2)}, {"w": torch.tensor([1.0, float("nan")])}, "after: w is not"),
    "NaN before": ({"w": torch.tensor([float("nan")])}, {"w": torch.ones(1)}, "before: w holds"),
    "infinity": ({"w": torch.ones(2)}, {"w": torch.tensor([1.0, float("inf")])}, "w is not finite"),
    "shape": ({"w": torch.ones(2)}, {"w": torch.ones(3)}, r"w has shape \(3,\) in what was sent"),
    "names": ({"fc.weight": torch.ones(2)}, {"fc_weight": torch.ones(2)}, "nearest there is 'fc.w"),
    "list": ({"w": torch.ones(2)}, [torch.ones(2)] * 2, "a list of 2 arrays is no state"),
    "no names": ([torch.ones(2)], {"w": torch.ones(2)}, "a list says no names"),
    "text": ({"w": torch.ones(2)}, {"w": "weights"}, "w is no array of numbers but a str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_update_is_one_sentence(case: str) -> None:
    before, after, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        gib.read_update(before, after)
    with pytest.raises(InputError, match="choose weights or difference"):
        gib.read_update(before, after, kind="gradient")


def test_arrays_in_a_file_of_torch_are_a_state(tmp_path: Path) -> None:
    # More than a description of tensors would ever have.
    state = {"a": np.arange(5_000_000, dtype="f4"), "b": np.eye(3)}
    torch.save({"model": state}, tmp_path / "update.pt")
    read = read_state(tmp_path / "update.pt", "--x")
    assert list(read) == ["a", "b"]
    assert all(np.array_equal(read[name].numpy(), state[name]) for name in state)


def _with(value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"w": value, "v": torch.ones(2)}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3) + 1j, torch.ones(3, device="meta"), torch.ones(3).to(torch.float8_e4m3fn),
        torch.tensor([1, float("nan"), 1]), torch.tensor([1, float("-inf"), 1]),
    ],
    ids=["complex", "without values", "float8", "NaN", "infinite"],
)  # fmt: skip
def test_what_are_no_numbers_of_a_model(value: torch.Tensor, where: str) -> None:
    good = _with(torch.ones(3) * 1.1)
    states = (_with(value), good) if where == "before" else (good, _with(value))
    with pytest.raises(InputError, match=rf"{where}: w |^w has no values"):
        gib.read_update(*states, kind="weights")


@pytest.mark.parametrize("value", [torch.ones(3) > 0, torch.ones(3, dtype=torch.int64)])
def test_truths_and_whole_numbers_are_no_weights(value: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"after: w holds torch\.\w+ in place of torch\.float32"):
        gib.read_update(_with(torch.ones(3)), _with(value), kind="weights")
