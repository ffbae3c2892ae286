"""A Flower site's mod audits what an app is about to send, and lets out what is allowed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs pip install 'gradinvbench[flower]'")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from audit import gate_log
from audit.show.store import read_audit
from core.errors import InputError
from core.reading import read_json_object
from federated.flower import AuditMod
from federated.flower.kept_model import exchanged
from tests.federated import audited_site

# What must never be found in anything that leaves.
SECRET = np.arange(64, dtype=np.float32) + 0.125

Answer = Callable[[Message, Context], Message]
Arrays = dict[str, np.ndarray]


def a_mod(folder: Path, data: Any = audited_site.one_picture, **more: Any) -> AuditMod:
    return AuditMod(
        model=audited_site.build, data=lambda context: data(), local=audited_site.LOCAL,
        folder=folder, settings=audited_site.SETTINGS, **more,
    )  # fmt: skip


def unmeasured(folder: Path) -> AuditMod:
    """A mod that only checks what may leave."""
    return a_mod(folder, start_round=1000)


def context(**node: Any) -> Context:
    config = {"partition-id": 4, "num-partitions": 9, **node}
    return Context(run_id=7, node_id=11, node_config=config, state=RecordDict(), run_config={})


def log(folder: Path) -> list[dict[str, Any]]:
    return gate_log.verify(folder / "partition-4" / "run-7")


def record_of(values: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in values.items()})


def message(round_number: Any = 1, kind: str = "train", weights: Arrays | None = None) -> Message:
    """As `FedAvg` sends it."""
    content = RecordDict({"arrays": record_of(weights or audited_site.received())})
    content["config"] = ConfigRecord({"server-round": round_number, "lr": 0.1})
    return addressed(content, kind)


def addressed(content: RecordDict, kind: str, group: str = "") -> Message:
    """From the server, which is node 1."""
    return Message(content, metadata=Metadata(7, "m", 1, 11, "", group, time.time(), 600.0, kind))


def app_with(values: Arrays, **metrics: Any) -> Answer:
    """An app whose training ends with these arrays."""

    def answer(msg: Message, context: Context) -> Message:
        scores = MetricRecord({"num-examples": 8, "train_loss": 0.5, **metrics})
        return Message(RecordDict({"arrays": record_of(values), "metrics": scores}), reply_to=msg)

    return answer


def leaking() -> Answer:
    return app_with(audited_site.sent(audited_site.one_picture()))


def arrays(reply: Message) -> Arrays:
    return {name: a.numpy() for name, a in reply.content["arrays"].items()}


def says_nothing(reply: Message) -> bool:
    """Whether a reply says that there is none, and no more."""
    return reply.has_error() and not reply.has_content() and reply.error.reason in (
        "withheld by the site", "the client failed; its site has the reason",
    )  # fmt: skip


# --- The received model -----------------------------------------------------------


def test_the_global_model_is_looked_at_before_the_app_trains(tmp_path: Path) -> None:
    folder = tmp_path / "partition-4" / "run-7"
    seen: list[dict[str, Any]] = []

    def trains(msg: Message, node: Context) -> Message:
        name = f"received_round{len(seen) + 1}.json"
        seen.append(read_json_object(folder / name, what="look"))
        return app_with(audited_site.sent(audited_site.many_pictures()))(msg, node)

    for number, weights in ((1, audited_site.received()), (2, audited_site.made_to_leak())):
        # Flower builds the app anew for every message.
        a_mod(tmp_path, audited_site.many_pictures, record_only=True)(
            message(number, weights=weights), context(), trains
        )
    assert [(each["suspicious"], each["compared"]) for each in seen] == [
        (False, False), (True, True),
    ]  # fmt: skip
    record = read_audit(folder / "audit_round2.json")
    assert record.received is not None
    assert record.received.p_value == seen[1]["p_value"]
    said = [entry["received"] for entry in log(tmp_path)]
    assert "does not look as if" in said[0]
    assert "Do not train it" in said[1]


def test_a_suspicious_model_is_not_trained_on_where_a_site_says_so(tmp_path: Path) -> None:
    def must_not_train(msg: Message, node: Context) -> Message:
        raise AssertionError("the app was called")

    mod = a_mod(tmp_path, audited_site.many_pictures, refuse_suspicious=True)
    mod(message(1), context(), leaking())
    reply = mod(message(2, weights=audited_site.made_to_leak()), context(), must_not_train)
    assert says_nothing(reply)
    entry = log(tmp_path)[-1]
    assert entry["verdict"] == "withheld"
    assert entry["reason"] == "the global model is suspicious: nothing was trained"


def test_what_cannot_be_looked_at_is_audited_as_before(tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("no data")

    reply = a_mod(tmp_path, broken, refuse_suspicious=True)(message(), context(), leaking())
    assert says_nothing(reply)
    entry = log(tmp_path)[-1]
    assert (entry["verdict"], entry["received"]) == ("withheld", None)
    assert "no data" in entry["reason"]


def test_only_measured_updates_are_looked_at(tmp_path: Path) -> None:
    unmeasured(tmp_path)(message(), context(), leaking())
    a_mod(tmp_path)(message(2, "evaluate"), context(), leaking())
    assert not list(tmp_path.rglob("received_round*.json"))
    assert [entry["received"] for entry in log(tmp_path)] == [None, None]


# --- The verdict --------------------------------------------------------------------


def test_an_update_that_leaks_stays(tmp_path: Path) -> None:
    asked = message()
    reply = a_mod(tmp_path)(asked, context(), leaking())
    assert says_nothing(reply)
    assert reply.metadata.dst_node_id == asked.metadata.src_node_id
    record = read_audit(tmp_path / "partition-4" / "run-7" / "audit_round1.json")
    assert record.verdict == "leaks"
    entry = log(tmp_path)[-1]
    assert entry["verdict"] == "withheld"
    assert entry["reason"] == " ".join([record.statement, *record.warnings])
    assert (entry["setting"]["iterations"], entry["setting"]["local"]) == (20, audited_site.LOCAL)
    assert (entry["round"], entry["count"], entry["updates"]) == (1, 0, 1)


def test_an_update_in_which_nothing_is_found_leaves_as_it_is(tmp_path: Path) -> None:
    after = audited_site.sent(audited_site.many_pictures())
    mod = a_mod(tmp_path, audited_site.many_pictures)
    reply = mod(message(), context(), app_with(after, accuracy=0.75))
    assert list(arrays(reply)) == list(after)
    for name, value in arrays(reply).items():
        np.testing.assert_array_equal(value, after[name], strict=True)
    expected = {"num-examples": 8, "train_loss": 0.5, "accuracy": 0.75}
    assert dict(reply.content["metrics"]) == expected
    assert log(tmp_path)[-1]["verdict"] == "passed"


def test_a_mod_that_records_withholds_nothing(tmp_path: Path) -> None:
    mod = a_mod(tmp_path, record_only=True)
    assert mod(message(), context(), leaking()).has_content()
    found = read_audit(tmp_path / "partition-4" / "run-7" / "audit_round1.json")
    assert found.verdict == "leaks"
    assert log(tmp_path)[-1]["setting"]["record_only"] is True


class Client(NumPyClient):
    """A client as apps had it before there were messages: arrays without names."""

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        metrics = {"accuracy": 0.75, "note": "0.125", "many": SECRET.tobytes()}
        data = audited_site.one_picture if config["leak"] else audited_site.many_pictures
        return list(audited_site.sent(data()).values()), 8, metrics

    def evaluate(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        return 0.5, 8, {"accuracy": 0.75, "note": "0.125"}


def legacy(kind: str, prefix: str, **config: Any) -> Message:
    """As the strategies of `flwr.server` send it."""
    numbered = {str(k): v for k, v in enumerate(audited_site.received().values())}
    content = RecordDict({f"{prefix}.parameters": record_of(numbered)})
    content[f"{prefix}.config"] = ConfigRecord(config)
    return addressed(content, kind, "2")


@pytest.mark.parametrize("leak", [True, False])
def test_a_numpy_client_is_measured_too(tmp_path: Path, leak: bool) -> None:
    data = audited_site.one_picture if leak else audited_site.many_pictures
    app = ClientApp(lambda context: Client().to_client(), mods=[a_mod(tmp_path, data)])
    reply = app(legacy("train", "fitins", leak=leak), context())
    assert log(tmp_path)[-1]["round"] == 2
    if leak:
        assert says_nothing(reply)
        return
    from flwr.compat.common.recorddict_compat import recorddict_to_fitres

    result = recorddict_to_fitres(reply.content, keep_input=True)
    assert (result.num_examples, result.metrics) == (8, {"accuracy": 0.75})
    assert len(result.parameters.tensors) == len(audited_site.received())
    evaluated = app(legacy("evaluate", "evaluateins"), context())
    assert dict(evaluated.content["evaluateres.metrics"]) == {"accuracy": 0.75}


def test_an_app_cannot_hide_its_update_by_changing_what_it_was_sent(tmp_path: Path) -> None:
    after = audited_site.sent(audited_site.one_picture())

    def hiding(msg: Message, context: Context) -> Message:
        reply = app_with(after)(msg, context)
        msg.content["arrays"] = record_of(after)
        msg.metadata.group_id = "0.125"
        return reply

    reply = a_mod(tmp_path)(message(), context(), hiding)
    assert says_nothing(reply)
    assert reply.metadata.group_id == ""


# --- What may leave -----------------------------------------------------------------


def answering(content: RecordDict | Error) -> Answer:
    return lambda msg, context: Message(content, reply_to=msg)


def with_record(name: str, record: Any, arrays: Any = None) -> Answer:
    """An app that answers with one record more."""
    kept = record_of(audited_site.received()) if arrays is None else arrays
    metrics = MetricRecord({"num-examples": 8})
    return answering(RecordDict({"arrays": kept, "metrics": metrics, name: record}))


def raising(msg: Message, context: Context) -> Message:
    # Longer than any line of the log.
    raise ValueError(f"0.125 {SECRET}" + " " * gate_log.MAX_LINE_BYTES)


def without_padding(value: np.ndarray) -> Array:
    """An array with something behind it that no reader of it sees."""
    made = Array(value)
    return Array(made.dtype, made.shape, made.stype, made.data + SECRET.tobytes())


def renamed(name: str) -> ArrayRecord:
    return record_of({**audited_site.received(), name: SECRET})


def first(array: Array) -> ArrayRecord:
    kept = {name: Array(value) for name, value in audited_site.received().items()}
    return ArrayRecord({**kept, "1.bias": array})


NUMBER = int.from_bytes(SECRET[:1].tobytes() * 8, "little")
PLANTED: dict[str, Answer] = {
    "text": with_record("config", ConfigRecord({"a": "0.125"})),
    "bytes": with_record("config", ConfigRecord({"a": SECRET.tobytes()})),
    "list of a config": with_record("config", ConfigRecord({"a": SECRET.tolist()})),
    "list of metrics": with_record("more", MetricRecord({"a": SECRET.tolist()})),
    "many metrics": with_record("more", MetricRecord({f"m{i}": float(v) for i, v in
                                                      enumerate(SECRET)})),
    "a record's name": with_record("0.125\n" * 40, MetricRecord({"a": 1})),
    "many names": answering(RecordDict({f"{i} 0.125 " * 10: MetricRecord({}) for i in range(64)})),
    "empty records": answering(RecordDict({f"{i} 0.125": MetricRecord({}) for i in range(999)})),
    "a metric's name": with_record("more", MetricRecord({"0.125 " * 40: 1})),
    "more arrays": with_record("more", record_of({"x": SECRET})),
    "another variable": with_record("more", MetricRecord({}), renamed("x")),
    "a long variable": with_record("more", MetricRecord({}), renamed("1.bias")),
    "complex numbers": with_record("more", MetricRecord({}), first(
        Array(SECRET[:16].astype(complex)))),
    "an array's type": with_record("more", MetricRecord({}), first(
        Array("0.125", (16,), "numpy.ndarray", Array(np.zeros(16, np.float32)).data))),
    "behind an array": with_record("more", MetricRecord({}), first(
        without_padding(np.zeros(16, np.float32)))),
    "an unreadable array": with_record("more", MetricRecord({}), first(
        Array("float32", (16,), "own", SECRET.tobytes()))),
    "an exception": raising,
    "an error's reason": answering(Error(ErrorCode.CLIENT_APP_CRASHED, "0.125")),
    "an error's code": answering(Error(NUMBER, "0.125")),
    "a status": with_record("fitres.status", ConfigRecord({"code": 0, "message": "0.125"})),
    "a bad status": with_record("fitres.status", ConfigRecord({"code": 1, "message": "0.125"})),
    "no message": lambda msg, context: SECRET,  # type: ignore[dict-item, return-value]
}  # fmt: skip


def everything(reply: Message) -> bytes:
    """All bytes that a reply would carry over the network."""
    objects = get_all_nested_objects(reply).values()
    data = [each.data for each in objects if isinstance(each, Array)]
    return b"".join([*data, *(each.deflate() for each in objects)])


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_stays(tmp_path: Path, planted: str, kind: str) -> None:
    asked = message(kind=kind)
    reply = unmeasured(tmp_path)(asked, context(), PLANTED[planted])
    sent = everything(reply)
    assert SECRET.tobytes() not in sent
    assert SECRET[:1].tobytes() * 8 not in sent
    assert b"0.125" not in sent
    assert log(tmp_path)[-1]["message"] == kind


def test_the_test_finds_what_is_planted() -> None:
    for planted in ("text", "bytes", "a record's name", "another variable", "behind an array"):
        sent = everything(PLANTED[planted](message(), context()))
        assert SECRET.tobytes() in sent or b"0.125" in sent


def test_scores_leave_without_arrays(tmp_path: Path) -> None:
    scores = MetricRecord({"eval_acc": 0.75, "num-examples": 60})
    answer = answering(RecordDict({"metrics": scores}))
    reply = unmeasured(tmp_path)(message(kind="evaluate"), context(), answer)
    assert dict(reply.content["metrics"]) == dict(scores)
    with_arrays = unmeasured(tmp_path)(message(kind="evaluate"), context(), leaking())
    assert says_nothing(with_arrays)
    assert [e["verdict"] for e in log(tmp_path)] == ["no update", "withheld"]


# --- Rounds and the log -------------------------------------------------------------


def test_the_site_counts_its_rounds_in_a_new_process_each(tmp_path: Path) -> None:
    """A server that states odd rounds only is measured all the same."""
    for number in (1, 3, 5):
        unmeasured(tmp_path)(message(number), context(), leaking())
    assert [entry["count"] for entry in log(tmp_path)] == [0, 1, 2]
    mod = a_mod(tmp_path, frequency=3)
    assert says_nothing(mod(message(7), context(), leaking()))
    assert (tmp_path / "partition-4" / "run-7" / "audit_round7.json").exists()
    # Another site and another run are others.
    elsewhere = context(**{"partition-id": 5})
    assert mod.folder_of(elsewhere) != mod.folder_of(context())
    assert not mod.folder_of(elsewhere).exists()


@pytest.mark.parametrize("number", [1, 0, -1, "one", 2**40, float("nan")])
def test_a_round_that_cannot_be_is_withheld(tmp_path: Path, number: Any) -> None:
    mod = unmeasured(tmp_path)
    assert mod(message(1), context(), leaking()).has_content()
    assert says_nothing(mod(message(number), context(), leaking()))


def test_without_its_log_nothing_leaves(tmp_path: Path) -> None:
    mod = unmeasured(tmp_path)
    assert mod(message(1), context(), leaking()).has_content()
    path = tmp_path / "partition-4" / "run-7" / gate_log.LOG_NAME
    path.write_bytes(path.read_bytes().replace(b"unmeasured", b"measured"))
    assert says_nothing(mod(message(2), context(), leaking()))
    (tmp_path / "file").write_text("")
    assert says_nothing(unmeasured(tmp_path / "file")(message(), context(), leaking()))


def test_a_node_names_its_own_folder(tmp_path: Path) -> None:
    own = context(**{"audit-folder": str(tmp_path / "own")})
    unmeasured(tmp_path / "apps")(message(), own, leaking())
    assert (tmp_path / "own" / "partition-4" / "run-7" / gate_log.LOG_NAME).exists()
    assert not (tmp_path / "apps").exists()


@pytest.mark.parametrize("record_only", [False, True])
def test_what_cannot_be_audited_stays(tmp_path: Path, record_only: bool) -> None:
    def no_data() -> Any:
        raise OSError("no such folder")

    reply = a_mod(tmp_path, no_data, record_only=record_only)(message(), context(), leaking())
    assert reply.has_content() == record_only
    verdict = "passed unmeasured" if record_only else "withheld"
    assert (log(tmp_path)[-1]["verdict"], "no such folder" in log(tmp_path)[-1]["reason"]) == (
        verdict, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "setting",
    [
        {"frequency": True},
        {"start_round": float("inf")},
        {"random_rounds": 1},
        {"record_only": "no"},
        {"withhold_cannot_tell": 2},
        {"budget": float("nan")},
        {"model": "Net"},
        {"data": None},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        AuditMod(**{"model": audited_site.build, "data": lambda context: None, **setting})


def test_a_kept_model_that_is_damaged_is_none_and_the_next_is_kept(tmp_path: Path) -> None:
    path, model = tmp_path / "kept.npz", {"a.weight": np.ones((3, 2)), "b": np.zeros(())}
    assert exchanged(path, model) is None
    path.write_bytes(path.read_bytes()[:-40])
    assert exchanged(path, model) is None
    again = exchanged(path, model)
    assert again is not None
    assert list(again) == list(model)
    assert all(np.array_equal(again[name], model[name]) for name in model)
