"""Cells that go along in one process, taken back from a committed table, within a budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import benchmarks.compute
from benchmarks.compute import Workers, say_costs, wanted_cells
from benchmarks.declare.tables import Row, Table
from benchmarks.run.cells import Cell, Input
from benchmarks.run.committed import Committed, compact_records
from benchmarks.run.costs import Costs, seconds_of
from benchmarks.run.executor import Job, Outcome
from benchmarks.run.grid import Status
from benchmarks.run.store import Store
from benchmarks.show.results import collect
from core.errors import InputError
from core.storage import write_json
from tests.toy_grid import TOY, grid, toy

MANY = dataclasses.replace(TOY, name="many", beside=("beside", "add"))
STAGES = {"toy": TOY, "many": MANY}


class Recorder:
    """An executor that computes at once and remembers the command lines."""

    def __init__(self, fail: str = "") -> None:
        self.commands: list[list[str]] = []
        self._fail, self._ended = fail, []

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        self.commands.append(job.command())
        for each in job.all():
            write_json(each.files / "number.json", 1)
            if not (self._fail and each is not job):
                write_json(each.files / "record.json", {"value": each.cell.config["value"]})
        self._ended.append(Outcome(job, self._fail or None))

    def poll(self) -> list[Outcome]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None: ...


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def targets_of(model: Cell, n: int) -> list[Cell]:
    made = [toy(add=model, value=v) for v in range(n)]
    return [Cell("many", {"value": 7}, {"add": Input(cell, "number.json")}) for cell in made]


def test_cells_of_one_configuration_and_model_share_a_process(store: Store) -> None:
    one, other = targets_of(toy(value=10), 5), targets_of(toy(value=20), 2)
    executor = Recorder()
    statuses = grid(
        [*one, *other], store, executor=executor, stages=STAGES, targets_at_once=3
    ).run()
    assert set(statuses.values()) == {Status.FINISHED}
    together = [words.index("--beside") for words in executor.commands if "--beside" in words]
    assert len(together) == 3
    beside = [len([w for w in words if "=" in w]) for words in executor.commands]
    # Five as three and two; the two of the other model by themselves.
    assert sorted(count + 1 for count in beside if count) == [2, 2, 3]
    pairs = [word.split("=") for words in executor.commands for word in words if "=" in word]
    folders = {str(store.files(cell)): cell for cell in [*one, *other]}
    for checkpoint, folder in pairs:
        need = folders[folder].inputs["add"].cell
        assert Path(checkpoint) == store.files(need) / "number.json"


def test_two_files_of_one_training_are_two_models(store: Store) -> None:
    """The initial and the trained model, say."""
    model, cells = toy(value=10), []
    for value, pattern in enumerate(["number.json", "num*.json"] * 2):
        made = Cell("toy", {"value": value}, {"add": Input(model, pattern)})
        cells.append(Cell("many", {"value": 7}, {"add": Input(made, "number.json")}))
    executor = Recorder()
    grid(cells, store, executor=executor, stages=STAGES, targets_at_once=4).run()
    beside = [[w for w in words if "=" in w] for words in executor.commands if "--beside" in words]
    assert [len(words) for words in beside] == [1, 1]


def test_of_a_process_that_fails_the_finished_cells_count(store: Store) -> None:
    cells = targets_of(toy(value=10), 2)
    needs = [cell.inputs["add"].cell for cell in cells]
    grid(needs, store, executor=Recorder(), stages=STAGES).run()
    failing = Recorder(fail="exit status 1: broken")
    statuses = grid(cells, store, executor=failing, stages=STAGES, targets_at_once=2).run()
    assert sorted(statuses[cell.key].value for cell in cells) == ["failed", "finished"]


def test_after_the_budget_nothing_begins(store: Store) -> None:
    cells = [toy(value=v) for v in range(3)]
    statuses = grid(cells, store, executor=Recorder(), seconds=0).run()
    assert set(statuses.values()) == {Status.LEFT}
    again = grid(cells, store, executor=Recorder()).run()
    assert set(again.values()) == {Status.FINISHED}


def table_of(chains: list[dict[str, Cell]], order: tuple[str, ...] = ()) -> Table:
    rows = tuple(Row({"a": str(i % 2), "b": str(i)}, (chain,)) for i, chain in enumerate(chains))
    return Table(
        "t", "T", "", "embedded", {}, ("a", "b"), rows, ("attack.seconds",), (),
        ("extract", "attack"), order=order,
    )  # fmt: skip


def chains(code: str, n: int = 3) -> list[dict[str, Cell]]:
    made = []
    for number in range(n):
        extract = Cell("extract", {"target-idx": number}, code=code)
        inputs = {"checkpoint": Input(extract, "*.pth.tar")}
        made.append({"extract": extract, "attack": Cell("attack", {"attack": "x"}, inputs, code)})
    return made


def attacked(number: int) -> dict[str, object]:
    guesses = {"flat colour": {"psnr": {"mean": 14.0, "std": None}}}
    return {
        "seconds": 2.0 + number,
        "wall_seconds": 4.0,
        "evaluation": {"per_image": [{"psnr": 20.123456789}], "baselines": guesses},
        "trace": [{"iteration": 1}],
        "details": {"cpu_seconds": 1.5, "layers": {"w": 1}},
    }


def test_a_committed_cell_counts_for_later_code_and_is_not_computed_again(tmp_path: Path) -> None:
    earlier, later = chains("old"), chains("new")
    done = [(c["attack"], attacked(i)) for i, c in enumerate(earlier[:2])]
    path = tmp_path / "t.json"
    write_json(path, {"records": compact_records(done)})
    store = Store(tmp_path / "store", Committed.read(path))
    table = table_of(later)
    wanted = wanted_cells(table, store)
    # Neither the attacks that are done nor the gradients that only they need.
    assert [cell.key for cell in wanted] == [later[2]["extract"].key, later[2]["attack"].key]
    rows = collect(table, store).rows
    assert [row.summaries["attack.seconds"].mean for row in rows[:2]] == [2.0, 3.0]
    assert rows[2].summaries["attack.seconds"] is None
    # What is written of them anew names the version that computed them.
    again = compact_records((c["attack"], store.result(c["attack"]) or {}) for c in later[:2])
    assert again == compact_records(done)
    assert rows[1].runs[0].baselines["flat colour"]["psnr"]["mean"] == 14.0
    said = say_costs(table, store, Workers(jobs=2), 1800.0)
    assert "about 2 s on 2 processes" in said
    assert "nobody has recorded what 1 of them cost" in said
    assert "30 min" in said


def test_a_model_that_was_trained_again_is_told_from_the_committed_one(tmp_path: Path) -> None:
    earlier, later = (Cell("train", {"scheme": "RA"}, code=code) for code in ("old", "new"))
    path = tmp_path / "t.json"
    write_json(path, {"records": compact_records([(earlier, {"best_val_acc1": 76.7241})])})
    store = Store(tmp_path / "store", Committed.read(path))
    assert store.trained_otherwise([later]) == []
    store.begin(later)
    store.finish(later, {"best_val_acc1": 76.2931})
    (sentence,) = store.trained_otherwise([later, later])
    assert sentence.startswith("train RA: this processor's model has 76.3 % accuracy, that of the")
    assert "76.7 %" in sentence
    store.finish(later, {"best_val_acc1": 76.724138})
    assert store.trained_otherwise([later]) == []


def test_a_fresh_checkout_says_what_the_committed_cells_have_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = chains("old"), chains("new")
    done = [(c["attack"], attacked(i)) for i, c in enumerate(earlier)]
    done += [(c["extract"], {"seconds": 1.0}) for c in earlier]
    write_json(tmp_path / "t" / "t.json", {"records": compact_records(done)})
    table, store = table_of(later), Store(tmp_path / "store")
    monkeypatch.setattr(benchmarks.compute, "REFERENCE", tmp_path)
    # Four and one second by three, on one process; the results themselves are not taken.
    assert "6 cells to compute: about 15 s on one process by" in say_costs(
        table, store, Workers(jobs=1), None
    )
    assert len(wanted_cells(table, store)) == 6
    monkeypatch.setattr(benchmarks.compute, "REFERENCE", tmp_path / "none")
    assert "nobody has recorded" in say_costs(table, store, Workers(jobs=1), None)


def test_a_compact_record_keeps_what_columns_read(tmp_path: Path) -> None:
    cells = [c["attack"] for c in chains("old")]
    records = compact_records([(cell, attacked(i)) for i, cell in enumerate(cells)])
    first = records[cells[0].setting]
    assert first["code"] == "old"
    assert first["result"]["evaluation"]["per_image"] == [{"psnr": 20.1235}]
    assert first["result"]["details"] == {"cpu_seconds": 1.5}
    assert "trace" not in first["result"]
    # The same guesses are written once.
    assert records[cells[1].setting]["result"]["evaluation"]["baselines"] == cells[0].setting
    assert json.dumps(records).count("flat colour") == 1


def test_a_compact_record_names_no_folder_of_the_machine() -> None:
    cell = chains("x")[0]["extract"]
    found = {"checkpoint": "/home/site/store/b2-checkpoint.pth.tar", "gradient_norm": 1.0}
    (record,) = compact_records([(cell, found)]).values()
    assert record["result"] == {"checkpoint": "b2-checkpoint.pth.tar", "gradient_norm": 1.0}


@pytest.mark.parametrize("content", ["[]", '{"records": 3}', '{"records": {"a": {"result": 1}}}'])
def test_a_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(InputError):
        Committed.read(path)


def test_rows_are_computed_in_the_order_that_the_table_gives(tmp_path: Path) -> None:
    made = chains("x", 4)
    wanted = wanted_cells(table_of(made, order=("a",)), Store(tmp_path))
    attacks = [cell.key for cell in wanted if cell.stage == "attack"]
    assert attacks == [made[i]["attack"].key for i in (0, 2, 1, 3)]


@pytest.mark.parametrize(("given", "seconds"), [("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_a_budget_is_a_time(given: str, seconds: float) -> None:
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", ["", "30", "m", "-3m", "2 h", "1d"])
def test_anything_else_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        seconds_of(given)
    assert seconds_of("none") is None


def test_costs_are_those_of_the_same_attack(tmp_path: Path) -> None:
    made = [c["attack"] for c in chains("x")]
    records = compact_records([(made[0], attacked(0)), (made[1], {"wall_seconds": 8.0})])
    costs = Costs(Store(tmp_path, Committed(records)), made)
    assert costs.of(made[2]) == 6.0
    assert costs.of(Cell("attack", {"attack": "y"})) == 6.0
    assert costs.of(Cell("train", {})) is None
    assert costs.total([made[2], Cell("train", {})]) == (6.0, 1)
