"""The next supervisor goes on with the leased channels and queues of one that was killed, whatever else lies in the domain.

Where somebody goes in under the first supervisor, that one is stopped before, and then killed: what happens to who overruns is
the next one's doing.  Everything that holds a lease runs in forked children, so this process never is a client.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_channel
from support import PATIENCE, SHM, Child, Page, eventually
from test_enforcement import contracts, events, nobody_starts_a_supervisor, spin, start_server, state_of, stop
from test_precedence import waiting

import shlock
from shlock import Channel, Queue, _memory, _names, _process
from shlock import _layout as at

domain = test_channel.domain  # a fixture

LEASE, LONG, SIZE = 0.3, 60.0, 1000  # seconds, seconds, bytes
READY, GO, HELD, COME, OVER, OPENED, INSIDE = range(7)  # words of the page


def channel_of(domain: str, lease: float = LONG, privileged: bool = False) -> Channel:
    return Channel("channel", size=SIZE, domain=domain, privileged=privileged, lease=lease)


def queue_of(domain: str, lease: float = LONG) -> Queue:
    return Queue(name="queue", size=SIZE, domain=domain, lease=lease)


def begin_to_take(domain: str) -> Any:
    """With all contracts: of those for taking an item the first one is asked for when that is done."""
    queue = queue_of(domain, LEASE)
    with queue.take(timeout=PATIENCE) as item:
        assert item == b"0"
    return queue.take(timeout=PATIENCE)


WAYS: dict[str, Callable[[str], Any]] = {
    "reserve": lambda domain: channel_of(domain, LEASE).reserve(5, timeout=PATIENCE),
    "peek": lambda domain: channel_of(domain, LEASE).peek(timeout=PATIENCE),
    "take": begin_to_take,
}
"""Of these blocks somebody does not come out in time."""


def overrun(domain: str, page: Page, way: str, stay: Callable[[], None]) -> None:
    """Have a contract; when told to, go in and stay there."""
    block = WAYS[way](domain)
    page[READY] = 1
    eventually(lambda: page[GO])
    with block as view:
        if way == "reserve":
            view[:] = b"never"
        page[HELD] = 1
        stay()


def go_on(domain: str, page: Page, way: str) -> list[Any]:
    """Put two messages there; when told to, do what is in the way of who overruns.  What came out at last."""
    channel, queue = channel_of(domain), queue_of(domain)
    (channel if way == "reserve" else channel.other_end()).send_many([b"1", b"2"])
    queue.put_many([b"0"] * 2)
    with queue.take(timeout=PATIENCE), queue.take(timeout=PATIENCE):
        pass  # the contracts for taking an item while one is taken: a supervisor must be there for the first time
    queue.put_many([b"0", b"1", b"2"])
    page[OPENED] = 1
    eventually(lambda: page[COME])
    if way == "take":
        found: list[Any] = []
        for _ in range(2):
            with (taken := queue.take(timeout=PATIENCE)) as item:
                found.append((item, taken.deliveries))
        assert queue.empty()
        return found
    if way == "reserve":
        channel.send_bytes(b"after", timeout=PATIENCE)
    end = channel.other_end() if way == "reserve" else channel
    found = [end.recv_bytes(timeout=PATIENCE)]
    while end.poll():
        found.append(end.recv_bytes())
    return found


#: What that is, if who overran has left nothing behind.
EXPECTED = {"reserve": [b"1", b"2", b"after"], "peek": [b"1", b"2"], "take": [(b"2", 1), (b"1", 2)]}


def hold_and_wait(domain: str, page: Page, way: str, stay: Callable[[], None]) -> tuple[Child, Child, Child]:
    """A supervisor that is stopped, somebody who is inside, and somebody who waits for him."""
    first = start_server(domain)
    other = Child(go_on, domain, page, way)
    eventually(lambda: page[OPENED] or not other.is_alive())
    holder = Child(overrun, domain, page, way, stay)
    eventually(lambda: page[READY] or not holder.is_alive())
    first.stop()
    page[GO] = 1
    eventually(lambda: page[HELD] and (stay is not stop or state_of(holder.pid) in "TZ"))
    page[COME] = 1
    eventually(lambda: other.pid in waiting(domain), "the other one waits")
    return first, holder, other


def replace(domain: str, first: Child, not_before: float = 0.0) -> float:
    """Kill the supervisor and start the next one; when that was."""
    with nobody_starts_a_supervisor(domain):
        first.kill()
        eventually(lambda: time.monotonic() >= not_before)
        before = time.monotonic()
        start_server(domain)
    return before


@pytest.mark.parametrize("stay", [spin, stop], ids=lambda stay: stay.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_who_overruns_is_killed_by_the_next_supervisor_if_it_went_in_before(
    domain: str, way: str, stay: Callable[[], None]
) -> None:
    page = Page()
    first, holder, other = hold_and_wait(domain, page, way, stay)
    other.stop()  # or it would show its segment to the next one
    before = replace(domain, first, time.monotonic() + LEASE)
    (adopted,) = events(domain, "adopted")
    assert adopted["pid"] == holder.pid
    assert holder.wait() == -signal.SIGKILL
    assert time.monotonic() - before >= LEASE, "its time is over, but not that under this supervisor"
    other.go_on()
    assert other.result() == EXPECTED[way]
    (killed,) = events(domain, "killed")
    assert (killed["pid"], killed["reason"]) == (holder.pid, "lease overrun")
    assert killed["time"] - adopted["time"] >= LEASE * 0.5, "the event comes a moment after the adoption itself"


@pytest.mark.parametrize("way", WAYS)
def test_who_overruns_is_killed_by_the_next_supervisor_if_it_had_its_contract_before(domain: str, way: str) -> None:
    page = Page()
    first = start_server(domain)
    other = Child(go_on, domain, page, way)
    eventually(lambda: page[OPENED] or not other.is_alive())
    holder = Child(overrun, domain, page, way, spin)
    eventually(lambda: page[READY] or not holder.is_alive())
    replace(domain, first)
    page[GO] = 1
    eventually(lambda: page[HELD] or not holder.is_alive())
    page[COME] = 1
    assert holder.wait() == -signal.SIGKILL
    assert other.result() == EXPECTED[way]
    assert [(event["pid"], event["reason"]) for event in events(domain, "killed")] == [(holder.pid, "lease overrun")]


@pytest.mark.parametrize("way", WAYS)
def test_who_leaves_while_no_supervisor_runs_is_let_alone_by_the_next_one(domain: str, way: str) -> None:
    page = Page()
    first, holder, other = hold_and_wait(domain, page, way, lambda: eventually(lambda: page[OVER]))
    with nobody_starts_a_supervisor(domain):
        first.kill()
        page[OVER] = 1
        holder.result()
        start_server(domain)
    if way == "take":
        Child(lambda: queue_of(domain).put(b"3")).result()
    assert other.result() == {"reserve": [b"1", b"2", b"never", b"after"], "peek": [b"2"], "take": [(b"2", 1), (b"3", 1)]}[way]
    assert events(domain, "killed") == []


# -- what else may lie there ----------------------------------------------------------------------------------------------


def put_truncated(path: Path, good: Path) -> None:
    shutil.copyfile(good, path)
    os.truncate(path, path.stat().st_size - at.PAGE)


def put_a_piece(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:100])


def put_nothing(path: Path, good: Path) -> None:
    path.write_bytes(b"")


def put_zeros(path: Path, good: Path) -> None:
    path.write_bytes(bytes(good.stat().st_size))


def put_garbage(path: Path, good: Path) -> None:
    path.write_bytes(os.urandom(100_000))


def put_another_version(path: Path, good: Path) -> None:
    put_changed(path, good, {at.HEADER_VERSION: at.VERSION + 1})


def put_another_boot(path: Path, good: Path) -> None:
    put_changed(path, good, {at.HEADER_BOOT: 1})


def put_a_copy(path: Path, good: Path) -> None:
    """With the same identity, and the same owners in its words."""
    shutil.copyfile(good, path)


def put_changed(path: Path, good: Path, words: dict[int, int]) -> None:
    shutil.copyfile(good, path)
    with open(path, "r+b") as file:
        for place, word in words.items():
            file.seek(place * at.WORD)
            file.write(word.to_bytes(at.WORD, "little"))


def put_fifo(path: Path, good: Path) -> None:
    os.mkfifo(path)


def put_symlink(path: Path, good: Path) -> None:
    path.symlink_to(good)


def put_folder(path: Path, good: Path) -> None:
    path.mkdir()


def put_socket(path: Path, good: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


PUTS = [
    put_truncated, put_a_piece, put_nothing, put_zeros, put_garbage, put_another_version, put_another_boot, put_a_copy,
    put_fifo, put_symlink, put_folder, put_socket,
]  # fmt: skip


@pytest.fixture
def strangers(domain: str) -> Iterator[list[Path]]:
    """Where buffers of the domain could be: the one before, the other behind all others.  And one more segment of names."""
    names = _names.segment_name(domain)
    paths = [SHM / f"{names}={digit * 32}" for digit in "0f"] + [SHM / f"{names}+1"]
    yield paths
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def facts(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
def test_whatever_lies_among_its_segments_the_next_supervisor_enforces_the_others(
    domain: str, put: Callable[[Path, Path], None], strangers: list[Path]
) -> None:
    page = Page()
    first, holder, other = hold_and_wait(domain, page, "peek", stop)
    good = SHM / _memory.file_name(domain, "channel")
    for path in strangers:
        put(path, good)
    before = [facts(path) for path in strangers]
    other.stop()  # or it would show its segment to the next one
    replace(domain, first)
    assert holder.wait() == -signal.SIGKILL
    other.go_on()
    assert other.result() == EXPECTED["peek"]
    assert [(event["pid"], event["reason"]) for event in events(domain, "killed")] == [(holder.pid, "lease overrun")]
    assert [facts(path) for path in strangers] == before, "they are not ours to change"


def test_who_presents_its_contract_again_is_enforced_although_a_copy_of_the_segment_lies_there(
    domain: str, strangers: list[Path]
) -> None:
    """The contract is for the memory that this process uses, not for a copy that has its identity."""
    page = Page()
    first = start_server(domain)
    other = Child(go_on, domain, page, "peek")
    eventually(lambda: page[OPENED] or not other.is_alive())
    holder = Child(overrun, domain, page, "peek", spin)
    eventually(lambda: page[READY] or not holder.is_alive())
    for path in strangers[:2]:
        put_a_copy(path, SHM / _memory.file_name(domain, "channel"))
    replace(domain, first)
    eventually(lambda: {holder.pid, other.pid} <= {entry["pid"] for entry in contracts(domain)}, "they present their contracts")
    page[GO] = 1
    eventually(lambda: page[HELD] or not holder.is_alive())
    page[COME] = 1
    assert holder.wait() == -signal.SIGKILL
    assert other.result() == EXPECTED["peek"]


def test_what_was_made_without_a_supervisor_is_let_alone_by_the_next_one(domain: str) -> None:
    """Locks and buffers without leases: whoever is inside stays, and what the dead had is for others, as ever."""
    page = Page()

    def go_inside(name: str) -> None:
        lock = shlock.Lock(name, domain=domain, on_abandoned="ignore")
        block = shlock.Block(f"{name} block", size=SIZE, domain=domain)
        channel = Channel(f"{name} channel", size=SIZE, domain=domain)
        queue = Queue(name=f"{name} queue", domain=domain)
        channel.send_bytes(b"sent")
        queue.put(b"item")
        with lock, block.edit(), channel.reserve(5), channel.other_end().peek(), queue.take():
            page[INSIDE] += 1
            eventually(lambda: page[OVER], patience=2 * PATIENCE)

    def inherit(name: str) -> tuple[int, bytes, bytes]:
        with (lock := shlock.Lock(name, domain=domain, on_abandoned="ignore")):
            assert lock.abandoned is not None
            channel = Channel(f"{name} channel", domain=domain)
            channel.send_bytes(b"more", timeout=PATIENCE)
            with Queue(name=f"{name} queue", domain=domain).take(timeout=PATIENCE) as item:
                return lock.abandoned.pid, b" ".join(channel.other_end().recv_many(5)), item

    living, dead = (Child(go_inside, name) for name in ("living", "dead"))
    eventually(lambda: page[INSIDE] == 2 or not (living.is_alive() and dead.is_alive()))
    assert page[INSIDE] == 2
    first, holder, other = hold_and_wait(domain, page, "peek", stop)
    dead.kill()
    other.stop()  # or it would show its segment to the next one
    replace(domain, first)
    assert {event["pid"] for event in events(domain, "adopted")} == {holder.pid}
    assert holder.wait() == -signal.SIGKILL
    other.go_on()
    assert other.result() == EXPECTED["peek"]
    assert Child(inherit, "dead").result() == (dead.pid, b"sent more", b"item")
    assert living.is_alive()
    page[OVER] = 1
    living.result()
    assert [event["pid"] for event in events(domain, "killed")] == [holder.pid]


def test_a_buffer_whose_control_blocks_are_overwritten_keeps_the_next_supervisor_from_nothing(domain: str) -> None:
    page, seed = Page(), random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    damaged = Channel("damaged", size=SIZE, domain=domain)
    first, holder, other = hold_and_wait(domain, page, "peek", stop)
    words, layout = damaged._memory.arena.words, damaged._memory.arena.layout
    owners = [_process.make_word(child.pid, 1) for child in (holder, other)]
    for place in range(layout.block(0), layout.block(layout.blocks - 1) + at.BLOCK_WORDS):
        words.store(place, chance.choice((*owners, chance.getrandbits(64), 1 << chance.randrange(64))))
    for index in range(layout.blocks):
        kind = chance.choice((at.RWLOCK, at.CHANNEL, at.QUEUE, at.LOCK))
        words.store(layout.block(index) + at.BLOCK_KIND, kind | at.LEASED)
    other.stop()  # or it would show its segment to the next one
    replace(domain, first)
    assert holder.wait() == -signal.SIGKILL
    other.go_on()
    assert other.result() == EXPECTED["peek"]
    assert [event["pid"] for event in events(domain, "killed")] == [holder.pid]
