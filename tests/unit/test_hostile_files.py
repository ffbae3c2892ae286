"""Files that lie: every reader refuses them in one sentence, soon, and within little memory."""

from __future__ import annotations

import collections
import gzip
import io
import json
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import InputError, exit_status
from core.reading import check_name, checksum_of, read_json
from core.torch_files import read_torch_file
from tests.launched import Command
from tests.reader_files import (
    CHECKPOINT,
    JSON,
    READERS,
    TORCH,
    leaderboard_entry,
    resume,
    same,
    table_text,
    trainer,
    whole_file,
    write_training,
)
from training.checkpoints import usable_checkpoint

# What a reader may need beside the file, in a process of its own.
MEMORY_MIB = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# -- What every reader refuses -----------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "replace",
    [_pipe, _device, Path.mkdir, Path.touch, lambda path: path.write_bytes(b"\0" * 99)],
    ids=["pipe", "device", "folder", "empty", "zeros"],
)
def test_what_is_no_such_file(kind: str, replace: Callable[[Path], object], folder: Path) -> None:
    path = whole_file(kind, folder)
    path.unlink()
    replace(path)
    if kind == "gate log" and replace is Path.touch:
        assert READERS[kind].read(path) == []
        return
    if kind == "arrays" and not path.is_file():
        # Where no file is, no pictures were kept.
        assert READERS[kind].read(path) is None
        return
    if kind.endswith("of a site") and path.is_dir():
        # It is looked into, and has no files.
        READERS[kind].read(path)
        return
    with pytest.raises(InputError):
        READERS[kind].read(path)


# Half of it may be a whole one, or is shown as it is.
READ_IN_PART = (
    "table", "gate log", "picture", "prior", "picture of a site", "table of records", "text",
)  # fmt: skip


# A bit in every part of a file; half a file, and all but its last byte.
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_refused_or_reads_the_same(kind: str, folder: Path) -> None:
    path = whole_file(kind, folder)
    whole, reference = path.read_bytes(), READERS[kind].read(path)
    summed = kind in TORCH and kind != "legacy model"
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        try:
            read = READERS[kind].read(path)
        except InputError:
            continue
        assert not summed or same(read, reference), f"byte {place} is changed, and nobody notices"
    for length in (0, len(whole) // 2, len(whole) - 60):
        path.write_bytes(whole[:length])
        if kind not in READ_IN_PART and length:
            with pytest.raises(InputError):
                READERS[kind].read(path)


@pytest.mark.parametrize("kind", [kind for kind in JSON if "record" in kind])
def test_a_number_that_was_changed_does_not_match_the_checksum(kind: str, folder: Path) -> None:
    path = whole_file(kind, folder)
    values = json.loads(path.read_text())
    assert values["checksum"] == checksum_of(values)
    path.write_text(json.dumps({**values, "seconds": 123.25, "site": "b", "inputs": 1}))
    with pytest.raises(InputError, match="differs from the checksum"):
        READERS[kind].read(path)
    # Records of before there were checksums, and those changed on purpose.
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "checksum"}))
    READERS[kind].read(path)


# -- Files of torch.save -------------------------------------------------------------------


class _Reduced:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def _rezipped(path: Path, **options: Any) -> None:
    """Write a zip archive anew, by default deflated."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", **({"compression": zipfile.ZIP_DEFLATED} | options)) as new:
        for name, content in members.items():
            new.writestr(name, content)


def _deflated(path: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(16 << 20)}}, path)
    _rezipped(path)


def _expanded(path: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1, 3, 32, 32).expand(300_000, 3, 32, 32)}}, path)


def _aliased(path: Path) -> None:
    tensor = torch.zeros(100_000)
    torch.save({"state_dict": {"x": tensor}, "restarts": [tensor] * 20_000}, path)


def _laughing(path: Path) -> None:
    value: list[Any] = [0] * 10
    for _ in range(9):
        value = [value] * 10
    torch.save({"x": value, "state_dict": {"x": torch.zeros(1)}}, path)


def _endless(path: Path) -> None:
    value: list[Any] = []
    value.append(value)
    torch.save({"x": value, "state_dict": {"x": torch.zeros(1)}}, path)


def _deep(path: Path) -> None:
    value: list[Any] = []
    for _ in range(200):
        value = [value]
    torch.save({"x": value, "state_dict": {"x": torch.zeros(1)}}, path)


def _call(path: Path, function: Callable[..., object], *arguments: object) -> None:
    torch.save({"state_dict": {"x": _Reduced(function, *arguments)}}, path)


def _copied_again_and_again(path: Path) -> None:
    shared = dict.fromkeys(range(1000), 1)
    again = [_Reduced(collections.Counter, shared) for _ in range(5000)]
    torch.save({"again": again, "state_dict": {"x": torch.zeros(1)}}, path)


def _claimed_storage(path: Path) -> None:
    """A legacy file of a few bytes whose storage claims 8 GiB."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", 2**31, None) if value == "?" else None
            )

    class Tensor:
        def __reduce__(self) -> Any:
            arguments = "?", 0, (2**31,), (1,), False, collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, arguments

    content = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, content, 2)
    Pickler(content, 2).dump({"state_dict": {"x": Tensor()}})
    pickle.dump(["0"], content, 2)
    path.write_bytes(content.getvalue() + struct.pack("<q", 2**31))


class _ClaimedArray:
    """Pickles as an array, and may state what it likes about itself."""

    def __init__(self, *state: object) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        empty = np.empty(0).__reduce__()
        return empty[0], empty[1], self.state


def _array(path: Path, *state: object) -> None:
    torch.save({"state_dict": {"x": _ClaimedArray(1, *state)}}, path)


def _array_copied_again_and_again(path: Path) -> None:
    content = b"a" * 100_000
    again = [_ClaimedArray(1, (100_000,), np.dtype("u1"), False, content) for _ in range(20_000)]
    torch.save({"state_dict": again}, path)


HOSTILE_TORCH: dict[str, Callable[[Path], object]] = {
    "deflated storage": _deflated,
    "300,000 expanded images": _expanded,
    "one tensor 20,000 times": _aliased,
    "billion laughs": _laughing,
    "contains itself": _endless,
    "200 deep": _deep,
    "bytearray of 8 GiB": lambda path: _call(path, bytearray, 2**33),
    "bytes of 8 GiB": lambda path: _call(path, bytes, 2**33),
    "tensor by size": lambda path: _call(path, torch.Tensor, 2**31),
    "copies of one value": _copied_again_and_again,
    "array of 8 GiB claimed": lambda path: _array(path, (2**33,), np.dtype("u1"), False, b"a"),
    "array of negative sides": lambda path: _array(
        path, (-1, -4), np.dtype("f4"), False, b"a" * 16
    ),
    "array of objects": lambda path: _array(path, (1,), np.dtype("O"), False, [os.system]),
    "one array 20,000 times": _array_copied_again_and_again,
    "storage of 8 GiB claimed": _claimed_storage,
    "runs a command": lambda path: _call(path, os.system, "true"),
    "sparse": lambda path: torch.save({"state_dict": {"x": torch.eye(3).to_sparse()}}, path),
}


@pytest.mark.parametrize("what", HOSTILE_TORCH)
def test_hostile_files_of_torch(what: str, folder: Path) -> None:
    path = folder / "model.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HOSTILE_TORCH[what](path)
    said = _in_little_memory("gradients.received_model.read_pretrained", path)
    assert said.startswith("error: --pretrained: ")


def _in_little_memory(reader: str, path: Path) -> str:
    """What a process says that reads a file and may allocate little more than its size."""
    module, _, function = reader.rpartition(".")
    limit = MEMORY_MIB * 2**20 + 8 * path.stat().st_size
    process = Command("-m", "tests.little_memory", module, function, str(path), str(limit))
    said, _ = process.communicate()
    assert process.returncode == 2, said[-2000:]
    assert len(said.strip().splitlines()) == 1, said[-2000:]
    return said


VALUES: dict[str, Any] = {
    "numbers": {"a": 1, "b": -(2**40), "c": 1.5, "d": True, "e": None, "f": 2**70},
    "text and containers": {"a": "é", "b": [1, (2, 3)], "c": {1, 2}, 4: b"\x00\xff", "d": 1j},
    "namespace": {"args": Namespace(a=1, b=[1])},
    "sizes": {"a": torch.Size([1, 2]), "b": torch.device("cpu"), "c": torch.float16},
    "counters": {"a": collections.Counter("aab"), "b": collections.OrderedDict(x=1)},
    "numpy": {"a": np.float64(1.5), "b": np.int64(3), "c": np.float32(0.5), "d": np.bool_(True)},
    "arrays": {
        "a": np.arange(6.0, dtype="f4").reshape(2, 3), "b": np.asfortranarray(np.eye(2, 3)),
        "c": np.array([True, False]), "d": np.array(5), "e": np.empty((0, 3), "f2"),
        "twice": [np.arange(3)] * 2,
    },
    "parameters": {"p": torch.nn.Parameter(torch.arange(3.0))},
    "empty tensors": {"a": torch.empty(0, 3), "b": torch.tensor(3.0)},
    **{
        str(dtype): {"x": torch.arange(4).to(dtype)}
        for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", VALUES)
def test_what_torch_saves_is_read_as_torch_reads_it(what: str, legacy: bool, folder: Path) -> None:
    torch.save(VALUES[what], folder / "x.pt", _use_new_zipfile_serialization=not legacy)
    read = read_torch_file(folder / "x.pt", "--x")
    try:
        # The file is of our own making.
        expected = torch.load(folder / "x.pt", weights_only=False)
    except AttributeError:
        # Some PyTorch cannot read what it wrote in the old format.
        expected = VALUES[what]
    assert repr(read) == repr(expected)
    assert same(read, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_of_one_storage_stay_views(legacy: bool, folder: Path) -> None:
    numbers = torch.arange(12.0)
    saved = {"a": numbers, "b": numbers[3:], "c": numbers.view(3, 4).t(), "d": numbers[::2]}
    torch.save(saved, folder / "x.pt", _use_new_zipfile_serialization=not legacy)
    read = read_torch_file(folder / "x.pt", "--x")
    assert all(torch.equal(read[n], saved[n]) for n in saved)
    assert all(read[n].stride() == saved[n].stride() for n in saved)
    read["a"][4] = -1
    assert read["b"][1] == read["c"][0, 1] == read["d"][2] == -1


def test_a_file_written_without_checksums_is_read(folder: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(3)}, folder / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_file(folder / "x.pt", "--x")["x"].tolist() == [0, 1, 2]


# -- Gradient checkpoints ------------------------------------------------------------------


def _changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = torch.load(path, weights_only=False)
    change(raw)
    torch.save(raw, path)


def _local(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["local_training"].update(values)


def _stripped(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw.update(x_true=None, y_true=None, **values)


def _side(raw: dict[str, Any], side: int = 16_384) -> None:
    raw.update(x_true=None, y_true=None)
    raw["dataset_setup"]["size"] = raw["data"]["shape"] = [3, side, side]
    raw["model"]["image_size"] = side


def _gradients(kind: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw.update(target_gradient=[kind(g) for g in raw["target_gradient"]])


CLAIMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a million images": _stripped(batch_size=1_000_000, shards=[1_000_000]),
    "side of 16,384": _side,
    "a billion epochs": _local(epochs=10**9),
    "minus five epochs": _local(epochs=-5),
    "an epoch and a half": _local(epochs=1.5),
    "a million steps": _local(epochs=1000, batches=1000),
    "complex gradients": _gradients(lambda g: g + 1j),
    "logical gradients": _gradients(lambda g: g > 0),
    "whole gradients": _gradients(lambda g: g.long()),
    "fractional labels": lambda raw: raw.update(y_true=torch.tensor([0.5, 1.0])),
    "logical labels": lambda raw: raw.update(y_true=torch.tensor([True, False])),
    "norm of another name": lambda raw: raw["model"].update(norm="xx"),
    "stem of another name": lambda raw: raw["model"].update(stem=3),
    "logical batch size": lambda raw: raw.update(batch_size=True),
    "a huge pooling kernel": lambda raw: raw["model"].update(pool_kernel=10**9),
    "a parameter twice": lambda raw: raw.update(
        parameter_names=[raw["parameter_names"][0]] * len(raw["parameter_names"])
    ),
    "defenses as text": lambda raw: raw.update(defenses="noise"),
    "seed of text": lambda raw: raw.update(dropout_seed="1"),
    "a state of lists": lambda raw: raw.update(state_dict=[1, 2]),
    "a larger network than it holds": lambda raw: raw["model"].update(arch="regnet_y_128gf"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_claims_of_a_gradient_checkpoint(what: str, folder: Path) -> None:
    path = whole_file("gradient checkpoint", folder)
    _changed(path, CLAIMS[what])
    with pytest.raises(InputError, match=r"^--checkpoint: "):
        READERS["gradient checkpoint"].read(path)


@pytest.mark.parametrize("what", ["side of 16,384", "a larger network than it holds"])
def test_a_claim_costs_no_memory(what: str, folder: Path) -> None:
    path = whole_file("gradient checkpoint", folder)
    _changed(path, CLAIMS[what])
    said = _in_little_memory("gradients.checkpoint.load_target", path)
    assert said.startswith("error: --checkpoint: ")


# -- Training checkpoints ------------------------------------------------------------------


def _momentum(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["optimizer"]["state"][0].update(momentum_buffer=value)


TRAINING: dict[str, Callable[[dict[str, Any]], object]] = {
    "a billion epochs": lambda raw: raw.update(epoch=10**9),
    "minus five epochs": lambda raw: raw.update(epoch=-5),
    "epochs of text": lambda raw: raw.update(epoch="1"),
    "a tensor of epochs": lambda raw: raw.update(epoch=torch.ones(3)),
    "accuracy of text": lambda raw: raw.update(best_acc1="90"),
    "a history of numbers": lambda raw: raw.update(history=[1, 2]),
    "a history of text": lambda raw: raw["history"][0].update(lr="0.1"),
    "no parameters": lambda raw: raw.update(state_dict=3),
    "numbers as names": lambda raw: raw.update(state_dict={1: torch.ones(1)}),
    "complex parameters": lambda raw: raw.update(
        state_dict={n: v + 1j for n, v in raw["state_dict"].items()}
    ),
    "no groups": lambda raw: raw["optimizer"].pop("param_groups"),
    "a state of a list": lambda raw: raw["optimizer"].update(state=[1]),
    "momentum of another shape": _momentum(torch.zeros(2)),
    "momentum of text": _momentum("x"),
    "complex momentum": lambda raw: _momentum(raw["optimizer"]["state"][0]["momentum_buffer"] + 1j)(
        raw
    ),
    "parameter 99": lambda raw: raw["optimizer"]["state"].update({99: {}}),
    "a model of a list": lambda raw: raw.update(model=[1]),
    "settings of text": lambda raw: raw["config"].update(epochs="many"),
    "settings of a list": lambda raw: raw.update(config=[1]),
}


@pytest.mark.parametrize("what", TRAINING)
def test_malformed_training_checkpoints(what: str, folder: Path) -> None:
    path = whole_file("training checkpoint", folder)
    _changed(path, TRAINING[what])
    with pytest.raises(InputError, match=r"^--resume: "):
        resume(path)


def test_options_of_the_optimizer_are_ours(folder: Path) -> None:
    path = whole_file("training checkpoint", folder)
    options = {"momentum": 0.5, "weight_decay": 7.0, "nesterov": True, "lr": "x", "more": 1}
    _changed(path, lambda raw: raw["optimizer"]["param_groups"][0].update(options))
    made = trainer(folder)
    before = [dict(group) for group in made.optimizer.param_groups]
    made.resume(path)
    for old, new in zip(before, made.optimizer.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }


def test_a_damaged_latest_checkpoint_falls_back_to_the_one_before(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = folder / CHECKPOINT, folder / CHECKPOINT.replace("0001", "0002")
    write_training(first)
    write_training(second)
    assert usable_checkpoint(folder) == second
    second.write_bytes(second.read_bytes().replace(b"state_dict", b"state-dict"))
    with caplog.at_level("WARNING"):
        assert usable_checkpoint(folder) == first
    assert second.name in caplog.text
    assert "trying the checkpoint before it" in caplog.text
    first.write_bytes(b"PK")
    with pytest.raises(InputError, match="0002"):
        usable_checkpoint(folder)


def test_the_one_before_the_latest_is_kept(folder: Path) -> None:
    made = trainer(folder)
    for epoch in (1, 2, 3):
        made.epoch = epoch
        made.save(50.0, is_best=False)
    assert sorted(path.name[:21] for path in folder.glob("checkpoint_*")) == [
        "checkpoint_epoch_0002",
        "checkpoint_epoch_0003",
    ]


# -- States of an attack -------------------------------------------------------------------


def _restart(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["restarts"][0].update(values)


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "progress with a method's name": lambda raw: raw["progress"].update(restore=1),
    "progress with a dunder": lambda raw: raw["progress"].update(__class__=1),
    "progress of a list": lambda raw: raw.update(progress=[1]),
    "iteration of text": lambda raw: raw["progress"].update(iteration="2"),
    "negative iteration": lambda raw: raw["progress"].update(iteration=-1),
    "trace of numbers": lambda raw: raw["progress"].update(trace=[1]),
    "fusion of another shape": lambda raw: raw["progress"].update(fusion=torch.zeros(1)),
    "no restarts": lambda raw: raw.update(restarts=[]),
    "restarts many times": lambda raw: raw.update(restarts=raw["restarts"] * 100),
    "variable of another shape": _restart(variable=torch.zeros(3)),
    "complex variable": lambda raw: _restart(variable=raw["restarts"][0]["variable"] + 1j)(raw),
    "variable of text": _restart(variable="x"),
    "generator of zeros": _restart(generator=torch.zeros(3, dtype=torch.uint8)),
    "generator of numbers": _restart(generator=5),
    "best value of text": _restart(best_value="0"),
    "labels too few": _restart(best_labels=torch.zeros(1, dtype=torch.long)),
    "another field": _restart(another=1),
    "a field missing": lambda raw: raw["restarts"][0].pop("best_inputs"),
    "optimizer of text": _restart(optimizer="x"),
    "matching missing": lambda raw: raw.pop("matcher"),
    "matching of nothing": lambda raw: raw.update(matcher=None),
    "matching of text": lambda raw: raw["matcher"].update(calls="1"),
}


@pytest.mark.parametrize("what", STATES)
def test_malformed_states_of_an_attack(what: str, folder: Path) -> None:
    path = whole_file("attack state", folder)
    _changed(path, STATES[what])
    with pytest.raises(InputError):
        READERS["attack state"].read(path)


# -- Records -------------------------------------------------------------------------------

STRANGE: list[Any] = [None, True, -1, 1.5, 10**30, "x", [], [1], {}, {"x": 1}]


@pytest.mark.parametrize("kind", JSON)
def test_a_record_with_a_value_of_another_type(kind: str, folder: Path) -> None:
    path = whole_file(kind, folder)
    values = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}
    for key in values:
        for value in STRANGE:
            path.write_text(json.dumps({**values, key: value}))
            try:
                READERS[kind].read(path)
            except InputError:
                continue
        path.write_text(json.dumps({k: v for k, v in values.items() if k != key}))
        try:
            READERS[kind].read(path)
        except InputError:
            continue


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 5000, '{"a": "\\ud800"}', "[]", "1" * 5000, "NaN"],
    ids=["deep list", "deep object", "half a character", "list", "5,000 digits", "NaN"],
)
@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_no_record(kind: str, text: str, folder: Path) -> None:
    path = whole_file(kind, folder)
    path.write_text(text)
    with pytest.raises(InputError):
        READERS[kind].read(path)


@pytest.mark.parametrize(
    "content",
    [
        {"training": [{"image": "a", "label": 10**12}]},
        {"training": [{"image": "a", "label": "9" * 5000}]},
        {"training": [{"image": "a", "label": [[[0]]]}]},
        {"training": [{"image": "a", "label": "²"}]},
        {"training": [], "labels": {"99999999999": "x"}},
    ],
)
def test_labels_that_would_make_a_huge_model(content: dict[str, Any], folder: Path) -> None:
    path = folder / "list.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError):
        READERS["list of images"].read(path)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), 10**400, "1", None])
def test_numbers_of_a_leaderboard_entry(value: Any, folder: Path) -> None:
    entry = leaderboard_entry()
    next(iter(entry["leaks"].values()))["ssim"][0] = value
    (folder / "entry.json").write_text(json.dumps(entry))
    with pytest.raises(InputError, match=r"ssim|not JSON"):
        READERS["leaderboard entry"].read(folder / "entry.json")


# -- Tables --------------------------------------------------------------------------------

_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
TABLES = {
    "5,000 deep": "title: " + "[" * 5000 + "]" * 5000,
    "alias bomb": _LAUGHS,
    "contains itself": "a: &a [*a]",
    "an axis of 100,000": "title: x\ncolumns: [psnr]\naxes: {attack.epochs: "
    f"[{', '.join(map(str, range(100_000)))}]}}",
    "a number of 5,000 digits": "title: " + "1" * 5000,
    "a number to the base of 60": "title: 1" + ":59" * 5000,
    "a date that is none": "title: 2001-99-99",
    "a tag that does not fit": "title: !!int abc",
    "another tag": "title: !!python/object/apply:os.system [true]",
    "bytes": "title: !!binary x",
    "no text": b"\xff\xfe\x00",
    "control characters": "title: \x07",
    "too large": "# " + "x" * 600_000,
}


@pytest.mark.parametrize("what", TABLES)
def test_hostile_tables(what: str, folder: Path) -> None:
    path, text = folder / "table.yaml", TABLES[what]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"table\.yaml"):
        READERS["table"].read(path)


def test_a_table_says_how_many_cells_it_would_have(folder: Path) -> None:
    values = ", ".join(map(str, range(200)))
    axes = f"axes:\n  attack.epochs: [{values}]\n  extract.target-idx: [{values}]\n"
    (folder / "table.yaml").write_text(f"title: x\ncolumns: [psnr]\n{axes}")
    with pytest.raises(InputError, match="40000 rows of 1 runs with 3 stages: 120000 cells"):
        READERS["table"].read(folder / "table.yaml")
    (folder / "table.yaml").write_text(table_text())
    READERS["table"].read(folder / "table.yaml")


# -- Pictures and arrays -------------------------------------------------------------------


def _png_of(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("size", "message"), [((9000, 9000), "9000 x 9000 pixels"), ((40_000, 30_000), "bomb")]
)
@pytest.mark.parametrize("kind", ["picture", "prior"])
def test_a_picture_that_claims_endless_pixels(
    kind: str, size: tuple[int, int], message: str, folder: Path
) -> None:
    path = folder / "picture.png"
    path.write_bytes(_png_of(*size))
    with pytest.raises(InputError, match=message):
        READERS[kind].read(path)


@pytest.mark.parametrize("kind", ["picture", "prior"])
def test_a_picture_that_would_run_a_program(kind: str, folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(InputError, match="cannot be read"):
        READERS[kind].read(folder / "picture.png")


def _header(shape: str, kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [_header("(2000000000, 4)"), _header("(1,)", "|O") + b"x" * 8, _header("(-1,)"), b"", b"\x93"],
    ids=["claims 32 GB", "objects", "negative", "empty", "cut"],
)
def test_arrays_that_are_not_as_large_as_they_claim(content: bytes, folder: Path) -> None:
    path = folder / "rdvl_round0.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best_match_inputs.npy", content)
        archive.writestr("best_match_recons.npy", content)
    with pytest.raises(InputError):
        READERS["arrays"].read(path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack(">IIII", 0x0803, 2**31, 2**31, 4) + bytes(80),
        struct.pack(">IIII", 0x0D03, 5, 4, 4) + bytes(80),
        struct.pack(">I", 0x0800),
        struct.pack(">II", 0x08FF, 5),
        struct.pack(">I200I", 0x08C8, *[1] * 200) + b"x",
        b"\0\0",
    ],
    ids=["claims 16 EiB", "of floats", "no axes", "cut axes", "200 axes", "cut"],
)
def test_bytes_that_are_not_as_many_as_they_claim(content: bytes, folder: Path) -> None:
    path = whole_file("IDX", folder)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"IDX format|another size than it claims"):
        READERS["IDX"].read(path)


def test_arrays_that_inflate_without_end(folder: Path) -> None:
    zeros = np.zeros((1, 3, 2000, 2000), np.float32)
    np.savez_compressed(
        folder / "rdvl_round0.npz", best_match_inputs=zeros, best_match_recons=zeros
    )
    with pytest.raises(InputError, match="inflate"):
        READERS["arrays"].read(folder / "rdvl_round0.npz")


@pytest.mark.parametrize("kind", ["arrays", "array", "archive of leakage", "archive of a state"])
def test_a_header_of_the_old_kind(kind: str, folder: Path) -> None:
    """numpy looks at one that it cannot read token by token."""
    path = whole_file(kind, folder)
    content = _header("(1, ") + b"x" * 8
    if path.suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("best_match_recons.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="no whole"):
        READERS[kind].read(path)


def test_an_archive_of_leakage_inflates_no_further(folder: Path) -> None:
    path = whole_file("archive of leakage", folder)
    with np.load(path) as read:
        arrays = dict(read)
    np.savez_compressed(path, **{**arrays, "img_recon_sim": np.zeros((2, 500_000, 1))})
    with pytest.raises(InputError, match="inflate"):
        READERS["archive of leakage"].read(path)


@pytest.mark.parametrize(
    "change",
    [{"round": np.inf}, {"site": np.array(["a", "b"])}, {"img_recon_sim": np.ones((2, 3, 1)) * 1j}],
    ids=["endless round", "two sites", "complex values"],
)
def test_values_of_an_archive_of_leakage(change: dict[str, Any], folder: Path) -> None:
    path = whole_file("archive of leakage", folder)
    with np.load(path) as read:
        arrays = dict(read)
    np.savez(path, **{**arrays, **change})
    with pytest.raises(InputError, match="broken"):
        READERS["archive of leakage"].read(path)


@pytest.mark.parametrize(
    "values", [np.ones((3, 4, 4)) * 1j, np.ones((3, 4, 4), bool), np.array("a"), np.array(1e300)]
)
def test_arrays_of_a_site_are_real_and_finite(values: np.ndarray, folder: Path) -> None:
    path = whole_file("array of a site", folder)
    np.save(path, values)
    with pytest.raises(InputError, match=r"not real numbers|not finite"):
        READERS["array of a site"].read(path)


@pytest.mark.parametrize("name", ["99999999999", "9" * 200])
def test_a_class_folder_that_would_make_a_huge_model(name: str, folder: Path) -> None:
    path = whole_file("array of a site", folder)
    path.parent.rename(path.parents[1] / name)
    with pytest.raises(InputError, match="no class below 100000"):
        READERS["array of a site"].read(path.parents[1] / name / path.name)


@pytest.mark.parametrize("claim", ["claims 16 GB", "inflates"])
def test_volumes_that_are_not_as_large_as_they_claim(claim: str, folder: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    path = whole_file("array of a site", folder).with_name("volume.nii.gz")
    volume = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)).to_bytes()
    if claim == "inflates":
        volume += b"\0" * 2**25
    else:
        volume = volume[:40] + struct.pack("<8h", 3, 2000, 2000, 1000, 1, 1, 1, 1) + volume[56:]
    path.write_bytes(gzip.compress(volume))
    with pytest.raises(InputError, match=r"it claims 16000000000 bytes|it inflates to more than"):
        READERS["array of a site"].read(path)


# -- Tables of records and text ------------------------------------------------------------

_MANY = ",".join("abcdefgh") + "\n"
RECORDS: dict[str, tuple[str, str]] = {
    "two million columns": ("," * 2_000_000 + "\n" + "," * 2_000_000, "2000001 columns"),
    "a record longer than the names": ("a,b\n1,2,3\n1,2\n", "its first record has 3 cells"),
    "an open quote": ('a,b\n1,"2\n1,2\n', "cannot be read as CSV"),
    "numbers too large to be scaled": ("a,b\n1e308,x\n-1e308,y\n1e307,x\n", "too large"),
    "an endless number": ("a,b\ninf,x\n2,y\n3,y\n", "not finite"),
    "an empty class": ("a,b\n1,\n2,y\n", "empty cells"),
    "features without end": (
        _MANY + "".join(",".join([f"w{i % 900}"] * 7) + f",{i % 2}\n" for i in range(30_000)),
        "30000 records of 6300 features",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_hostile_tables_of_records(what: str, folder: Path) -> None:
    text, message = RECORDS[what]
    (folder / "table.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        READERS["table of records"].read(folder / "table.csv")


def test_a_long_word_among_the_classes_costs_no_memory(folder: Path) -> None:
    (folder / "table.csv").write_text("a,b\n" + "1,x\n" * 5000 + "2," + "y" * 100_000)
    tracemalloc.start()
    READERS["table of records"].read(folder / "table.csv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize(
    "said",
    [
        {"target": []}, {"target": {}}, {"target": None}, {"target": 1}, {"columns": []},
        {"columns": {"age": []}}, {"columns": {"age": 0}}, {"columns": {"none": "ordinal"}},
    ],
)  # fmt: skip
def test_descriptions_of_no_columns(said: dict[str, Any], folder: Path) -> None:
    path = whole_file("description of columns", folder)
    path.write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"table\.(columns\.json|csv)"):
        READERS["description of columns"].read(path)


def test_endless_words_are_no_text(folder: Path) -> None:
    path = whole_file("text", folder)
    sentences = path.read_text()
    reference = READERS["text"].read(path)
    path.write_text(f"{sentences} {'x' * 1_000_000}.")
    assert same(READERS["text"].read(path), reference)


def test_a_folder_of_texts_with_a_pipe(folder: Path) -> None:
    whole_file("text", folder)
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(InputError, match="is a pipe"):
        READERS["text"].read(folder)


# -- Names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "../x", "/x", "a\\b", "a\0b", "a\nb", "\x1b[2J", "x" * 999]
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(InputError, match=r"^--id ") as caught:
        check_name(name, "--id")
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["test", "run 1", "exp.2", "été", "..."])
def test_names_that_stay_where_they_are(name: str) -> None:
    check_name(name, "--id")


@pytest.mark.parametrize("name", ["..", "", "a\0b"])
def test_commands_refuse_such_names_before_work(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attack.cli.command import main as attack
    from gradients.command import run as extract

    words = ["--checkpoint", str(folder / "x.tar"), "--root", str(folder), "--id", name]
    assert exit_status(lambda: attack(words)) == 2
    assert exit_status(lambda: extract(["--data", "photo-patches", "--id", name])) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("error: --id") for line in said] == [True, True]
    assert list(folder.iterdir()) == []


def test_a_path_with_a_null_byte() -> None:
    with pytest.raises(InputError, match=r"^--x: .*cannot be opened"):
        read_json("a\0b", "--x")
