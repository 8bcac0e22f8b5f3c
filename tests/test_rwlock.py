"""RWLock: who may be inside with whom, who goes first, what is refused, and what it shows of itself."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import (
    PATIENCE,
    Child,
    Page,
    end_process,
    eventually,
    supervisor_of,
)
from test_enforcement import spin
from test_signals import Interruption, InThread, NoOperands, Trial, interrupt_everywhere

import shlock
from shlock import _atomic, _parking, _sys, snapshot
from shlock import _layout as at

LONG, SHORT = 60.0, 0.05
READING, WRITING, WRONG, GO, DONE = range(5)

INSIDE: dict[str, Callable[[shlock.RWLock], Any]] = {"read": shlock.RWLock.read, "write": shlock.RWLock.write}
inside = pytest.mark.parametrize("how", INSIDE)


@pytest.fixture
def domain(domain: str) -> Iterator[str]:
    """As everywhere; its supervisor ends with the test."""
    yield domain
    pid = supervisor_of(domain)
    if pid is not None:
        end_process(pid, signal.SIGTERM)


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 10_000.0)


def hold(rwlock: shlock.RWLock, how: str, page: Page, word: int, until: int = GO) -> None:
    """Be inside until the page says so."""
    with INSIDE[how](rwlock):
        page[word] += 1
        eventually(lambda: page[until])


def is_refused(rwlock: shlock.RWLock, how: str, timeout: float | None = 0.0) -> bool:
    with contextlib.suppress(TimeoutError), getattr(rwlock, how)(timeout):
        return False
    return True


def assert_free(rwlock: shlock.RWLock) -> None:
    assert not rwlock.locked(), repr(rwlock)
    assert rwlock.readers == 0
    assert rwlock.owner is None
    assert rwlock.waiters == ()
    words = rwlock._words
    assert words.view[words.word] & ~at.PARKED == 0
    assert words.view[words.gate] & ~at.CROWDED == 0
    assert not any(words.view[place] for place, _ in words.cells)
    for how in INSIDE:
        assert not is_refused(rwlock, how)


# -- who is inside with whom ----------------------------------------------------------------------------------------------


def test_readers_are_inside_together() -> None:
    rwlock, page = shlock.RWLock(), Page()
    readers = [Child(hold, rwlock, "read", page, word) for word in (8, 9, 10)]
    eventually(lambda: page[8] and page[9] and page[10])
    assert rwlock.readers == 3
    assert rwlock.locked()
    assert rwlock.owner is None
    page[GO] = 1
    for reader in readers:
        reader.result()
    assert_free(rwlock)


@pytest.mark.parametrize(("first", "second"), [("read", "write"), ("write", "read"), ("write", "write")])
def test_a_writer_is_inside_alone(first: str, second: str) -> None:
    rwlock, page = shlock.RWLock(), Page()
    child = Child(hold, rwlock, first, page, READING)
    eventually(lambda: page[READING])
    assert is_refused(rwlock, second)
    assert is_refused(rwlock, second, SHORT)
    assert child.is_alive()
    page[GO] = 1
    with getattr(rwlock, second)(PATIENCE):
        child.result()
    assert_free(rwlock)


def use(rwlock: shlock.RWLock, page: Page, number: int, rounds: int) -> None:
    """Be inside again and again, and note who else is.  The page has words for each process, so that nobody has to add."""
    mine = 8 + number
    for turn in range(rounds):
        if (turn + number) % 3:
            with rwlock.read():
                page[mine] = READING + 1
                page[WRONG] += any(page[word] == WRITING + 1 for word in range(8, 16))
                page[mine] = 0
        else:
            with rwlock.write():
                page[mine] = WRITING + 1
                page[WRONG] += any(page[word] for word in range(8, 16) if word != mine)
                page[DONE] += 1
                page[mine] = 0


def test_no_writer_is_ever_inside_with_anybody() -> None:
    rwlock, page = shlock.RWLock(), Page()
    children = [Child(use, rwlock, page, number, 600) for number in range(4)]
    for child in children:
        child.result()
    assert page[WRONG] == 0
    assert page[DONE] == 4 * 200, "writers overwrote each other's count"
    assert_free(rwlock)


def test_no_writer_is_ever_inside_with_anybody_when_there_are_threads_and_too_few_records() -> None:
    rwlock, page = shlock.RWLock(readers=2), Page()

    def start(first: int) -> None:
        threads = [InThread(lambda number=number: use(rwlock, page, number, 200)) for number in (first, first + 1, first + 2)]
        for thread in threads:
            thread.result()

    children = [Child(start, first) for first in (0, 3)]
    for child in children:
        child.result()
    assert page[WRONG] == 0
    assert_free(rwlock)


# -- who goes first -------------------------------------------------------------------------------------------------------


def test_new_readers_wait_when_a_writer_waits(no_polling: None) -> None:
    rwlock, page = shlock.RWLock(), Page()
    order: list[str] = []

    def go_in(how: str) -> None:
        with INSIDE[how](rwlock):
            order.append(how)

    reader = Child(hold, rwlock, "read", page, READING)
    eventually(lambda: page[READING])
    writer = InThread(lambda: go_in("write"))
    eventually(lambda: writer.is_parked_at(rwlock))
    late = InThread(lambda: go_in("read"))
    eventually(lambda: late.is_parked_at(rwlock))
    assert is_refused(rwlock, "read")
    page[GO] = 1
    writer.result(), late.result(), reader.result()
    assert order == ["write", "read"]
    assert_free(rwlock)


def test_a_reader_that_waits_goes_in_before_the_writers_that_wait(no_polling: None) -> None:
    rwlock = shlock.RWLock()
    order: list[str] = []

    def go_in(how: str) -> None:
        with INSIDE[how](rwlock):
            order.append(how)

    for _ in range(20):
        with rwlock.write():
            writers = [InThread(lambda: go_in("write")) for _ in range(2)]
            eventually(lambda writers=writers: all(writer.is_parked_at(rwlock) for writer in writers))
            reader = InThread(lambda: go_in("read"))
            eventually(lambda reader=reader: reader.is_parked_at(rwlock))
        for thread in (*writers, reader):
            thread.result()
        assert order == ["read", "write", "write"]
        order.clear()
    assert_free(rwlock)


@pytest.mark.parametrize(("many", "one"), [("read", "write"), ("write", "read")])
def test_a_stream_of_some_does_not_keep_out(many: str, one: str) -> None:
    rwlock, page = shlock.RWLock(), Page()

    def stream(word: int) -> None:
        while not page[GO]:
            with INSIDE[many](rwlock):
                page[word] += 1

    streams = [Child(stream, word) for word in (8, 9)]
    eventually(lambda: page[8] and page[9])
    for _ in range(20):
        with getattr(rwlock, one)(PATIENCE):
            pass
    page[GO] = 1
    for child in streams:
        child.result()
    assert_free(rwlock)


def test_a_thread_reads_again_while_a_writer_waits(no_polling: None) -> None:
    rwlock = shlock.RWLock()
    with rwlock.read():
        writer = InThread(lambda: is_refused(rwlock, "write", None))
        eventually(lambda: writer.is_parked_at(rwlock))
        with rwlock.read(), rwlock.read(0):
            assert rwlock.readers == 1
        assert rwlock.readers == 1
        assert not writer.is_over()
    writer.result()
    assert_free(rwlock)


def test_readers_wait_for_a_record_when_all_are_taken(no_polling: None) -> None:
    rwlock, page = shlock.RWLock(readers=2), Page()
    first = Child(hold, rwlock, "read", page, 8, 8 + GO)
    second = Child(hold, rwlock, "read", page, 9, 9 + GO)
    eventually(lambda: page[8] and page[9])
    assert is_refused(rwlock, "read")
    thirds = [InThread(lambda: rwlock.read().__enter__() or rwlock.read().__exit__()) for _ in range(3)]
    eventually(lambda: all(third.is_parked_at(rwlock) for third in thirds))
    page[8 + GO] = 1
    first.result()
    for third in thirds:
        third.result()
    page[9 + GO] = 1
    second.result()
    assert_free(rwlock)


# -- at the door ----------------------------------------------------------------------------------------------------------


def before_record(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Call something when the calling thread has seen that nobody writes, and is about to take its record."""
    exchange, thread, actions = _atomic.Operand.compare_exchange, threading.get_ident(), [action]

    def compare_exchange(operand: Any, word: Any, expected: int, desired: int) -> bool:
        if actions and threading.get_ident() == thread:
            actions.pop()()
        return exchange(operand, word, expected, desired)

    monkeypatch.setattr(_atomic.Operand, "compare_exchange", compare_exchange)


def test_a_reader_waits_for_a_writer_that_had_looked_for_readers_just_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rwlock = shlock.RWLock()
    is_inside, go = threading.Event(), threading.Event()

    def write() -> None:
        with rwlock.write():
            is_inside.set()
            assert go.wait(PATIENCE)

    writers: list[InThread] = []

    def let_writer_in() -> None:
        writers.append(InThread(write))
        assert is_inside.wait(PATIENCE)

    before_record(monkeypatch, let_writer_in)
    with pytest.raises(TimeoutError), rwlock.read(SHORT):
        pass
    go.set()
    writers[0].result()
    assert_free(rwlock)


def test_a_writer_waits_for_a_reader_that_has_a_record_and_has_not_looked_yet() -> None:
    rwlock = shlock.RWLock()
    refused: list[bool] = []

    def at_point(label: str) -> None:
        if label == "C50 record taken":
            _sys.crash_points.clear()
            refused.append(is_refused_in_thread(rwlock, "write"))

    _sys.crash_points[:] = [at_point]
    with rwlock.read():
        assert refused == [True]
    assert_free(rwlock)


def test_a_reader_that_steps_back_into_the_line_wakes_the_writer_that_waited_for_it(
    monkeypatch: pytest.MonkeyPatch, no_polling: None
) -> None:
    rwlock = shlock.RWLock()
    order: list[str] = []
    is_inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with rwlock.read():
            is_inside.set()
            assert leave.wait(PATIENCE)

    def write() -> None:
        with rwlock.write():
            order.append("write")

    def close_the_door() -> None:
        threads.append(InThread(write))
        eventually(lambda: rwlock.waiters)
        _sys.crash_points[:] = [let_reader_leave]

    def let_reader_leave(label: str) -> None:
        if label == "C50 record taken" and threading.get_ident() == main:
            _sys.crash_points.clear()
            leave.set()
            threads[0].result()
            eventually(lambda: rwlock.waiters)  # it looked again, and waits for us now

    main, threads = threading.get_ident(), [InThread(read)]
    assert is_inside.wait(PATIENCE)
    before_record(monkeypatch, close_the_door)
    with rwlock.read():
        order.append("read")
    threads[1].result()
    assert order == ["write", "read"]
    assert_free(rwlock)


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outer", "inner", "fact"),
    [
        ("read", "write", "this thread reads, and would have to wait for itself to write: leave the read first"),
        ("write", "read", "this thread writes, and would have to wait for itself to read: leave the write first"),
        ("write", "write", "this thread writes already, and it is not recursive"),
    ],
)
def test_what_would_wait_for_itself_is_refused(outer: str, inner: str, fact: str, domain: str) -> None:
    rwlock = shlock.RWLock("table", domain=domain)
    same = shlock.RWLock("table", domain=domain)
    with INSIDE[outer](rwlock):
        for again in (rwlock, same):
            with pytest.raises(RuntimeError, match=f"RWLock 'table': {fact}"), INSIDE[inner](again):
                pass
        assert rwlock.locked()
    assert_free(rwlock)


def test_two_threads_of_a_process_are_two_readers() -> None:
    rwlock = shlock.RWLock()
    with rwlock.read():
        assert InThread(lambda: is_refused(rwlock, "write")).result()
        assert not InThread(lambda: is_refused(rwlock, "read")).result()
    with rwlock.write():
        assert InThread(lambda: is_refused(rwlock, "read")).result()
        assert InThread(lambda: is_refused(rwlock, "write")).result()
    assert_free(rwlock)


def test_a_read_is_left_by_the_thread_that_began_it() -> None:
    rwlock = shlock.RWLock()
    reading = rwlock.read()
    with pytest.raises(RuntimeError, match="this thread does not read"):
        reading.__exit__()
    with reading:
        with pytest.raises(RuntimeError, match="this thread does not read"):
            InThread(lambda: reading.__exit__()).result()
        assert rwlock.readers == 1
    assert_free(rwlock)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"readers": 0}, ValueError), ({"readers": -1}, ValueError), ({"readers": 1 << 20}, ValueError),
        ({"readers": True}, TypeError), ({"readers": 2.0}, TypeError), ({"on_abandoned": "panic"}, ValueError),
        ({"grace": 1.0}, ValueError), ({"rank": 1}, ValueError),
        ({"operations": ("read",)}, ValueError), ({"domain": "d"}, ValueError), ({"name": ""}, ValueError),
        ({"name": "n", "domain": "/machine"}, ValueError),
    ],
)  # fmt: skip
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        shlock.RWLock(**options)


@inside
def test_a_timeout_that_is_not_a_number_is_refused(how: str) -> None:
    rwlock = shlock.RWLock()
    with pytest.raises(ValueError, match="NaN"), getattr(rwlock, how)(math.nan):
        pass
    assert_free(rwlock)


@inside
def test_who_gives_up_is_told_by_whom_it_is_held(how: str) -> None:
    rwlock, page = shlock.RWLock(), Page()
    child = Child(hold, rwlock, "write", page, WRITING)
    eventually(lambda: page[WRITING])
    waiting = getattr(rwlock, how)(SHORT)
    with pytest.raises(TimeoutError, match=rf"RWLock without a name .*: not within 0.05 s; pid {child.pid} has it"), waiting:
        pass
    page[GO] = 1
    child.result()
    with rwlock.read(), pytest.raises(TimeoutError, match="not within 0 s; 1 read"):
        InThread(lambda: rwlock.write(0).__enter__()).result()
    assert_free(rwlock)


# -- names, and other processes -------------------------------------------------------------------------------------------


def test_a_name_is_one_lock_with_as_many_readers_as_it_was_made_for(domain: str) -> None:
    rwlock = shlock.RWLock("table", domain=domain, readers=5)
    again = shlock.RWLock("table", domain=domain)
    assert len(again._words.cells) == 5
    shlock.RWLock("table", domain=domain, readers=5)
    for readers in (4, 64):
        with pytest.raises(shlock.SegmentError, match=r"5 readers there, and .* wanted"):
            shlock.RWLock("table", domain=domain, readers=readers)
    with pytest.raises(shlock.SegmentError, match="an RWLock of 5 readers there, and a Lock is wanted"):
        shlock.Lock("table", domain=domain)
    with rwlock.read():
        assert again.readers == 1
    assert len(shlock.RWLock("other", domain=domain)._words.cells) == 64
    shlock.RWLock("other", domain=domain, readers=64)
    assert_free(again)


@pytest.mark.parametrize("readers", [1, 14, 15, 28, 29, 200])
def test_as_many_may_read_as_there_are_records(readers: int) -> None:
    rwlock = shlock.RWLock(readers=readers)
    ready, go = threading.Barrier(readers + 1), threading.Event()

    def read() -> None:
        with rwlock.read():
            ready.wait(PATIENCE)
            go.wait(PATIENCE)

    threads = [InThread(read) for _ in range(readers)]
    ready.wait(PATIENCE)
    assert rwlock.readers == readers
    assert is_refused(rwlock, "read")
    go.set()
    for thread in threads:
        thread.result()
    assert_free(rwlock)


def read_and_write(rwlock: shlock.RWLock) -> tuple[bool, bool, int]:
    with rwlock.read():
        readers = rwlock.readers
    return is_refused(rwlock, "read"), is_refused(rwlock, "write"), readers


def _in_process(rwlock: shlock.RWLock, answers: Any) -> None:
    answers.put(read_and_write(rwlock))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("name", [None, "table"])
def test_it_goes_to_processes_however_they_start(method: str, name: str | None, domain: str) -> None:
    context = multiprocessing.get_context(method)
    rwlock = shlock.RWLock(name, domain=domain if name else None)
    answers = context.SimpleQueue()
    with rwlock.read():
        process = context.Process(target=_in_process, args=(rwlock, answers))
        process.start()
        assert answers.get() == (False, True, 2)
        process.join()
    assert process.exitcode == 0
    assert_free(rwlock)


def test_one_with_a_name_can_be_pickled_and_one_without_only_while_a_process_is_spawned(domain: str) -> None:
    copy = pickle.loads(pickle.dumps(shlock.RWLock("table", domain=domain)))
    assert copy.name == "table"
    with copy.read():
        assert shlock.RWLock("table", domain=domain).readers == 1
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(shlock.RWLock())


@inside
def test_a_child_that_is_forked_inside_holds_nothing(how: str) -> None:
    rwlock, page = shlock.RWLock(), Page()

    def in_child(holding: Any) -> tuple[bool, bool]:
        refused = is_refused(rwlock, "read"), is_refused(rwlock, "write")
        holding.__exit__(None, None, None)
        page[DONE] = rwlock.readers
        with contextlib.suppress(TimeoutError), rwlock.read(0):
            page[DONE] += 10
        return refused

    holding = INSIDE[how](rwlock)
    with holding:
        assert Child(in_child, holding).result() == (how == "write", True)
        assert page[DONE] == (11 if how == "read" else 0), "the child left for its parent"
        assert rwlock.readers == (how == "read")
        assert rwlock.locked()
    assert_free(rwlock)


def test_blocks_without_a_name_are_used_again() -> None:
    arena = shlock.RWLock()._block.arena
    used = {shlock.RWLock()._block.index for _ in range(400)}
    assert len(used) < 40
    assert shlock.RWLock()._block.arena is arena


# -- after a death --------------------------------------------------------------------------------------------------------


def die_inside(rwlock: shlock.RWLock, how: str) -> Child:
    page = Page()
    child = Child(hold, rwlock, how, page, READING)
    eventually(lambda: page[READING])
    child.kill()
    return child


@contextlib.contextmanager
def told() -> Iterator[list[int]]:
    """The processes of whose death somebody is told inside."""
    pids: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield pids
    pids += [int(str(warning.message).split("owner pid ")[1].split()[0]) for warning in caught]


@inside
def test_everybody_is_told_of_a_dead_writer_until_a_writer_has_left(how: str) -> None:
    rwlock = shlock.RWLock()
    child = die_inside(rwlock, "write")
    for _ in range(2):
        with told() as pids, rwlock.read(PATIENCE):
            assert rwlock.abandoned is not None
            assert rwlock.abandoned.pid == child.pid
        assert pids == [child.pid]
    with told() as pids, rwlock.write(PATIENCE):
        assert rwlock.abandoned is not None
    assert pids == [child.pid]
    with told() as pids, INSIDE[how](rwlock):
        assert rwlock.abandoned is None
    assert pids == []
    assert_free(rwlock)


@inside
def test_who_does_not_wait_finds_a_dead_writer_too(how: str) -> None:
    rwlock = shlock.RWLock(on_abandoned="ignore")
    die_inside(rwlock, "write")
    eventually(lambda: not is_refused(rwlock, how))
    assert (rwlock.abandoned is None) == (how == "write")


@inside
def test_nobody_is_told_of_a_dead_reader(how: str) -> None:
    rwlock = shlock.RWLock()
    die_inside(rwlock, "read")
    with told() as pids, getattr(rwlock, how)(PATIENCE):
        assert rwlock.abandoned is None
    assert pids == []
    with rwlock.write(PATIENCE):
        pass
    assert_free(rwlock)


def test_the_records_of_dead_readers_are_used_again() -> None:
    rwlock = shlock.RWLock(readers=2)
    for _ in range(3):
        die_inside(rwlock, "read")
        die_inside(rwlock, "read")
        with rwlock.read(PATIENCE):
            assert rwlock.readers == 1
    assert_free(rwlock)


def test_a_poisoned_one_is_for_nobody_until_it_is_repaired() -> None:
    rwlock = shlock.RWLock(on_abandoned="poison")
    child = die_inside(rwlock, "write")
    for _ in range(2):
        for how in INSIDE:
            with pytest.raises(shlock.AbandonedError) as error, getattr(rwlock, how)(PATIENCE):
                pass
            assert error.value.abandoned.pid == child.pid
            assert rwlock.readers == 0
    with pytest.raises(KeyError), rwlock.repair() as abandoned:
        assert abandoned is not None
        raise KeyError
    with pytest.raises(shlock.AbandonedError), rwlock.read():
        pass
    with rwlock.repair() as abandoned:
        assert abandoned is not None
        assert is_refused_in_thread(rwlock, "read")
    with rwlock.repair() as abandoned:
        assert abandoned is None
    assert_free(rwlock)


def is_refused_in_thread(rwlock: shlock.RWLock, how: str) -> bool:
    return bool(InThread(lambda: is_refused(rwlock, how)).result())


@pytest.mark.parametrize("first", INSIDE)
@pytest.mark.parametrize("policy", ["warn", "poison"])
def test_nobody_is_told_of_a_writer_that_died_while_it_waited_for_the_readers(policy: Any, first: str) -> None:
    rwlock = shlock.RWLock(on_abandoned=policy)
    with rwlock.read():
        writer = Child(lambda: rwlock.write().__enter__())
        eventually(lambda: rwlock.waiters)
        writer.kill()
        if first == "read":
            assert InThread(lambda: is_refused(rwlock, "read", PATIENCE)).result() is False
            assert rwlock.abandoned is None
    with told() as pids, rwlock.write(PATIENCE):
        assert rwlock.abandoned is None
    assert pids == []
    assert_free(rwlock)


# -- what it shows --------------------------------------------------------------------------------------------------------


def shown(rwlock: shlock.RWLock) -> snapshot.PrimitiveSnapshot:
    (found,) = [
        primitive for seen in snapshot.domains() if seen.domain == rwlock.domain
        for primitive in seen.primitives if primitive.kind == "RWLock"
    ]  # fmt: skip
    return found


def test_it_says_who_is_inside_and_who_waits(domain: str) -> None:
    rwlock, page = shlock.RWLock("table", domain=domain), Page()
    assert shown(rwlock).state == "free"
    assert repr(rwlock) == "<RWLock(readers=0, owner=None, name='table')>"
    readers = [Child(hold, rwlock, "read", page, word) for word in (8, 9)]
    eventually(lambda: page[8] and page[9])
    assert shown(rwlock).state == "2 readers"
    assert repr(rwlock) == "<RWLock(readers=2, owner=None, name='table')>"
    writer = Child(hold, rwlock, "write", page, WRITING, DONE)
    eventually(lambda: len(rwlock.waiters) == 1)
    late = Child(hold, rwlock, "read", page, 10)
    eventually(lambda: len(rwlock.waiters) == 2)
    seen = shown(rwlock)
    assert seen.state == "2 readers"
    assert [waiter.pid for waiter in seen.waiters] == [writer.pid, late.pid] == [waiter.pid for waiter in rwlock.waiters]
    assert "waiters=2" in repr(rwlock)
    page[GO] = 1
    eventually(lambda: page[WRITING])
    seen = shown(rwlock)
    assert seen.state == "being written"
    assert seen.owner is not None
    assert rwlock.owner is not None
    assert seen.owner.pid == rwlock.owner.pid == writer.pid
    assert f"owner=pid {writer.pid}" in repr(rwlock)
    page[DONE] = 1
    for child in (*readers, writer, late):
        child.result()
    assert shown(rwlock).state == "free"
    die_inside(rwlock, "read")
    assert shown(rwlock).state == "held by a dead process"
    with rwlock.write(PATIENCE):
        assert shown(rwlock).state == "being written"
    die_inside(rwlock, "write")
    assert shown(rwlock).state == "held by a dead process"


def test_a_damaged_one_is_said_to_be_damaged(domain: str) -> None:
    rwlock = shlock.RWLock("table", domain=domain)
    words = rwlock._words
    with pytest.raises(shlock.SegmentError, match=r"record .*overwritten"), rwlock.write():
        reader = InThread(lambda: rwlock.read().__enter__())
        eventually(lambda: reader.is_parked_at(rwlock))
        words.view[words.cells[0][0]] = 0
        words.parking.unpark_many(words.line)
        reader.result()
    words.view[rwlock._block.start + at.BLOCK_MORE] = 1 << 40
    assert shown(rwlock).state == "damaged"


# -- leases ---------------------------------------------------------------------------------------------------------------


def test_a_writer_that_overruns_is_killed_and_everybody_told(domain: str) -> None:
    def overrun() -> None:
        with shlock.RWLock("table", domain=domain, lease=SHORT).write() as lease:
            assert lease.remaining() > 0
            spin()

    def inherit() -> tuple[int, str, list[int]]:
        rwlock = shlock.RWLock("table", domain=domain)
        with told() as first, rwlock.read(PATIENCE) as lease:
            assert rwlock.lease is lease
        with told() as second, rwlock.write(PATIENCE) as lease:
            abandoned = rwlock.abandoned
            assert lease.token == 2
        assert abandoned is not None
        return abandoned.pid, abandoned.reason, [*first, *second]

    hog = Child(overrun)
    assert hog.wait() == -signal.SIGKILL
    assert Child(inherit).result() == (hog.pid, "lease overrun", [hog.pid, hog.pid])


def test_the_lease_of_a_writer_begins_when_the_last_reader_has_left(domain: str) -> None:
    page = Page()

    def read() -> None:
        hold(shlock.RWLock("table", domain=domain, lease=LONG), "read", page, READING)

    def write() -> float:
        with shlock.RWLock("table", domain=domain, lease=0.5).write() as lease:
            return float(lease.remaining())

    reader = Child(read)
    eventually(lambda: page[READING])
    writer = Child(write)
    rwlock_is_over = _sys.SYSTEM.monotonic() + 1.5  # three leases: it is what the writer must outlive
    eventually(lambda: _sys.SYSTEM.monotonic() > rwlock_is_over)
    assert writer.is_alive()
    page[GO] = 1
    reader.result()
    assert 0.25 < writer.result() <= 0.5


def test_a_contract_for_one_of_the_two_allows_only_that(domain: str) -> None:
    def only(operation: str, other: str) -> set[str]:
        rwlock = shlock.RWLock("table", domain=domain, lease=LONG, operations=(operation,))
        with INSIDE[operation](rwlock):
            pass
        with pytest.raises(shlock.ContractDenied, match=f"does not allow to {other}, only {operation}"), INSIDE[other](rwlock):
            pass
        assert_no_holds(rwlock)
        assert rwlock.contract is not None
        return set(rwlock.contract.operations)

    def assert_no_holds(rwlock: shlock.RWLock) -> None:
        assert not rwlock.locked()

    for operation, other in (("read", "write"), ("write", "read")):
        assert Child(only, operation, other).result() == {operation}


def test_a_leased_one_can_be_repaired(domain: str) -> None:
    def overrun() -> None:
        with shlock.RWLock("table", domain=domain, lease=SHORT, on_abandoned="poison").write():
            spin()

    def repair() -> bool:
        rwlock = shlock.RWLock("table", domain=domain)
        with pytest.raises(shlock.AbandonedError), rwlock.read(PATIENCE):
            pass
        with pytest.raises(KeyError), rwlock.repair():
            raise KeyError
        with pytest.raises(shlock.AbandonedError), rwlock.write(PATIENCE):
            pass
        with rwlock.repair() as abandoned:
            assert abandoned is not None
        with rwlock.write() as lease:
            return bool(lease.remaining() > 0)

    assert Child(overrun).wait() == -signal.SIGKILL
    assert Child(repair).result()


# -- signals, and system calls --------------------------------------------------------------------------------------------


class With(Trial):
    def __init__(self, how: str, *arguments: Any, **options: Any) -> None:
        self.rwlock = shlock.RWLock(**options)
        self.how, self.arguments = how, arguments
        self.inside = False

    def operate(self) -> None:
        with getattr(self.rwlock, self.how)(*self.arguments):
            self.inside = True

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.inside and self.rwlock.locked():  # the documented limit
            assert outcome.where.startswith(("Reading.__exit__", "Writing.__exit__")), outcome.where
            if self.how == "read":
                self.rwlock.read().__exit__()
            else:
                self.rwlock._lock.__exit__()
        assert_free(self.rwlock)
        assert self.rwlock._words.holds == {}


@inside
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_signal_at_any_moment_leaves_a_free_lock(how: str, timeout: float | None) -> None:
    interrupt_everywhere(lambda: With(how, timeout), 4)


@inside
def test_a_signal_at_any_moment_with_no_operands_left_leaves_a_free_lock(how: str) -> None:
    interrupt_everywhere(lambda: NoOperands(With(how)), 4)


class ReadAgain(With):
    def __init__(self) -> None:
        super().__init__("read")
        self.rwlock.read().__enter__()

    def finish(self, outcome: Interruption) -> None:
        depth = self.rwlock._words.holds[threading.get_ident()].depth
        assert depth == 1 or (depth == 2 and outcome.at_entry and self.inside), f"it is held {depth} times"
        for _ in range(depth):
            self.rwlock.read().__exit__()
        assert_free(self.rwlock)


def test_a_read_in_a_read_that_is_interrupted_leaves_the_outer_one() -> None:
    interrupt_everywhere(ReadAgain, 2)


class Contended(Trial):
    """A `with` that parks behind a hold of another thread, which ends when the `with` is at `label`."""

    def __init__(self, outer: str, how: str, label: str, timeout: float | None) -> None:
        self.rwlock = shlock.RWLock()
        self.how, self.label, self.timeout = how, label, timeout
        self.inside = self.is_given_up = False
        self.go, self.gone, ready = threading.Event(), threading.Event(), threading.Event()
        self.main = threading.get_ident()

        def own() -> None:
            with INSIDE[outer](self.rwlock):
                ready.set()
                assert self.go.wait(PATIENCE)
                self.others = [InThread(lambda how=how: self.use(how)) for how in INSIDE] if self.is_parked else []
                eventually(lambda: all(other.is_parked_at(self.rwlock) for other in self.others))
            self.gone.set()

        self.is_parked = False
        self.others: list[InThread] = []
        self.owner = InThread(own)
        assert ready.wait(PATIENCE)
        _sys.crash_points[:] = [self.at]

    def use(self, how: str) -> None:
        with INSIDE[how](self.rwlock):
            pass

    def at(self, label: str) -> None:
        if label == self.label and threading.get_ident() == self.main and not self.go.is_set():
            self.is_parked = True
            self.go.set()
            assert self.gone.wait(PATIENCE)

    def operate(self) -> None:
        try:
            with getattr(self.rwlock, self.how)(self.timeout):
                self.inside = True
        except TimeoutError:
            self.is_given_up = True

    def finish(self, outcome: Interruption) -> None:
        self.go.set()
        self.owner.result()
        if outcome.at_entry and self.inside and self.rwlock._words.holds.get(self.main):
            self.rwlock.read().__exit__()
        elif outcome.at_entry and self.inside and self.rwlock._words.is_mine():
            self.rwlock._lock.__exit__()
        for other in self.others:
            other.result()
        assert_free(self.rwlock)


@pytest.mark.parametrize(("outer", "how"), [("read", "write"), ("write", "read"), ("write", "write")])
@pytest.mark.parametrize(("label", "timeout"), [("A6 before sleeping", None), ("A8 before S is IDLE", 0.001)])
def test_a_wait_that_is_interrupted_holds_nothing_and_wakes_the_others(
    outer: str, how: str, label: str, timeout: float | None, no_polling: None
) -> None:
    interrupt_everywhere(lambda: Contended(outer, how, label, timeout), 10)
