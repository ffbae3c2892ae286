"""The same grid on a Ray cluster of two nodes, of which one dies."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run.executor import Outcome
from benchmarks.run.grid import Status
from benchmarks.run.store import Store
from benchmarks.show.results import load_results
from core.errors import InputError
from tests.toy_grid import TOY, grid, toy

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield started
    started.shutdown()


def executor(cluster: Any, **options: Any) -> Any:
    from benchmarks.run.ray_executor import RayExecutor

    return RayExecutor(address=cluster.address, code=("core", "training", "tests"), **options)


@pytest.mark.slow
def test_a_grid_survives_the_loss_of_a_node_with_the_same_numbers(
    cluster: Any, tmp_path: Path
) -> None:
    doomed = cluster.add_node(num_cpus=2)
    runs = tmp_path / "runs"
    base = toy(value=1, runs=str(runs))
    cells = [toy(add=base, value=v, sleep=6, runs=str(runs)) for v in (10, 20, 30, 40)]

    class KillsANode:
        """Forwards to the executor; once all four cells run, one node goes down."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.killed = False

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def poll(self) -> list[Outcome]:
            if not self.killed and runs.exists() and len(runs.read_text().splitlines()) == 5:
                self.killed = True
                cluster.remove_node(doomed, allow_graceful=False)
            return self._inner.poll()

    fragile = KillsANode(executor(cluster))
    status = grid(cells, Store(tmp_path / "ray"), executor=fragile).run()
    assert fragile.killed
    assert set(status.values()) == {Status.FINISHED}
    # Two of the cells ran on the lost node; one may have ended before the last began.
    assert len(runs.read_text().splitlines()) in (6, 7)

    grid(cells, Store(tmp_path / "local")).run()
    here, there = (load_results(tmp_path / name) for name in ("local", "ray"))
    assert list(here["key"]) == list(there["key"])
    assert list(here["result.value"]) == list(there["result.value"])


def test_what_a_cell_says_and_saves_arrives_while_it_runs(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.run import ray_worker

    monkeypatch.setattr(ray_worker, "SAVE_SECONDS", 0.5)
    cell = toy(value=1, sleep=6)
    store = Store(tmp_path / "store")
    heard: list[str] = []

    class Listens:
        """Forwards to the executor; notes what has arrived before the cell ends."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def poll(self) -> list[Outcome]:
            ended = self._inner.poll()
            if not ended and store.log(cell).exists() and (store.files(cell) / "draft").exists():
                heard.append(store.log(cell).read_text())
            return ended

    grid([cell], store, executor=Listens(executor(cluster))).run()
    assert heard
    assert "working" in heard[-1]
    assert store.log(cell).read_text().count("working") == 1


def test_data_travels_and_failures_come_back(cluster: Any, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    data.mkdir()
    for name in ("a.png", "b.png"):
        (data / name).write_bytes(b"x")
    sees_data = toy(value=1, data="photos@1")
    broken = toy(value=1, fail_without=str(tmp_path / "absent"))
    store = Store(tmp_path / "store")
    remote = executor(cluster, jobs=2)
    status = grid([sees_data, broken], store, executor=remote, data={"photos@1": str(data)}).run()
    assert status[broken.key] is Status.FAILED
    assert "absent is missing" in (store.failure(broken) or {})["error"]
    record = store.record(sees_data)
    assert record is not None
    assert record["result"]["value"] == 3


def test_warm_cells_are_forked_and_late_ones_ended(cluster: Any, tmp_path: Path) -> None:
    """A worker imports once; what takes longer than its limit goes on later."""
    runs = tmp_path / "runs"
    cells = [toy(value=v, runs=str(runs)) for v in range(4)]
    slow = toy(value=9, sleep=60, runs=str(runs))
    store = Store(tmp_path / "store")
    remote = executor(cluster, imports=("json",), limit=8.0)
    status = grid([*cells, slow], store, executor=remote).run()
    assert status.pop(slow.key) is Status.FAILED
    assert set(status.values()) == {Status.FINISHED}
    assert "--cell-timeout" in (store.failure(slow) or {})["error"]
    assert (store.files(slow) / "draft").exists()
    values = [(store.record(cell) or {})["result"]["value"] for cell in cells]
    assert values == [0, 1, 2, 3]


def test_a_cell_of_more_processes_than_any_node_has_cores_is_not_waited_for_for_ever(
    cluster: Any, tmp_path: Path
) -> None:
    cell = toy(value=1, processes=64)
    stages = {"toy": dataclasses.replace(TOY, distributed=False)}
    status = grid([cell], Store(tmp_path), executor=executor(cluster), stages=stages).run()
    assert status[cell.key] is Status.FINISHED


def test_without_an_address_no_cluster_of_others_is_joined(tmp_path: Path) -> None:
    """Ray has noted a cluster that was started here before, and is gone."""
    from benchmarks.run.ray_executor import RayExecutor

    noted = Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    noted.parent.mkdir(exist_ok=True)
    noted.write_text("127.0.0.1:1")
    try:
        remote = RayExecutor(code=("core", "training", "tests"))
        cell = toy(value=1)
        assert grid([cell], Store(tmp_path), executor=remote).run()[cell.key] is Status.FINISHED
    finally:
        noted.unlink()
        ray.shutdown()


def test_more_gpus_than_the_cluster_has_are_refused(cluster: Any) -> None:
    with pytest.raises(InputError, match=r"--gpus-per-cell 0\.5: the cluster has 0 GPUs"):
        executor(cluster, gpus_per_cell=0.5)
    ray.shutdown()
