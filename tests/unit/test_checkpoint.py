"""The gradient checkpoint: both formats, and files that are broken or hostile."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.specs import DataSpec
from core.errors import InputError
from core.models.building import ModelSpec, build_model, model_names, skeleton_of
from core.target import LocalTraining, Target, Truth
from gradients.checkpoint import load_target, save_target
from gradients.client import ClientSettings, share_update

MODEL = ModelSpec("cnn", n_classes=5, image_size=12, width=3)
DATA = DataSpec("noise", (3, 12, 12), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 5, ("a",) * 5)


def _shared(settings: ClientSettings | None = None) -> tuple[Target, Truth]:
    torch.manual_seed(0)
    model = build_model(MODEL)
    truth = Truth(torch.rand(4, 3, 12, 12), torch.tensor([0, 3, 1, 4]))
    settings = settings or ClientSettings()
    target = share_update(model, MODEL, DATA, truth.images, truth.labels, settings)
    assert target is not None
    return target, truth


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "target.tar"
    save_target(path, *_shared(), {"epochs": 1, "lr": 0.1})
    return path


def _same(a: Target, b: Target) -> None:
    pairs = [(a.gradient, b.gradient), (a.state_dict, b.state_dict)]
    for one, two in [*pairs, (a.running_after or {}, b.running_after or {})]:
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)
    plain = {"gradient": {}, "state_dict": {}, "bn_statistics": None, "running_after": None}
    assert replace(a, **plain) == replace(b, **plain)


@pytest.mark.parametrize(
    "settings",
    [
        ClientSettings(),
        ClientSettings(shards=(3, 1), local=LocalTraining(1, 1, 0.2, 0.9, 1e-4)),
        ClientSettings(train_mode=False, local=LocalTraining(2, 2)),
    ],
)
def test_everything_survives_a_round_trip(settings: ClientSettings, tmp_path: Path) -> None:
    target, truth = _shared(settings)
    target = replace(target, defenses=("clip:1", "gaussian:0.1"), dropout_seed=7)
    save_target(tmp_path / "t.tar", target, truth)
    loaded, known = load_target(tmp_path / "t.tar")
    _same(loaded, target)
    assert (loaded.bn_statistics is None) == (target.bn_statistics is None)
    for got, expected in zip(loaded.bn_statistics or (), target.bn_statistics or (), strict=True):
        assert all(
            torch.equal(a, b) for n in expected for a, b in zip(got[n], expected[n], strict=True)
        )
    assert known is not None
    torch.testing.assert_close(known.images, truth.images)
    assert torch.equal(known.labels, truth.labels)


def test_an_order_of_the_images_survives_and_is_written_only_where_there_is_one(
    tmp_path: Path,
) -> None:
    local = LocalTraining(
        2, 2, 0.2, proximal=0.5, bn_momentum=0.3, order=((0, 1, 2), (3,), (3, 1, 0), (2,))
    )
    target, truth = _shared(ClientSettings(local=local))
    save_target(tmp_path / "t.tar", target, truth)
    assert load_target(tmp_path / "t.tar")[0].local == local
    plain = replace(target, local=LocalTraining(2, 2, 0.2))
    save_target(tmp_path / "plain.tar", plain)
    stated = torch.load(tmp_path / "plain.tar", weights_only=False)["local_training"]
    assert list(stated) == ["epochs", "batches", "lr", "momentum", "weight_decay"]


def test_stripped_file_holds_no_trace_of_the_truth(file: Path, tmp_path: Path) -> None:
    target, truth = load_target(file)
    save_target(tmp_path / "stripped.tar", target)
    stripped, nothing = load_target(tmp_path / "stripped.tar")
    assert truth is not None
    assert nothing is None
    _same(stripped, target)
    raw = torch.load(tmp_path / "stripped.tar", weights_only=False)
    assert raw["x_true"] is None
    assert raw["y_true"] is None
    assert vars(raw["args"]) == {}


PUBLISHED_KEYS = [
    "clock",
    "batch_size",
    "dataset_setup",
    "arch",
    "model_eval",
    "state_dict",
    "free_last_layers_list",
    "target_gradient",
    "bn_mean_list",
    "bn_var_list",
    "x_true",
    "y_true",
    "args",
    "syncbn",
]


def test_our_file_has_the_published_keys_as_the_original_tools_read_them(file: Path) -> None:
    raw = torch.load(file, weights_only=False)
    assert [key for key in PUBLISHED_KEYS if key not in raw] == []
    model = build_model(MODEL)
    model.load_state_dict(raw["state_dict"], strict=True)
    parameters = list(model.parameters())
    assert isinstance(raw["target_gradient"], list)
    assert [g.shape for g in raw["target_gradient"]] == [p.shape for p in parameters]
    assert raw["dataset_setup"] == {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "size": [3, 12, 12],
        "n_classes": 5,
    }
    assert raw["free_last_layers_list"] == ["all"]
    assert raw["batch_size"] == 4
    assert raw["model_eval"] is False
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m.shape for m in raw["bn_mean_list"]] == [n.running_mean.shape for n in norms]
    assert [v.shape for v in raw["bn_var_list"]] == [n.running_var.shape for n in norms]
    assert isinstance(raw["args"], argparse.Namespace)
    # Their true images are the network's input.
    restored = DATA.denormalize(raw["x_true"])
    assert 0 <= float(restored.min()) < float(restored.max()) <= 1


def test_frozen_layers_are_listed_by_what_is_free(tmp_path: Path) -> None:
    from gradients.defenses import parse_defenses

    target, truth = _shared(ClientSettings(defenses=parse_defenses("freeze:1")))
    save_target(tmp_path / "t.tar", target, truth)
    raw = torch.load(tmp_path / "t.tar", weights_only=False)
    assert raw["free_last_layers_list"] == ["fc.weight", "fc.bias"]
    loaded, _ = load_target(tmp_path / "t.tar")
    assert list(loaded.gradient) == ["fc.weight", "fc.bias"]


def _original(**changes: Any) -> dict[str, Any]:
    """A checkpoint as the original tools write it, made by hand from its list of keys."""
    torch.manual_seed(1)
    model = build_model(ModelSpec("resnet18", n_classes=4, image_size=96))
    images, labels = torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 3])
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    raw: dict[str, Any] = {
        "clock": "2022-05-01 12:00:00.000000",
        "batch_size": 4,
        "dataset_setup": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "size": (3, 96, 96),
            "n_classes": 4,
        },
        "arch": "resnet18",
        "model_eval": False,
        "state_dict": {f"module.{name}": v for name, v in model.state_dict().items()},
        "free_last_layers_list": ["all"],
        "target_gradient": list(torch.autograd.grad(loss, list(model.parameters()))),
        "bn_mean_list": [torch.zeros(m.num_features) for m in norms],
        "bn_var_list": [torch.ones(m.num_features) for m in norms],
        "x_true": images,
        "y_true": labels,
        "args": argparse.Namespace(
            epochs=1, lr=0.1, data_name="imagenet", kernel_size_of_maxpool=3, world_size=-1
        ),
        "syncbn": True,
    }
    return {**raw, **changes}


def test_a_file_of_the_original_tools_loads(tmp_path: Path) -> None:
    raw = _original()
    torch.save(raw, tmp_path / "original.pth.tar")
    target, truth = load_target(tmp_path / "original.pth.tar")
    model = target.build_model()
    assert list(target.gradient) == [name for name, _ in model.named_parameters()]
    assert torch.equal(target.gradient["fc.bias"], raw["target_gradient"][-1])
    assert target.model == ModelSpec("resnet18", 4, 96, "imagenet")
    assert target.data.name == "imagenet"
    assert (target.train_mode, target.synchronized, target.shards) == (True, True, (4,))
    assert target.bn_statistics is not None
    assert torch.equal(target.bn_statistics[0]["layer4.1.bn2"][1], torch.ones(512))
    assert truth is not None
    assert float(truth.images.min()) >= 0
    assert truth.labels.tolist() == [0, 1, 2, 3]


def test_local_iterations_of_the_original_tools_are_batches(tmp_path: Path) -> None:
    # They split the images into one mini-batch per iteration.
    args = argparse.Namespace(epochs=2, lr=0.05, kernel_size_of_maxpool="19")
    torch.save(_original(args=args, model_eval=True), tmp_path / "o.tar")
    target, _ = load_target(tmp_path / "o.tar")
    assert target.local == LocalTraining(epochs=1, batches=2, lr=0.05)
    assert target.model.pool_kernel == 19
    assert not target.train_mode


def test_noise_of_the_original_tools_is_that_of_the_published_variant(tmp_path: Path) -> None:
    args = argparse.Namespace(
        epochs=1, lr=0.1, enable_dp=True, sigma=0.02, max_per_sample_grad_norm=0.5
    )
    torch.save(_original(args=args), tmp_path / "o.tar")
    assert load_target(tmp_path / "o.tar")[0].defenses == ("dp-batch:0.02:0.5",)
    torch.save(_original(), tmp_path / "plain.tar")
    assert load_target(tmp_path / "plain.tar")[0].defenses == ()


def test_asynchronous_processes_of_the_original_tools_are_shards(tmp_path: Path) -> None:
    args = argparse.Namespace(epochs=1, lr=0.1, world_size=2, multiprocessing_distributed=True)
    raw = _original(args=args, syncbn=False, bn_mean_list=None, bn_var_list=None)
    torch.save(raw, tmp_path / "o.tar")
    target, _ = load_target(tmp_path / "o.tar")
    assert target.shards == (2, 2)
    assert not target.synchronized
    assert target.bn_statistics is None


def test_freed_layers_of_the_original_tools_match_by_substring(tmp_path: Path) -> None:
    raw = _original()
    raw |= {"free_last_layers_list": ["fc"], "target_gradient": raw["target_gradient"][-2:]}
    torch.save(raw, tmp_path / "o.tar")
    target, _ = load_target(tmp_path / "o.tar")
    assert list(target.gradient) == ["fc.weight", "fc.bias"]


class _Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["args", "target_gradient", "new key"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(key: str, legacy: bool, file: Path, tmp_path: Path) -> None:
    raw = torch.load(file, weights_only=False)
    raw[key] = _Attack(tmp_path / "owned")
    torch.save(raw, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"loaded safely \(it refers to \w+\.mkdir\)"):
        load_target(file)
    assert not (tmp_path / "owned").exists()


def test_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "plain.tar"
    path.write_bytes(pickle.dumps(_Attack(tmp_path / "owned"), protocol=2))
    with pytest.raises(InputError, match=r"plain\.tar"):
        load_target(path)
    assert not (tmp_path / "owned").exists()


def _nothing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _text(path: Path) -> None:
    path.write_text("hello")


def _tar_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("weights.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))


def _list(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_nothing, "there is no file"),
        (_folder, "is a folder"),
        (_empty, "0 bytes"),
        (_truncated, "truncated or not a checkpoint"),
        (_text, "checkpoint"),
        (_tar_archive, "checkpoint"),
        (_list, "holds a list"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_are_no_checkpoint(
    harm: Callable[[Path], None], sentence: str, file: Path
) -> None:
    harm(file)
    with pytest.raises(InputError, match=sentence) as caught:
        load_target(file, "--checkpoint")
    message = str(caught.value)
    assert message.startswith("--checkpoint: ")
    assert str(file) in message
    assert "\n" not in message


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a nested value: keys, then the value."""
    *path, last, value = keys

    def change(raw: dict[str, Any]) -> None:
        inner: Any = raw
        for key in path:
            inner = inner[key]
        inner[last] = value

    return change


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw.pop(key)


def _nan(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        inner: Any = raw
        for key in keys:
            inner = inner[key]
        inner.view(-1)[0] = float("nan")

    return change


BROKEN = {
    "no gradient": (_drop("target_gradient"), "not a gradient checkpoint .no target_gradient"),
    "no parameters": (_drop("state_dict"), "no state_dict"),
    "newer version": (_set("format_version", 99), "format version 99"),
    "version of another type": (_set("format_version", "1"), "format version"),
    "one gradient less": (lambda r: r["target_gradient"].pop(), "but cnn has"),
    "no gradients": (_set("target_gradient", []), "it holds 0 gradients"),
    "gradient of another shape": (
        _set("target_gradient", 0, torch.zeros(2)),
        r"the gradient of conv1.weight has shape \(2,\)",
    ),
    "gradient with NaN": (_nan("target_gradient", 0), "the gradient of conv1.weight is not finite"),
    "gradient of text": (_set("target_gradient", 0, "zero"), "is a str, not a tensor"),
    "gradient of a stranger": (_set("parameter_names", 0, "nose"), "names a parameter nose"),
    "parameter with NaN": (
        _nan("state_dict", "conv1.weight"),
        "the parameter conv1.weight is not finite",
    ),
    "parameter of another shape": (
        _set("state_dict", "conv1.weight", torch.zeros(1)),
        "the parameter conv1.weight has shape",
    ),
    "parameter missing": (
        lambda r: r["state_dict"].pop("conv1.weight"),
        "not those of cnn: conv1.weight",
    ),
    "parameter too many": (_set("state_dict", "x", torch.zeros(1)), "not those of cnn: x"),
    "unknown architecture": (_set("model", "arch", "nonet"), "unknown architecture"),
    "unknown model field": (_set("model", "depth", 3), "unknown fields"),
    "endless classes": (
        lambda r: (
            r["model"].update(n_classes=10**12),
            r["data"].update(n_classes=10**12),
            r["dataset_setup"].update(n_classes=10**12),
        ),
        "no parameter is that large",
    ),
    "endless width": (_set("model", "width", 10**9), "no parameter is that large"),
    "other classes": (_set("model", "n_classes", 4), "differ in classes"),
    "two descriptions": (_set("dataset_setup", "size", [3, 8, 8]), "two descriptions"),
    "std of zero": (_set("data", "std", [0.0, 1.0, 1.0]), "positive std"),
    "mean of NaN": (_set("data", "mean", [float("nan"), 1.0, 1.0]), "finite numbers"),
    "mean of two channels": (_set("data", "mean", [0.5, 0.5]), "3 values"),
    "batch of none": (_set("batch_size", 0), "batch size is 0"),
    "batch and a half": (_set("batch_size", 1.5), "batch size is 1.5"),
    "shards too many": (_set("shards", [4, 1]), "do not add up"),
    "negative shard": (_set("shards", [5, -1]), "do not add up"),
    "label out of range": (_set("y_true", torch.tensor([0, 1, 2, 5])), r"outside 0\.\.4"),
    "negative label": (_set("y_true", torch.tensor([0, 1, 2, -1])), r"outside 0\.\.4"),
    "label too few": (_set("y_true", torch.tensor([0])), "true labels"),
    "images of another shape": (_set("x_true", torch.zeros(4, 3, 8, 8)), "true images"),
    "images with NaN": (_nan("x_true"), "true images"),
    "statistics of another layer": (
        lambda r: r["bn_statistics"][0].update({"99": r["bn_statistics"][0].pop("bn1")}),
        "one set per process over all layers",
    ),
    "statistics of another shape": (
        _set("bn_statistics", 0, "bn1", [torch.zeros(9), torch.ones(9)]),
        "the BatchNorm mean of bn1 has shape",
    ),
    "negative variance": (
        _set("bn_statistics", 0, "bn1", [torch.zeros(3), -torch.ones(3)]),
        "variance of bn1 is negative",
    ),
    "learning rate of zero": (_set("local_training", "lr", 0.0), "lr must be a positive number"),
    "images that are not there": (
        _set("local_training", "order", [[0, 1, 2, 4]]),
        "images 0 to 3 only",
    ),
    "steps without an order": (_set("local_training", "order", [[0], [1]]), "2 local steps"),
    "negative proximal term": (_set("local_training", "proximal", -1.0), "amiss"),
    "no local steps": (_set("local_training", "epochs", 0), "number of local epochs is 0"),
    "unknown local setting": (_set("local_training", "cycles", 2), "not a valid gradient"),
    "data of text": (_set("data", "text"), "data description is broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contradictions_are_told_in_a_sentence(name: str, file: Path) -> None:
    change, sentence = BROKEN[name]
    raw = torch.load(file, weights_only=False)
    change(raw)
    torch.save(raw, file)
    with pytest.raises(InputError, match=sentence) as caught:
        load_target(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_skeletons_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for arch in ("resnet18", "regnet_y_400mf"):
        skeleton_of(ModelSpec(arch, n_classes=10))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("arch", [n for n in model_names() if n.endswith(("18", "11", "_t", "0"))])
def test_skeletons_have_the_names_and_shapes_of_the_model(arch: str) -> None:
    spec = ModelSpec(arch, n_classes=7)
    shapes = {name: value.shape for name, value in skeleton_of(spec).state_dict().items()}
    assert shapes == {name: value.shape for name, value in build_model(spec).state_dict().items()}
