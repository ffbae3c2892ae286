"""A folder belongs to one living run, and what the dead left there goes."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.run import ray_worker
from core.errors import InputError
from core.locks import (
    Owner,
    check_unlocked,
    locked,
    owner_of,
    remove_left_behind,
    temporary_prefix,
)
from core.storage import atomic_file, write_text


def test_a_second_run_is_told_whose_the_folder_is(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with locked(path, "--root: run"):
        sentence = f"--root: run is in use by process {os.getpid()} on "
        with pytest.raises(InputError, match=sentence), locked(path, "--root: run"):
            pass
        assert owner_of(path) is not None
    assert not path.exists()
    with locked(path, "--root: run"):
        pass


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


ME = Owner.this()
LOCKS = {
    "dead": (lambda: dataclasses.replace(ME, pid=ended_process()), True),
    "another process of that number": (lambda: dataclasses.replace(ME, born="1"), True),
    "living parent": (lambda: Owner(os.getppid(), ME.host, _born(os.getppid())), False),
    "another machine": (lambda: dataclasses.replace(ME, pid=1, host="elsewhere"), False),
}


def _born(pid: int) -> str:
    """Field 22 of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", LOCKS)
def test_only_a_dead_owner_loses_its_lock(case: str, tmp_path: Path) -> None:
    make, is_free = LOCKS[case]
    path, owner = tmp_path / ".lock", make()
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    if is_free:
        check_unlocked(path, "--root")
        with locked(path, "--root"):
            found = owner_of(path)
            assert found is not None
            assert found.pid == os.getpid()
        return
    for attempt in (lambda: check_unlocked(path, "--root"), locked(path, "--root").__enter__):
        with pytest.raises(InputError, match=f"process {owner.pid} on {owner.host}"):
            attempt()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": "1"}', '{"pid": -1, "host": "x"}', '{"pid": 1, "host": 2}']
)
def test_a_damaged_lock_locks_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(text)
    with locked(path, "--root"):
        assert owner_of(path) is not None


def take(path: Path, counts: Path, n: int) -> None:
    for _ in range(n):
        with locked(path, "--root", wait=60):
            count = int(counts.read_text())
            counts.write_text(str(count + 1))


def test_of_several_processes_one_at_a_time_has_it(tmp_path: Path) -> None:
    """Each adds to a number that it reads first; two at once would lose one."""
    counts, fork = tmp_path / "count", multiprocessing.get_context("fork")
    counts.write_text("0")
    processes = [fork.Process(target=take, args=(tmp_path / ".lock", counts, 5)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert counts.read_text() == "15"


def killed_while_writing(path: Path) -> None:
    with atomic_file(path, "w") as file:
        file.write("half")
        file.flush()
        os.kill(os.getpid(), 9)


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(
        target=killed_while_writing, args=(tmp_path / "record.json",)
    )
    killed.start()
    killed.join()
    (half,) = tmp_path.iterdir()
    kept = [tmp_path / f"{temporary_prefix('.record.json.')}abc", tmp_path / ".record.json.abcd"]
    for path in kept:
        path.write_text("x")
    # The next run need not know of it.
    with atomic_file(tmp_path / "other.json", "w") as file:
        assert not half.exists()
        half.write_text("x")
        assert remove_left_behind(tmp_path) == [half]
        file.write("whole")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "other.json"])
    assert remove_left_behind(tmp_path / "missing") == []


def test_folders_of_killed_workers_go(tmp_path: Path) -> None:
    dead, alive = ended_process(), os.getpid()
    names = {
        f"gradinvbench-cell-{dead}-ab_c": True,
        f"gradinvbench-code-0-12ab.{dead}-x": True,
        f"gradinvbench-cell-{alive}-abc": False,
        f"gradinvbench-code-0-12ab.{alive}-x": False,
        "gradinvbench-code-0-12ab": False,
        "another": False,
    }
    for name in names:
        write_text(tmp_path / name / "file", "x")
    ray_worker.remove_left_behind(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        n for n, gone in names.items() if not gone
    }


def test_hidden_files_do_not_travel(tmp_path: Path) -> None:
    for name in ("a/record.json", "a/.lock", "a/.record.json.x", ".lock"):
        write_text(tmp_path / "from" / name, "x")
    ray_worker.unpack(ray_worker.pack(tmp_path / "from"), tmp_path / "to")
    files = [str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*")]
    assert sorted(files) == ["a", "a/record.json"]


@pytest.mark.parametrize("filters", [True, False])
def test_what_leaves_its_folder_is_not_unpacked(
    filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    write_text(tmp_path / "from" / "a" / "record.json", "x")
    ray_worker.unpack(ray_worker.pack(tmp_path / "from"), tmp_path / "to")
    assert (tmp_path / "to" / "a" / "record.json").read_text() == "x"
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    for member in (tarfile.TarInfo("../outside"), link):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.addfile(member)
        with pytest.raises(tarfile.TarError):
            ray_worker.unpack(buffer.getvalue(), tmp_path / "to")
    assert not (tmp_path / "outside").exists()


def test_a_new_name_is_on_the_disk_before_anybody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replaced(source: str, target: Path) -> None:
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_text(tmp_path / "x", "whole")
    assert done == ["file", "name", "folder"]
