"""Ranks compare what they were told, and notice who does not come or falls silent."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from core.errors import InputError, RankError
from core.processes.meeting import Address, Meeting, Watch, host_store, join_store, told_value


@pytest.fixture
def address() -> Iterator[Address]:
    store, address = host_store(Address("tcp://127.0.0.1:0"))
    yield address
    del store


def agreed(address: Address, told: list[Mapping[str, str]], world_size: int) -> list[str]:
    """What each rank that is there says in the end."""

    def attend(rank: int) -> str:
        store = join_store(address, world_size, 20, rank)
        try:
            Meeting(store, rank, world_size, timeout=1.0).agree(told[rank])
        except (InputError, RankError) as error:
            return f"{type(error).__name__}: {error}"
        return "agreed"

    with ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(attend, range(len(told))))


def test_ranks_that_were_told_the_same_agree(address: Address) -> None:
    assert agreed(address, [{"--lr": "0.1"}] * 3, 3) == ["agreed"] * 3


def test_every_rank_names_the_flag_and_the_ranks(address: Address) -> None:
    said = agreed(address, [{"--lr": "0.1", "-b": "4"}, {"--lr": "0.2", "-b": "4"}], 2)
    sentence = "InputError: --lr: rank 0 was started with 0.1, rank 1 with 0.2; "
    assert [line.startswith(sentence) for line in said] == [True, True]


def test_an_absent_rank_is_named(address: Address, caplog: pytest.LogCaptureFixture) -> None:
    said = agreed(address, [{}, {}], 4)
    assert (
        said
        == ["RankError: ranks 2, 3 did not come within 1 s (--timeout); 4 ranks were announced"] * 2
    )
    # One of those who wait says so before.
    assert [record.message for record in caplog.records] == ["waiting for ranks 2, 3 to start"]


def test_a_rank_that_is_taken_twice(address: Address) -> None:
    meetings = [Meeting(join_store(address, 2, 20, 0), 0, 2, timeout=0.5) for _ in range(2)]
    with pytest.raises(RankError, match="rank 1 did not come"):
        meetings[0].agree({})
    with pytest.raises(InputError, match="rank 0 was started twice"):
        meetings[1].agree({})


class Watched:
    """A rank with its watch, and what the watch says."""

    def __init__(self, address: Address, rank: int, timeout: float = 1.0) -> None:
        self.lost: list[str] = []
        meeting = Meeting(join_store(address, 2, 20, rank), rank, 2, timeout)
        self.watch = Watch(meeting, self.lost.append)
        self.watch.start()


def test_a_rank_without_a_sign_of_life_is_named_and_then_lost(
    address: Address, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = [Watched(address, rank) for rank in range(2)]
    time.sleep(1.5)
    assert [rank.lost for rank in ranks] == [[], []]
    ranks[1].watch.end()
    until = time.monotonic() + 20
    while not ranks[0].lost and time.monotonic() < until:
        time.sleep(0.05)
    assert ranks[0].lost == ["rank 1 gave no sign of life for 1 s (--timeout)"]
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert said == ["waiting for rank 1: no sign of life for 0.5 s"]


def test_who_was_stopped_itself_blames_nobody(address: Address) -> None:
    """A suspended terminal stops all ranks; none has heard of the others then."""
    meeting = Meeting(join_store(address, 2, 20, 0), 0, 2, 100.0)
    watch = Watch(meeting, lambda sentence: None)
    meeting.store.set("alive/1", "1")
    assert watch._look(1.0) is None
    every = 2.0
    assert watch._look(min(1000.0, 2 * every)) is None
    assert watch._silent == {1: 4.0}
    watch._silent[1] = 101.0
    assert watch._judged() == "rank 1 gave no sign of life for 100 s (--timeout)"


def test_a_lost_store_is_said(address: Address) -> None:
    store, own = host_store(Address("tcp://127.0.0.1:0"))
    watched = Watched(own, 0)
    del store
    until = time.monotonic() + 20
    while not watched.lost and time.monotonic() < until:
        time.sleep(0.05)
    assert watched.lost == ["the ranks can no longer reach rank 0's node (--dist-url)"]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of another program that answers nothing."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_said_at_once(taken: int) -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match=f":{taken}: the port is in use"):
        host_store(Address(f"tcp://127.0.0.1:{taken}"))
    assert time.monotonic() - begun < 10


def test_another_program_at_the_port_of_rank_0(taken: int) -> None:
    with pytest.raises(RankError, match="what answers there is not rank 0"):
        join_store(Address(f"tcp://127.0.0.1:{taken}"), 2, 0.5, 1)


def test_nobody_at_the_port_of_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RankError, match=r"rank 3 waited 1\.2 s for rank 0, and nobody listens"):
        join_store(Address(url), 4, 1.2, 3)
    assert [r.message for r in caplog.records] == [f"rank 3 waits for rank 0 at {url}"]


@pytest.mark.parametrize("url", ["127.0.0.1:1", "tcp://host", "tcp://:1", "tcp://h:70000", "x"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match="expected tcp://HOST:PORT"):
        Address(url).check()


def test_a_file_counts_by_its_content_and_a_folder_by_its_names(tmp_path: Path) -> None:
    for node, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / node / content).mkdir(parents=True)
        (tmp_path / node / "file").write_text(content)
    files = [told_value(str(tmp_path / node / "file")) for node in "abc"]
    folders = [told_value(str(tmp_path / node)) for node in "abc"]
    for one, same, other in (files, folders):
        assert one == same != other
    assert told_value("photo-patches") == "'photo-patches'"
    assert told_value([1, 2.5]) == "[1, 2.5]"
    assert told_value(print) is None
    assert told_value("x\0y") == repr("x\0y").replace("\\x00", "\0")


def test_threads_end_with_the_watch(address: Address) -> None:
    before = threading.active_count()
    watched = Watched(address, 0)
    watched.watch.end()
    assert threading.active_count() == before
    assert isinstance(watched.watch._meeting.store, dist.TCPStore)
