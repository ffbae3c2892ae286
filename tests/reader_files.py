"""One whole file of every kind that is read, and its reader: what hostile files are made of."""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attack.loop.inversion import Inversion
from attack.record import AttackRecord
from attack.record import read_record as read_attack
from attack.settings import InversionConfig
from audit.data import open_data
from audit.gate_log import append, verify
from audit.leakage import LeakageRecord, read_leakage
from audit.rdlv_archive import read_archive, write_archive
from audit.settings import load_inversion_settings
from audit.show.store import read_audit, write_audit
from benchmarks.declare.tables import load_table
from benchmarks.models.measure import Agreement
from benchmarks.models.record import Record
from benchmarks.run.cells import Cell
from benchmarks.run.store import Store
from benchmarks.show.leaderboard import load_entry
from benchmarks.speed.equal_time import recorded_rows
from core.array_files import read_array, read_idx
from core.data import records as tables_of_records
from core.data import text as texts
from core.data.data_sets import DataSets
from core.data.image_files import load_image
from core.data.list_files import Sample, load_datalist, open_datalist, write_datalist
from core.data.specs import DataSpec
from core.models.building import ModelSpec, build_model
from core.models.state_files import read_state as read_model_state
from core.pictures import read_image
from core.processes.distributed import Process
from core.storage import save_checkpoint, write_json, write_record
from core.target import Target, Truth
from gradients.checkpoint import load_target, save_target
from gradients.received_model import read_pretrained
from gradients.record import ExtractRecord, Measured, describe
from gradients.record import read_record as read_extraction
from tests.audit_records import example as example_audit
from tests.board_entries import entry, spread
from tests.targets import make_target
from training.record import EpochResult, TrainRecord
from training.record import read_record as read_training
from training.settings import TrainingConfig
from training.trainer import Trainer

CPU = torch.device("cpu")
MODEL = ModelSpec("cnn", n_classes=3, image_size=8, width=2)
DATA = DataSpec("noise", (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 3)
ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "checkpoint_epoch_0001_acc1_1.00.pth.tar"
EPOCH = {
    "epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_acc1": 50.0, "val_loss": 1.0,
    "val_acc1": 50.0, "epsilon": None, "images_per_second": 1.0, "seconds": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        name: Of the file.
        write: Writes a whole one.
        read: Reads one with the project's reader; returns what it made of it.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]


@functools.cache
def small_target() -> tuple[Target, Truth]:
    return make_target(MODEL, 2, train_mode=True, double=False)


def small_record(status: str = "finished") -> dict[str, Any]:
    return {
        "kind": "training", "status": status, "scheme": "pure", "config": {"epochs": 1},
        "model": MODEL.to_dict(), "data": DATA.to_dict(), "n_train": 4, "n_val": 4,
        "processes": 1, "epochs_done": 1, "initial_val_acc1": 1.0, "best_val_acc1": 2.0,
        "final_val_acc1": 2.0, "final_train_acc1": 2.0, "privacy": None,
        "images_per_second": 1.0, "seconds_per_epoch": 1.0, "seconds": 1.0, "history": [EPOCH],
        "checkpoints": {"initial": "a", "best": None, "last": None}, "provenance": {"seed": 1},
    }  # fmt: skip


def extract_record() -> dict[str, Any]:
    measured = Measured(1, 1, 1, 1, (0, 1))
    return ExtractRecord(describe(small_target()[0]), (0, 1), "x.tar", measured).to_dict()


def attack_record() -> dict[str, Any]:
    record = AttackRecord(key="0", attack="spectral", config={"tv": 1.0}, labels=[1, 0])
    return dataclasses.replace(record, trace=[{"iteration": 0, "objective": 1.0}]).to_json()


def leakage_record() -> dict[str, Any]:
    return {
        "site": "a", "round": 0, "decision": "pass", "reason": "small", "rdlv": 0.1,
        "images": [{"rdlv": 0.1}],
    }  # fmt: skip


class _Images:
    """Four grey images."""

    in_memory = True

    @staticmethod
    def target_like() -> torch.Tensor:
        return torch.tensor(0)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: Any) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 8, 8), 0


def trainer(folder: Path) -> Trainer:
    """A trainer of a small model that has not begun."""
    images: Any = _Images()
    torch.manual_seed(0)
    model = build_model(MODEL)
    config = TrainingConfig(epochs=2, batch_size=4, workers=0, tensorboard=False)
    process = Process()
    return Trainer(model, MODEL, DataSets(DATA, images, images, images), config, process, folder)


def write_training(path: Path) -> None:
    made = trainer(path.parent)
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    made.epoch = 1
    made.history = [EpochResult(**EPOCH)]  # type: ignore[arg-type]
    save_checkpoint(made.state(), path)


def resume(path: Path) -> object:
    resumed = trainer(path.parent)
    resumed.resume(path)
    states = resumed.model.state_dict(), resumed.optimizer.state_dict()
    return resumed.epoch, resumed.history, *states


def inversion() -> Inversion:
    target, truth = small_target()
    config = InversionConfig().changed(iterations=4, restarts=2, joint_labels=True)
    return Inversion(target, truth.labels, config, device=CPU)


def write_state(path: Path) -> None:
    inversion().run(state_file=path, save_every=2)


def read_state(path: Path) -> object:
    made = inversion()
    restarts = made.state(path).load(made.restarts)
    values = [
        {**vars(r), "optimizer": r.optimizer.state_dict(), "generator": r.generator.get_state()}
        for r in restarts
    ]
    return values, vars(made.progress), made.matcher.state_dict()


def write_model(path: Path, legacy: bool = False) -> None:
    torch.save(build_model(MODEL).state_dict(), path, _use_new_zipfile_serialization=not legacy)


def write_png(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def write_arrays(path: Path) -> None:
    images = np.zeros((1, 3, 4, 4), np.float32)
    np.savez(path, best_match_inputs=images, best_match_recons=images)


def read_best_matches(path: Path) -> object:
    return LeakageRecord("a", 0, "pass", "", None, [], {}, path.with_name("x.json")).best_matches()


def write_state_archive(path: Path) -> None:
    state = build_model(MODEL).state_dict()
    np.savez(path, **{name: value.numpy() for name, value in state.items()})  # type: ignore[arg-type]


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(build_model(MODEL).state_dict(), path)


def write_idx(path: Path) -> None:
    path.write_bytes(struct.pack(">IIII", 0x0803, 5, 4, 4) + bytes(80))


def write_records(path: Path) -> None:
    rows = [f"{i / 7:.3f},{'abc'[i % 3]},{'yn'[i % 2]}" for i in range(20)]
    path.write_text("\n".join(["age,ward,ill", *rows]))


def write_description(path: Path) -> None:
    write_records(path.with_name("table.csv"))
    write_json(path, {"target": "ill", "columns": {"age": "continuous"}})


def write_text_file(path: Path) -> None:
    path.write_text(" ".join(f"The number {i} is a number of many numbers." for i in range(40)))


def read_text_file(path: Path) -> object:
    texts._corpus.cache_clear()
    texts._vocabulary.cache_clear()
    return texts.text_data(str(path), length=4).train


def write_rdlv_archive(path: Path) -> None:
    write_archive(path, np.zeros((2, 1)), np.zeros((2, 3, 1)), np.zeros((2, 1)), "a", 0)


def write_site_data(path: Path, write: Callable[[Path], object]) -> None:
    """Three files of a folder for an audit, and the one in question: FOLDER/members/0/FILE."""
    folder = path.parents[2]
    for place in ("members/1", "non_members/0", "non_members/1", "members/0"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        write(folder / place / path.name)


def write_array(path: Path) -> None:
    np.save(path, np.zeros((3, 4, 4), np.float32))


def read_site_data(path: Path) -> object:
    return open_data(str(path.parents[2]))


def models_record() -> dict[str, Any]:
    row = dataclasses.asdict(Agreement("mlp", "eval", (3, 8, 8), 10, 1.0, 0.99))
    return {"models": {"own": [row]}}


def read_models(path: Path) -> object:
    return Record.read(path.parent).rows


def equal_time_record() -> dict[str, Any]:
    row = {"checkpoint": "a", "attack": "dlg", "budget_seconds": 1.0, "seed": 0}
    return {"rows": [row], "provenance": {}}


def write_list(path: Path) -> None:
    samples = [Sample("a.png", 0), Sample("b.png", 1)]
    write_datalist(path, {"training": samples, "validation": samples})


def read_list(path: Path) -> object:
    return load_datalist(path, "training"), open_datalist(path).class_names(2)


def write_log(path: Path) -> None:
    for number in range(3):
        append(path.parent, {"round": number, "decision": "pass"})


CELL = Cell("toy", {"value": 1}, {})


def read_store(path: Path) -> object:
    # STORE/STAGE/KEY/record.json
    store = Store(path.parents[2])
    return list(store.records()), store.result(CELL), store.failure(CELL)


def json_writer(make: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda path: write_record(path, make())


def leaderboard_entry() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(entry("Mine", spread(0.5)))))
    return made


def table_text() -> str:
    return (ROOT / "benchmarks/tables/batch_size.yaml").read_text()


TORCH = {
    "gradient checkpoint": Reader(
        "target.tar", lambda p: save_target(p, *small_target(), {"epochs": 1}), load_target
    ),
    "training checkpoint": Reader(CHECKPOINT, write_training, resume),
    "attack state": Reader("state.pt", write_state, read_state),
    "model": Reader("model.pth", write_model, read_pretrained),
    "legacy model": Reader(
        "model.pth", functools.partial(write_model, legacy=True), read_pretrained
    ),
}
JSON = {
    "training record": Reader(
        "record.json",
        json_writer(lambda: TrainRecord.from_dict(small_record()).to_dict()),
        lambda p: read_training(p.parent),
    ),
    "extraction record": Reader("record.json", json_writer(extract_record), read_extraction),
    "attack record": Reader("record.json", json_writer(attack_record), read_attack),
    "audit record": Reader(
        "audit.json", lambda p: write_audit(example_audit(), p.parent), read_audit
    ),
    "leakage record": Reader(
        "leakage_round0.json", json_writer(leakage_record), lambda p: read_leakage(p.parent)
    ),
    "store record": Reader(
        f"toy/{CELL.key}/record.json",
        json_writer(lambda: {**CELL.describe(), "result": {"value": 1}}),
        read_store,
    ),
    "failure in the store": Reader(
        f"toy/{CELL.key}/failure.json",
        json_writer(lambda: {**CELL.describe(), "error": "none"}),
        read_store,
    ),
    "leaderboard entry": Reader(
        "entry.json", lambda p: write_json(p, leaderboard_entry()), load_entry
    ),
    "list of images": Reader("list.json", write_list, read_list),
    "inversion settings": Reader(
        "config_inversion.json",
        lambda p: write_json(p, {"iterations": 10, "lr": 0.1}),
        load_inversion_settings,
    ),
    "description of columns": Reader(
        "table.columns.json",
        write_description,
        lambda p: tables_of_records.load_table(p.with_name("table.csv")),
    ),
    "models of the benchmark": Reader("models.json", json_writer(models_record), read_models),
    "attacks of equal time": Reader(
        "record.json", json_writer(equal_time_record), lambda p: recorded_rows(p.parent)
    ),
}
OTHER = {
    "table": Reader("table.yaml", lambda p: p.write_text(table_text()), load_table),
    "picture": Reader("picture.png", write_png, lambda p: load_image(p, 4)),
    "prior": Reader("picture.png", write_png, lambda p: read_image(p, (3, 4, 4), "--prior")),
    "arrays": Reader("rdvl_round0.npz", write_arrays, read_best_matches),
    "archive of a state": Reader(
        "state.npz", write_state_archive, lambda p: read_model_state(p, "--global")
    ),
    "safetensors": Reader(
        "state.safetensors", write_safetensors, lambda p: read_model_state(p, "--global")
    ),
    "IDX": Reader("images-idx3-ubyte", write_idx, read_idx),
    "array": Reader("array.npy", write_array, read_array),
    "table of records": Reader("table.csv", write_records, tables_of_records.load_table),
    "text": Reader("text.txt", write_text_file, read_text_file),
    "archive of leakage": Reader("rdvl_round0.npz", write_rdlv_archive, read_archive),
    "array of a site": Reader(
        "members/0/array.npy", lambda p: write_site_data(p, write_array), read_site_data
    ),
    "picture of a site": Reader(
        "members/0/picture.png", lambda p: write_site_data(p, write_png), read_site_data
    ),
    "gate log": Reader("gate_log.jsonl", write_log, verify),
}
READERS = {**TORCH, **JSON, **OTHER}


def whole_file(kind: str, folder: Path) -> Path:
    """Write a whole file of a kind."""
    path = folder / READERS[kind].name
    path.parent.mkdir(parents=True, exist_ok=True)
    READERS[kind].write(path)
    return path


def same(one: Any, other: Any) -> bool:
    """Whether two readings are equal, tensors and not-a-numbers included."""
    if isinstance(one, torch.Tensor):
        return bool(
            one.dtype == other.dtype and one.shape == other.shape and repr(one) == repr(other)
        )
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one)]
        return all(same(getattr(one, n), getattr(other, n)) for n in names)
    return bool(one == other or one != one or not isinstance(one, (int, str, float, bool)))
