"""Cells are computed once, in order, and survive failures, kills and company."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.run.cells import ROOT, Cell, code_version, hash_json, in_order
from benchmarks.run.executor import Job, LocalExecutor
from benchmarks.run.grid import Status
from benchmarks.run.store import Store
from benchmarks.show.results import load_results
from tests.toy_grid import TOY, grid, toy

# The toy command knows no launch flags.
ALONE = dataclasses.replace(TOY, distributed=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def value_of(store: Store, cell: Cell) -> float:
    record = store.record(cell)
    assert record is not None
    return record["result"]["value"]


def test_key_ignores_the_order_of_flags_and_nothing_else() -> None:
    a = Cell("toy", {"value": 1, "sleep": 0})
    assert a.key == Cell("toy", {"sleep": 0, "value": 1}).key
    others = [
        Cell("toy", {"value": 2, "sleep": 0}),
        Cell("other", a.config),
        Cell("toy", a.config, code="x"),
        toy(add=a, value=1, sleep=0),
    ]
    assert len({cell.key for cell in [a, *others]}) == 5


def test_key_changes_with_what_it_needs() -> None:
    assert toy(add=toy(value=1)).key != toy(add=toy(value=2)).key


def test_hash_of_json_is_the_same_on_every_machine() -> None:
    # Stores are copied between machines, so this value must not change.
    assert hash_json({"b": [1, 2.5, None], "a": "ε"}) == hash_json({"a": "ε", "b": [1, 2.5, None]})
    assert hash_json({}) == "44136fa355b3678a"


def test_code_version_ignores_comments_and_docstrings(tmp_path: Path) -> None:
    file = tmp_path / "room" / "a.py"
    file.parent.mkdir()

    def version(source: str) -> str:
        file.write_text(source)
        code_version.cache_clear()
        return code_version(("room",), tmp_path)

    plain = version("def f():\n    return 1\n")
    assert version('"""Doc."""\ndef f():\n    "Doc."\n    # why\n    return 1\n') == plain
    assert version("def f():\n    return 2\n") != plain


def test_needs_come_first_and_once() -> None:
    base = toy(value=1)
    left, right = toy(add=base, value=2), toy(add=base, value=3)
    assert [c.key for c in in_order([right, left])] == [base.key, right.key, left.key]


def test_grid_runs_in_order_and_finds_its_results_again(store: Store, tmp_path: Path) -> None:
    runs = str(tmp_path / "runs")
    base = toy(value=1, runs=runs)
    cells = [toy(add=base, value=v, runs=runs) for v in (10, 20)]
    assert set(grid(cells, store).run().values()) == {Status.FINISHED}
    assert [value_of(store, cell) for cell in cells] == [11, 21]
    assert set(grid(cells, store).run().values()) == {Status.FOUND}
    assert len(Path(runs).read_text().splitlines()) == 3


@pytest.mark.parametrize("imports", [None, ["json"]], ids=["fresh", "warm"])
def test_failure_is_recorded_blocks_what_needs_it_and_is_retried_when_asked(
    store: Store, tmp_path: Path, imports: list[str] | None
) -> None:
    permit = tmp_path / "permit"
    broken = toy(value=1, fail_without=str(permit))
    dependent, healthy = toy(add=broken, value=2), toy(value=3)
    status = grid([dependent, healthy], store, imports=imports).run()
    assert status[broken.key] is Status.FAILED
    assert status[dependent.key] is Status.BLOCKED
    assert status[healthy.key] is Status.FINISHED
    failure = store.failure(broken)
    assert failure is not None
    assert "exit status 1: error: permit is missing" in failure["error"]

    permit.touch()
    assert grid([dependent], store).run()[broken.key] is Status.FAILED
    status = grid([dependent], store, retry_failed=True).run()
    assert set(status.values()) == {Status.FINISHED}
    assert value_of(store, dependent) == 3
    assert store.failure(broken) is None


def test_a_command_without_a_record_has_failed(store: Store) -> None:
    cell = toy(help=True)
    grid([cell], store).run()
    failure = store.failure(cell)
    assert failure is not None
    assert "wrote no record.json" in failure["error"]


def test_a_missing_input_file_is_a_failure_that_names_it(store: Store) -> None:
    base = toy(value=1)
    grid([base], store).run()
    (store.files(base) / "part" / "number.json").unlink()
    dependent = toy(add=base, value=1)
    assert grid([dependent], store).run()[dependent.key] is Status.FAILED
    assert "number.json" in (store.failure(dependent) or {})["error"]


def test_gpus_are_handed_out_in_turn(store: Store, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    cells = [toy(value=v, runs=str(runs), sleep=0.5) for v in range(3)]
    grid(cells, store, executor=LocalExecutor(3, gpus=["0", "5"])).run()
    assert sorted(line.split()[1] for line in runs.read_text().splitlines()) == ["0", "0", "5"]


def test_a_cell_of_several_processes_has_as_many_gpus_and_leaves_room_for_no_other(
    store: Store, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    cells = [toy(value=v, runs=str(runs), sleep=0.3, processes=p) for v, p in ((1, 2), (2, 1))]
    executor = LocalExecutor(2, gpus=["3", "4"])
    grid(cells, store, executor=executor, stages={"toy": ALONE}).run()
    assert [line.split()[1] for line in runs.read_text().splitlines()] == ["3,4", "3"]


@pytest.mark.parametrize("imports", [None, ("json",)])
def test_a_cell_that_takes_too_long_is_ended_and_goes_on_later(
    imports: tuple[str, ...] | None, store: Store, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    slow, quick = toy(value=1, sleep=60, runs=str(runs)), toy(value=2)
    limited = LocalExecutor(2, imports=imports, limit=4.0 if imports else 2.0)
    status = grid([slow, quick], store, executor=limited).run()
    assert status == {slow.key: Status.FAILED, quick.key: Status.FINISHED}
    assert "--cell-timeout" in (store.failure(slow) or {})["error"]
    # Its next run finds what it had saved; that of another failure does not.
    assert (store.files(slow) / "draft").exists()
    kept: list[bool] = []

    class Looks(LocalExecutor):
        def start(self, job: Job) -> None:
            kept.append((job.files / "draft").exists())
            super().start(job)

    grid([slow], store, executor=Looks(1, limit=1.0), retry_failed=True).run()
    assert kept == [True]


def test_results_are_a_data_frame(store: Store) -> None:
    grid([toy(value=1), toy(value=2)], store).run()
    frame = load_results(store.root)
    assert sorted(frame["result.value"]) == [1, 2]
    assert set(frame["stage"]) == {"toy"}
    assert sorted(frame["config.value"]) == [1, 2]


HARNESS = """
import signal
from pathlib import Path
signal.signal(signal.SIGTERM, signal.default_int_handler)
from benchmarks.run.store import Store
from tests.toy_grid import grid, toy
root = Path({root!r})
base = toy(value=1, sleep={sleep}, runs=str(root / "runs"))
cells = [toy(add=base, value=v, sleep={sleep}, runs=str(root / "runs")) for v in (10, 20)]
done = grid(cells, Store(root / "store"), imports={imports}).run()
print(sorted(s.value for s in done.values()))
"""
# Cells in new interpreters, and forked from a server.
FRESH, WARM = None, ["json"]


def start_harness(
    root: Path, sleep: float, imports: list[str] | None = FRESH
) -> subprocess.Popen[str]:
    code = HARNESS.format(root=str(root), sleep=sleep, imports=imports)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # A run in the background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if condition.exists() and len(condition.read_text().splitlines()) >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{condition.name} never had {lines} lines")


def test_two_processes_on_one_store_share_the_work(tmp_path: Path) -> None:
    both = [start_harness(tmp_path, 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert all(process.returncode == 0 for process in both)
    assert len((tmp_path / "runs").read_text().splitlines()) == 3
    statuses = "".join(outputs)
    assert statuses.count("finished") == statuses.count("found") == 3
    assert sorted(load_results(tmp_path / "store")["result.value"]) == [1, 11, 21]


@pytest.mark.parametrize(
    ("started", "imports"),
    [(1, FRESH), (2, FRESH), (2, WARM)],
    ids=["in the first cell", "in the last cells", "in the last cells, warm"],
)
def test_kill_minus_nine_loses_no_finished_cell(
    tmp_path: Path, started: int, imports: list[str] | None
) -> None:
    runs = tmp_path / "runs"
    victim = start_harness(tmp_path, 0.5, imports)
    wait_for(runs, started)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    # The command it had started goes on, keeps its cell locked, and is waited for.
    output, _ = start_harness(tmp_path, 0.5).communicate(timeout=60)
    assert "failed" not in output
    assert sorted(load_results(tmp_path / "store")["result.value"]) == [1, 11, 21]
    assert len(runs.read_text().splitlines()) == 3


@pytest.mark.parametrize("imports", [FRESH, WARM], ids=["fresh", "warm"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_running_commands(
    tmp_path: Path, number: signal.Signals, imports: list[str] | None
) -> None:
    harness = start_harness(tmp_path, 30, imports)
    wait_for(tmp_path / "runs", 1)
    harness.send_signal(number)
    assert harness.wait(timeout=20) != 0
    unlocked = Store(tmp_path / "store")
    cell = toy(value=1, sleep=30, runs=str(tmp_path / "runs"))
    with unlocked.locked(cell) as lock:
        assert lock is not None
    assert not unlocked.is_finished(cell)
    assert unlocked.failure(cell) is None
