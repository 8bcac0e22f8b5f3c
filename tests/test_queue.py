"""Queue, JoinableQueue, SimpleQueue, take and dead letters, as a program uses them; deaths are in test_queue_crashes."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Full
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support import (
    PATIENCE,
    Child,
    Page,
    end_process,
    eventually,
    program_environment,
    run,
    supervisor_of,
)
from test_enforcement import events, spin
from test_signals import Interrupted, InThread, Trial, handling, interrupt_everywhere, raise_interrupted

import shlock
from shlock import _geometry, _names, _sys, _taken, snapshot
from shlock import _layout as at
from shlock.queue import DeadLetters

__all__ = ["handling"]

SHORT = 0.05
LARGE = 300_000  # bytes: two such items do not fit into one chunk
SIZES = pytest.mark.parametrize("size", [None, 700_000])
METHODS = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])

numpy_is_there = any((Path(folder) / "numpy").is_dir() for folder in sys.path)


@pytest.fixture
def domain(domain: str) -> Iterator[str]:
    """As everywhere; its supervisor ends with the test, and the files of its queues go."""
    yield domain
    pid = supervisor_of(domain)
    if pid is not None:
        end_process(pid, signal.SIGTERM)

    def is_clean() -> bool:
        gc.collect()
        snapshot.clean(domain)
        return not [name for name in os.listdir("/dev/shm") if name.startswith(f"{_names.segment_name(domain)}=")]

    eventually(is_clean, "its queues are gone", 10)


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sleeps is woken, or the test hangs: nobody looks by itself."""
    monkeypatch.setattr("shlock._parking.POLL_INTERVAL", 1e6)
    monkeypatch.setattr("shlock._parking.LONGEST_POLL_INTERVAL", 1e6)


class Failed(Exception):
    """What goes wrong in the middle of a piece of work."""


def fail(queue: shlock.Queue, times: int = 1) -> None:
    """Take the next item and leave it by an exception."""
    for _ in range(times):
        with contextlib.suppress(Failed), queue.take(timeout=PATIENCE):
            raise Failed


def drain(queue: Any) -> list[Any]:
    found = []
    with contextlib.suppress(Empty):
        while True:
            found.append(queue.get(False))
    return found


def is_blocked(thread: InThread, queue: shlock.Queue) -> bool:
    return thread.is_parked_at(queue)


def memory_of(queue: shlock.Queue) -> int:
    """Bytes of /dev/shm that it has."""
    return os.fstat(queue._memory.arena.segment.fd).st_blocks * 512


def assert_sound(queue: shlock.Queue, *, used: int = 1) -> None:
    """An empty queue: nothing is kept, no slot is filled or held, and no chunk is in use but the one of TAIL."""
    slots, ring = queue._slots, queue._out
    assert queue.qsize() == 0
    assert slots.view[slots.taking] == 0
    assert not any(state & _taken.FILLED for state in slots.view[slots._state].tolist())
    assert not any(word & at.OWNER for word in slots.view[slots._word].tolist())
    assert ring.lock.owner is queue._in.lock.owner is None
    assert ring.table.tobytes().count(2) == used
    assert queue.waiters == ()


def settle(queue: shlock.Queue) -> None:
    """Use chunks, and give them back: then what was interrupted or died at that is put in order."""
    for _ in range(3):
        queue.put("x" * LARGE)
        queue.get(timeout=PATIENCE)


# -- multiprocessing's interface ------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("kind", [shlock.Queue, shlock.JoinableQueue])
def test_items_come_out_equal_and_in_order(kind: type[shlock.Queue], size: int | None) -> None:
    queue = kind(size=size)
    items: list[Any] = [
        None,
        0,
        "text",
        b"",
        b"bytes",
        bytearray(b"x"),
        [1, {"a": (2.5,)}],
        b"y" * LARGE,
        "z" * LARGE,
        range(3),
    ]
    for item in items:
        queue.put(item)
    found = drain(queue)
    assert found == items
    assert list(map(type, found)) == list(map(type, items))
    assert_sound(queue)


def test_full_and_empty_are_raised_at_once_or_after_the_timeout_and_nothing_was_put() -> None:
    queue = shlock.Queue(2)
    for call in (lambda: queue.get(False), queue.get_nowait, lambda: queue.get(timeout=-1), lambda: queue.get(True, 0)):
        with pytest.raises(Empty):
            call()
    queue.put("a")
    queue.put_nowait("b")
    for call in (lambda: queue.put(1, False), lambda: queue.put_nowait(1), lambda: queue.put(1, timeout=0)):
        with pytest.raises(Full):
            call()
    for error, call in ((Full, lambda: queue.put(1, True, SHORT)), (Full, lambda: queue.put(obj=1, timeout=SHORT))):
        begin = time.monotonic()
        with pytest.raises(error):
            call()
        assert time.monotonic() - begin >= SHORT
    assert drain(queue) == ["a", "b"]
    for wait in (
        lambda: queue.get(timeout=SHORT),
        lambda: queue.take(timeout=SHORT).__enter__(),
        lambda: queue.get_many(3, timeout=SHORT),
    ):
        begin = time.monotonic()
        with pytest.raises(Empty):
            wait()
        assert time.monotonic() - begin >= SHORT
    with pytest.raises(Empty), queue.take(block=False):
        pass
    with pytest.raises(ValueError, match="NaN"):
        queue.get(timeout=float("nan"))


def test_sizes_are_as_in_multiprocessing() -> None:
    queue = shlock.Queue(3)
    assert (queue.qsize(), queue.empty(), queue.full()) == (0, True, False)
    for number in range(3):
        queue.put(number)
    assert (queue.qsize(), queue.empty(), queue.full()) == (3, False, True)
    with queue.take() as item:
        assert item == 0
        assert (queue.qsize(), queue.full()) == (2, False), "what is taken makes room"
        queue.put(3)
    fail(queue)
    assert queue.qsize() == 3, "what came back is there"
    assert drain(queue) == [1, 2, 3]
    assert queue.empty()


@pytest.mark.parametrize("maxsize", [0, -1, 2**31 - 1, 2**70])
def test_without_a_maxsize_or_with_an_absurd_one_there_is_no_limit(maxsize: int) -> None:
    queue = shlock.Queue(maxsize)
    queue.put_many(range(3000), block=False)
    assert not queue.full()
    assert drain(queue) == list(range(3000))


def test_many_are_put_and_got_in_order_and_full_says_how_many_were_put() -> None:
    queue = shlock.Queue(4)
    queue.put(b"first")
    mixed = [b"bytes", "text", bytearray(b"more"), 7, 8]
    with pytest.raises(Full) as caught:
        queue.put_many(mixed, block=False)
    assert caught.value.put == 3  # type: ignore[attr-defined]
    with pytest.raises(Full) as caught:
        queue.put_many(mixed, timeout=SHORT)
    assert caught.value.put == 0  # type: ignore[attr-defined]
    assert queue.get_many(2) == [b"first", b"bytes"]
    assert queue.get_many(100) == ["text", bytearray(b"more")]
    with pytest.raises(Empty):
        queue.get_many(1, block=False)
    with pytest.raises(ValueError, match="at least 1"):
        queue.get_many(0)
    queue.put_many([])
    assert queue.empty()


def test_many_of_several_types_that_wait_for_room_come_out_as_what_they_are() -> None:
    """Bytes and pickles have different tags, and each keeps its own wherever the filling was interrupted."""
    queue = shlock.Queue(3)
    mixed = [item for number in range(20) for item in (number, b"%d" % number, bytearray(b"x" * 5000))]
    putter = InThread(lambda: queue.put_many(mixed, timeout=PATIENCE))
    assert [queue.get(timeout=PATIENCE) for _ in mixed] == mixed
    putter.result()


def test_returned_items_are_among_the_many_that_are_got() -> None:
    queue = shlock.Queue()
    queue.put_many(range(5))
    fail(queue)
    assert queue.get_many(3) == [0, 1, 2]
    assert queue.get_many(3, timeout=1) == [3, 4]


def test_after_close_everything_is_a_valueerror_and_the_queue_stays_for_others() -> None:
    queue = shlock.JoinableQueue()
    queue.put(1)
    with pytest.raises(AssertionError):
        queue.join_thread()

    def close_there() -> None:
        queue.close()
        with pytest.raises(ValueError, match="closed"):
            queue.get()

    Child(close_there).result()
    taken = queue.take()
    with taken as item:
        assert item == 1
        queue.put(2)
        queue.close()
        queue.close()
        text = repr(queue)
    assert text == "<JoinableQueue(closed)>"
    queue.join_thread()
    queue.cancel_join_thread()
    calls: list[Callable[[], Any]] = [
        lambda: queue.put(1),
        lambda: queue.put(lambda: 0),
        lambda: queue.put_many([1]),
        lambda: queue.get(),
        lambda: queue.get(timeout=0),
        lambda: queue.get_many(2),
        lambda: queue.take().__enter__(),
        lambda: queue.take(timeout=0).__enter__(),
        lambda: queue.dead_letters,
        queue.qsize,
        queue.empty,
        queue.full,
        lambda: pickle.dumps(queue),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"<JoinableQueue\(1 items\)> is closed"):
            call()
    assert queue.contracts == ()


def test_a_simple_queue_has_its_few_methods() -> None:
    queue = shlock.SimpleQueue()
    assert queue.empty()
    queue.put([1])
    assert not queue.empty()
    assert Child(queue.get).result() == [1]
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.put(1)
    for kind in (shlock.Queue, shlock.JoinableQueue, shlock.SimpleQueue):
        assert kind[int].__origin__ is kind


def test_representations_say_what_is_there(domain: str) -> None:
    queue = shlock.Queue(name="q", domain=domain, max_deliveries=1)
    queue.put(1)
    queue.put(2)
    fail(queue)
    assert repr(queue) == "<Queue('q', 2 items)>"
    assert queue.get() == 2
    assert repr(queue.dead_letters) == "<DeadLetters(1 items)>"
    assert (queue.name, queue.domain) == ("q", domain)
    assert (shlock.Queue().name, shlock.Queue().domain) == (None, None)


# -- taking ---------------------------------------------------------------------------------------------------------------


@SIZES
def test_leaving_the_block_acknowledges_and_an_exception_puts_back_with_the_count(size: int | None) -> None:
    queue = shlock.Queue(size=size)
    queue.put("a" * LARGE)
    for number in range(1, 5):
        taken = queue.take(timeout=PATIENCE)
        with contextlib.suppress(Failed), taken as item:
            assert item == "a" * LARGE
            assert taken.deliveries == number
            assert queue.qsize() == 0
            if number < 4:
                raise Failed
    assert taken.deliveries == 4
    assert_sound(queue)


def test_what_comes_back_is_first_and_the_oldest_of_it_before_all() -> None:
    queue = shlock.Queue()
    queue.put_many(range(6))
    held = [queue.take() for _ in range(4)]
    assert [taken.__enter__() for taken in held] == [0, 1, 2, 3]
    for number in (2, 0, 3):
        held[number].__exit__(Failed, Failed(), None)
    held[1].__exit__(None, None, None)
    assert queue.qsize() == 5
    with queue.take() as item:
        assert item == 0
    assert drain(queue) == [2, 3, 4, 5]
    assert_sound(queue)


def test_the_oldest_is_first_wherever_it_was_kept(domain: str) -> None:
    one, other = (shlock.Queue(name="q", domain=domain) for _ in range(2))
    one.put_many(range(3))
    first, second = one.take(), one.take()
    assert [first.__enter__(), second.__enter__()] == [0, 1]
    first.__exit__(None, None, None)
    third = other.take()
    assert third.__enter__() == 2
    assert third.slot is not None
    assert second.slot is not None
    assert third.slot.index < second.slot.index, "it was to be kept in a place before"
    for taken in (third, second):
        taken.__exit__(Failed, Failed(), None)
    assert drain(one) == [1, 2]


def test_order_of_what_comes_back_survives_the_end_of_the_counter() -> None:
    queue = shlock.Queue()
    ring, view = queue._in, queue._in.view
    view[ring.head] |= 0xFFFF_FFFE << 32
    view[ring.tail] |= 0xFFFF_FFFE << 32
    queue.put_many(range(5))
    held = [queue.take() for _ in range(4)]
    assert [taken.__enter__() for taken in held] == [0, 1, 2, 3]
    for taken in reversed(held):
        taken.__exit__(Failed, Failed(), None)
    assert drain(queue) == [0, 1, 2, 3, 4]


def test_a_taken_object_is_used_once() -> None:
    queue = shlock.Queue()
    taken = queue.take(False)
    with pytest.raises(Empty):
        taken.__enter__()
    queue.put(1)
    with taken:
        pass
    queue.put(2)
    with pytest.raises(ValueError, match="used already"):
        taken.__enter__()
    assert queue.get() == 2


def test_what_is_not_unpickled_in_take_goes_back_and_at_last_to_the_dead_letters() -> None:
    queue = shlock.JoinableQueue(max_deliveries=3)
    queue.put(Bomb())
    queue.put("good")
    for _ in range(3):
        with pytest.raises(Failed, match="unpickled"), queue.take(timeout=1):
            pass
    with queue.take(timeout=1) as item:
        assert item == "good"
    with pytest.raises(Failed, match="unpickled"):
        queue.dead_letters.get(timeout=1)
    assert queue.dead_letters.empty()
    queue.join()
    assert_sound(queue)


def test_items_over_the_count_go_to_the_dead_letters_from_which_they_can_be_put_again() -> None:
    queue = shlock.JoinableQueue(max_deliveries=2)
    queue.put_many(["bad", "good", "bad too"])
    fail(queue, 2)
    assert queue.dead_letters.empty(), "not before it would be handed out once more"
    with queue.take() as item:
        assert item == "good"
    fail(queue, 2)
    with pytest.raises(Empty):
        queue.get(timeout=0)
    letters = queue.dead_letters
    assert isinstance(letters, DeadLetters)
    assert (letters.qsize(), letters.empty()) == (2, False)
    queue.join()  # nobody will work on them any more
    assert letters.get() == "bad"
    queue.put(letters.get_many(5)[0])
    assert letters.empty()
    with pytest.raises(Empty):
        letters.get(timeout=SHORT)
    taken = queue.take()
    with taken as item:
        assert (item, taken.deliveries) == ("bad too", 1)
    assert_sound(queue)


@pytest.mark.parametrize("letters", [1, 3])
def test_whoever_waits_for_dead_letters_is_woken(letters: int, no_polls: None) -> None:
    queue = shlock.Queue(max_deliveries=1)
    readers = [InThread(lambda: queue.dead_letters.get()) for _ in range(letters)]
    eventually(lambda: len(queue.waiters) == letters)
    for number in range(letters):
        queue.put(number)
        fail(queue)
        with pytest.raises(Empty):
            queue.get(False)
    assert sorted(reader.result() for reader in readers) == list(range(letters))


def test_without_room_for_a_dead_letter_take_raises_and_the_item_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = shlock.Queue(max_deliveries=1)
    queue.put("bad")
    fail(queue)
    with monkeypatch.context() as patch:
        patch.setattr(type(queue._slots.letters), "put", lambda *arguments: False)
        for call in (lambda: queue.take(False).__enter__(), lambda: queue.get(timeout=1)):
            with pytest.raises(OSError, match="dead letters") as caught:
                call()
            assert caught.value.errno == errno.ENOSPC
            assert queue.qsize() == 1
    with pytest.raises(Empty):
        queue.get(False)
    assert queue.dead_letters.get() == "bad"


def test_a_queue_hands_out_128_items_and_then_takes_wait_until_one_is_done(no_polls: None) -> None:
    queue = shlock.Queue()
    queue.put_many(range(_taken.SLOTS + 3))
    held = [queue.take(False) for _ in range(_taken.SLOTS)]
    assert [taken.__enter__() for taken in held] == list(range(_taken.SLOTS))
    begin = time.monotonic()
    with pytest.raises(Empty), queue.take(timeout=SHORT):
        pass
    assert time.monotonic() - begin >= SHORT
    with pytest.raises(Empty), queue.take(False):
        pass

    def take() -> Any:
        with queue.take() as item:
            return item

    takers = [InThread(take) for _ in range(2)]
    eventually(lambda: len(queue.waiters) == 2)
    assert queue.get() == _taken.SLOTS, "who gets needs no slot"
    held[7].__exit__(None, None, None)  # one slot, and it is enough for both
    assert sorted(taker.result() for taker in takers) == [_taken.SLOTS + 1, _taken.SLOTS + 2]
    for number, taken in enumerate(held):
        if number != 7:
            taken.__exit__(None, None, None)
    assert_sound(queue)


def test_who_waits_for_a_slot_is_woken_by_an_item_that_comes_back(no_polls: None) -> None:
    queue = shlock.Queue()
    queue.put_many(range(_taken.SLOTS + 1))
    held = [queue.take() for _ in range(_taken.SLOTS)]
    for taken in held:
        taken.__enter__()

    def take() -> Any:
        with queue.take() as item:
            return item

    taker = InThread(take)
    eventually(lambda: is_blocked(taker, queue))
    held[5].__exit__(Failed, Failed(), None)
    assert taker.result() == 5
    for taken in held[:5] + held[6:]:
        taken.__exit__(None, None, None)
    assert drain(queue) == [_taken.SLOTS]


def test_who_waits_for_a_slot_leaves_the_wake_up_of_an_item_to_who_can_get_it(no_polls: None) -> None:
    queue = shlock.Queue()
    queue.put_many(range(_taken.SLOTS))
    held = [queue.take() for _ in range(_taken.SLOTS)]
    for taken in held:
        taken.__enter__()
    taker = InThread(lambda: queue.take().__enter__())
    eventually(lambda: is_blocked(taker, queue))  # the longest-waiting: it is woken first
    getter = InThread(queue.get)
    eventually(lambda: is_blocked(getter, queue))
    queue.put("new")
    assert getter.result() == "new"
    for taken in held:
        taken.__exit__(None, None, None)
    queue.put("last")
    assert taker.result() == "last"


def test_a_block_may_be_left_by_another_thread() -> None:
    queue = shlock.JoinableQueue()
    queue.put_many("ab")
    for kind in (None, Failed):
        taken = queue.take()
        InThread(taken.__enter__).result()
        taken.__exit__(kind, None, None)
    taken = queue.take()
    with taken as item:
        assert (item, taken.deliveries) == ("b", 2)
    queue.join()
    assert_sound(queue)


def test_a_child_that_is_forked_inside_the_block_neither_acknowledges_nor_gives_back() -> None:
    for kind in (None, Failed):
        queue = shlock.JoinableQueue()
        queue.put(1)
        taken = queue.take()
        taken.__enter__()
        state = queue._slots.view[taken.slot.state]

        def leave(kind: Any = kind, taken: Any = taken) -> None:
            taken.__exit__(kind, None, None)

        Child(leave).result()
        assert taken.slot.is_mine()
        assert queue._slots.view[taken.slot.state] == state
        assert Child(queue.qsize).result() == 0
        taken.__exit__(None, None, None)
        queue.join()
        assert_sound(queue)


def test_a_taken_object_that_is_dropped_gives_its_item_back() -> None:
    queue = shlock.Queue()
    queue.put(1)
    taken = queue.take()
    taken.__enter__()
    del taken
    assert drain(queue) == [1]


def test_two_objects_for_one_queue_do_not_leave_each_others_blocks(domain: str) -> None:
    one, other = (shlock.Queue(name="q", domain=domain) for _ in range(2))
    one.put(1)
    one.put(2)
    with one.take() as item:
        with other.take() as another:
            assert (item, another) == (1, 2)
        with pytest.raises(Empty), other.take(False):
            pass
        assert one.qsize() == 0
    assert_sound(one)


# -- waiting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", ["get", "take", "get_many", "get_returned"])
def test_blocked_putters_are_freed_one_by_one_as_room_comes(free: str, no_polls: None) -> None:
    queue = shlock.Queue(2)
    queue.put("a")
    queue.put("b")
    putters = [InThread(lambda number=number: queue.put(number)) for number in range(4)]
    eventually(lambda: len(queue.waiters) == 4)
    found = []
    for gone in range(1, 5):
        if free == "get":
            found.append(queue.get())
        elif free == "get_many":
            found += queue.get_many(1)
        elif free == "get_returned":
            fail(queue)
            found.append(queue.get())
        else:
            with queue.take() as item:
                found.append(item)
        eventually(lambda gone=gone: sum(putter.is_over() for putter in putters) == gone)
        assert len(queue.waiters) == 4 - gone
    found += drain(queue)
    assert sorted(map(str, found)) == sorted(["a", "b", *map(str, range(4))])
    assert found[:2] == ["a", "b"]


@pytest.mark.parametrize("how", ["get", "take"])
def test_a_large_item_that_waits_for_room_is_put_when_there_is_some(how: str, no_polls: None) -> None:
    queue = shlock.Queue(size=100_000)
    queue.put(b"x" * 90_000)
    large = InThread(lambda: queue.put(b"y" * 90_000))
    eventually(lambda: is_blocked(large, queue))
    if how == "get":
        assert len(queue.get()) == 90_000
    else:
        with queue.take() as item:
            assert len(item) == 90_000
    large.result()
    assert queue.get() == b"y" * 90_000


@pytest.mark.parametrize("how", ["get", "take", "get_many"])
def test_each_that_waits_for_an_item_is_woken_by_one(how: str, no_polls: None) -> None:
    queue = shlock.Queue()

    def consume() -> Any:
        if how == "get":
            return queue.get()
        if how == "get_many":
            return queue.get_many(1)[0]
        with queue.take() as item:
            return item

    consumers = [InThread(consume) for _ in range(4)]
    eventually(lambda: len(queue.waiters) == 4)
    queue.put(0)
    queue.put_many([1, 2])
    eventually(lambda: sum(consumer.is_over() for consumer in consumers) == 3)
    assert len(queue.waiters) == 1
    queue.put(3)
    assert sorted(consumer.result() for consumer in consumers) == [0, 1, 2, 3]


def test_several_items_that_come_back_wake_as_many(no_polls: None) -> None:
    queue = shlock.Queue()
    queue.put_many(range(3))
    held = [queue.take() for _ in range(3)]
    for taken in held:
        taken.__enter__()
    getters = [InThread(queue.get) for _ in range(3)]
    eventually(lambda: len(queue.waiters) == 3)
    for taken in held:
        taken.__exit__(Failed, Failed(), None)
    assert sorted(getter.result() for getter in getters) == [0, 1, 2]


@pytest.mark.parametrize("how", ["task_done", "take", "dead letter"])
def test_join_wakes_when_the_last_task_is_done(how: str, no_polls: None) -> None:
    queue = shlock.JoinableQueue(max_deliveries=1)
    assert queue._slots.unfinished() == 0
    queue.join()
    queue.put_many(range(3))
    joiners = [InThread(queue.join) for _ in range(2)]
    eventually(lambda: len(queue.waiters) == 2)
    for number in range(3):
        assert not any(joiner.is_over() for joiner in joiners)
        if how == "take":
            with queue.take() as item:
                assert item == number
        elif how == "task_done":
            assert queue.get() == number
            queue.task_done()
        else:
            fail(queue)
            if number == 2:  # an item is buried by whoever would get it
                with pytest.raises(Empty):
                    queue.get(False)
    for joiner in joiners:
        joiner.result()
    with pytest.raises(ValueError, match="too many"):
        queue.task_done()


def test_an_item_that_came_back_and_is_got_is_counted_by_task_done_alone() -> None:
    queue = shlock.JoinableQueue()
    queue.put_many("ab")
    fail(queue)
    assert queue.get() == "a"
    assert queue._slots.unfinished() == 2
    queue.task_done()
    with queue.take():
        assert queue._slots.unfinished() == 1
    queue.join()
    with pytest.raises(ValueError, match="too many"):
        queue.task_done()


def test_bounded_calls_end_when_somebody_was_stopped_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_taken, "COURTESY", SHORT)
    queue = shlock.Queue()
    queue.put_many(range(10))
    page = Page(2)

    def stop_at(label: str, operation: Callable[[], Any]) -> None:
        def step(reached: str) -> None:
            if reached == label:
                os.kill(os.getpid(), signal.SIGSTOP)

        _sys.crash_points[:] = [step]
        operation()
        page[0] += 1

    consumer = Child(stop_at, "C33 bytes read", queue.get)
    producer = Child(stop_at, "C30 bytes written", lambda: queue.put("late"))
    eventually(lambda: queue._in.lock.owner and queue._out.lock.owner)
    for error, call in (
        (Empty, lambda: queue.get(False)),
        (Empty, lambda: queue.get(timeout=SHORT)),
        (Empty, lambda: queue.get_many(3, timeout=SHORT)),
        (Empty, lambda: queue.take(False).__enter__()),
        (Empty, lambda: queue.take(timeout=SHORT).__enter__()),
        (Full, lambda: queue.put_nowait(1)),
        (Full, lambda: queue.put(1, timeout=SHORT)),
        (Full, lambda: queue.put_many([1], timeout=SHORT)),
    ):
        with pytest.raises(error):
            call()
    consumer.go_on()
    producer.go_on()
    consumer.result()
    producer.result()
    assert queue.get_many(20) == [*range(1, 10), "late"]
    assert_sound(queue)


def test_putting_without_waiting_is_not_refused_because_others_are_putting() -> None:
    """As a logging handler does it, from many processes."""
    queue, page = shlock.Queue(), Page(1)

    def put() -> None:
        eventually(lambda: page[0])
        for number in range(300):
            queue.put_nowait((os.getpid(), number))

    children = [Child(put) for _ in range(3)]
    page[0] = 1
    for child in children:
        child.result()
    found: dict[int, list[int]] = {child.pid: [] for child in children}
    for pid, number in drain(queue):
        found[pid].append(number)
    assert all(numbers == list(range(300)) for numbers in found.values())


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"maxsize": True}, TypeError),
        ({"maxsize": 1.5}, TypeError),
        ({"maxsize": None}, TypeError),
        ({"size": 0}, ValueError),
        ({"size": -5}, ValueError),
        ({"size": 1.5}, TypeError),
        ({"size": True}, TypeError),
        ({"size": (1 << 33) + 1}, OSError),
        ({"size": 1 << 80}, OSError),
        ({"max_deliveries": 0}, ValueError),
        ({"max_deliveries": -1}, ValueError),
        ({"max_deliveries": 1 << 64}, ValueError),
        ({"max_deliveries": True}, TypeError),
        ({"max_deliveries": "3"}, TypeError),
        ({"domain": "d"}, ValueError),
        ({"name": ""}, ValueError),
        ({"name": "x" * 201}, ValueError),
        ({"name": "q", "domain": "/m"}, ValueError),
        ({"operations": ("receive",)}, ValueError),
        ({"rank": 1}, ValueError),
        ({"lease": -1.0}, ValueError),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        shlock.Queue(**options)


@pytest.mark.parametrize("put", ["put", "put with timeout", "put_many", "out of band"])
def test_an_item_larger_than_the_longest_is_refused_before_anything_is_written(put: str) -> None:
    queue = shlock.Queue(size=10_000)
    queue.put("here")
    before = queue._memory.arena.words.view.tolist()
    large = b"x" * 30_000
    with pytest.raises(ValueError, match=r"30\d\d\d bytes; the longest that fits has \d+"):
        if put == "put":
            queue.put(large)
        elif put == "put with timeout":
            queue.put(large, timeout=1)
        elif put == "put_many":
            queue.put_many(["small", large])
        else:
            queue.put(pickle.PickleBuffer(large))
    assert drain(queue) == ["here"]
    after = queue._memory.arena.words.view.tolist()
    places = {queue._out.tail: "TAIL", queue._out.intent: "INTENT"}
    assert all(before[place] == after[place] for place in places)
    queue.put(b"y" * 9_900)
    assert len(queue.get()) == 9_900


class Bomb:
    """It can be pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return explode, ()


def explode() -> None:
    raise Failed("unpickled")


def test_what_cannot_be_pickled_is_an_error_of_put_and_nothing_is_half_put() -> None:
    queue = shlock.Queue()
    queue.put(1)
    view = queue._in.view
    before = view[queue._out.tail]
    for bad in (lambda: 0, threading.Lock(), [b"x" * 10_000, lambda: 0], (yield_ for yield_ in ())):
        for put in (queue.put, lambda obj: queue.put(obj, timeout=1), lambda obj: queue.put_many([2, obj])):
            with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
                put(bad)
    assert view[queue._out.tail] == before
    queue.put(3)
    assert drain(queue) == [1, 3]


def test_what_is_raised_by_unpickling_comes_out_of_get_and_the_queue_goes_on() -> None:
    queue = shlock.Queue()
    queue.put_many([1, Bomb(), 2, Bomb(), 3])
    assert queue.get() == 1
    with pytest.raises(Failed, match="unpickled"):
        queue.get()
    with pytest.raises(Failed, match="unpickled") as caught:
        queue.get_many(10)
    assert caught.value.got == [2, 3]  # type: ignore[attr-defined]
    assert_sound(queue)


@pytest.mark.parametrize(
    ("there", "wanted", "texts"),
    [
        ({"maxsize": 5}, {"maxsize": 6}, ("maxsize=5", "maxsize=6")),
        ({}, {"maxsize": 6}, ("maxsize=0", "maxsize=6")),
        ({"size": 5000}, {"size": 6000}, ("5000", "6000")),
        ({}, {"size": 6000}, ("Queue", "6000")),
        ({"max_deliveries": 5}, {"max_deliveries": 6}, ("max_deliveries=5", "max_deliveries=6")),
        ({}, {"max_deliveries": 6}, ("max_deliveries=0", "max_deliveries=6")),
    ],
    ids=str,
)
def test_attaching_with_other_properties_names_both(there: Any, wanted: Any, texts: tuple[str, str], domain: str) -> None:
    queue = shlock.Queue(name="q", domain=domain, **there)
    for attach in (lambda: shlock.Queue(name="q", domain=domain, **wanted), Child):
        with pytest.raises(shlock.SegmentError) as caught:
            if attach is Child:
                Child(shlock.Queue, name="q") if False else attach_elsewhere(domain, wanted)
            else:
                attach()
        assert all(text in str(caught.value) for text in texts)
    same = shlock.Queue(name="q", domain=domain, **there)
    as_it_is = shlock.Queue(name="q", domain=domain)
    same.put(1)
    assert as_it_is.get() == 1
    assert queue.empty()


def attach_elsewhere(domain: str, options: dict[str, Any]) -> None:
    """What the same call raises in an unrelated process."""
    source = """
        import pickle, sys, shlock
        try:
            shlock.Queue(name="q", domain=sys.argv[1], **eval(sys.argv[2]))
        except shlock.SegmentError as error:
            print(pickle.dumps(error).hex())
    """
    answer = run(source, domain, repr(options)).strip()
    if answer:
        raise pickle.loads(bytes.fromhex(answer))


@pytest.mark.parametrize(
    ("make", "attach", "texts"),
    [
        (shlock.Queue, shlock.JoinableQueue, ("a Queue there", "a JoinableQueue is wanted")),
        (shlock.JoinableQueue, shlock.Queue, ("a JoinableQueue there", "a Queue is wanted")),
        (lambda **o: shlock.Channel(size=5000, **o), shlock.Queue, ("a Channel", "a Queue is wanted")),
        (lambda **o: shlock.Block(size=5000, **o), shlock.JoinableQueue, ("a Block", "a Queue is wanted")),
        (shlock.Queue, lambda **o: shlock.Channel(size=5000, **o), ("a Queue", "a Channel of 5000 bytes is wanted")),
    ],
)
def test_attaching_as_something_else_names_both(make: Any, attach: Any, texts: tuple[str, str], domain: str) -> None:
    kept = make(name="q", domain=domain)
    with pytest.raises(shlock.SegmentError) as caught:
        attach(name="q", domain=domain)
    assert all(text in str(caught.value) for text in texts)
    del kept


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not numpy_is_there, reason="numpy is not installed")
@pytest.mark.parametrize("how", ["get", "take", "take again", "get_many", "dead letter"])
def test_arrays_that_come_out_can_be_written_to(how: str) -> None:
    import numpy

    queue = shlock.Queue(max_deliveries=1 if how == "dead letter" else None)
    array = numpy.arange(100_000, dtype="int64")
    queue.put_many([array, {"a": array, "b": array[::2]}]) if how == "get_many" else queue.put(array)
    if how == "get":
        got = queue.get()
    elif how == "get_many":
        got, more = queue.get_many(2)
        assert (more["a"] == array).all()
        assert (more["b"] == array[::2]).all()
        more["a"][0] = 5
    elif how == "dead letter":
        fail(queue)
        assert queue.empty() is False
        with pytest.raises(Empty):
            queue.get(False)
        got = queue.dead_letters.get()
    else:
        if how == "take again":
            fail(queue)
        with queue.take() as got:
            pass
    assert (got == array).all()
    got[:] = 7
    assert got.sum() == 7 * len(array)
    assert array[1] == 1


@pytest.mark.parametrize("how", ["get", "take", "get_many"])
def test_memory_is_given_back_after_a_large_backlog(how: str) -> None:
    queue = shlock.Queue()
    body = b"x" * 1_000_000
    queue.put_many([body] * 40)
    assert memory_of(queue) > 40_000_000
    for _ in range(40):
        if how == "get":
            assert queue.get() == body
        elif how == "take":
            with queue.take() as item:
                assert item == body
        else:
            assert queue.get_many(1) == [body]
    assert_sound(queue)
    assert memory_of(queue) < _geometry.LARGE_KEPT * 2 * _geometry.LAZY_CHUNK + 3_000_000


def test_memory_of_items_that_many_held_is_given_back() -> None:
    queue = shlock.Queue()
    queue.put_many([b"x" * 500_000] * 40)
    held = [queue.take() for _ in range(40)]
    for taken in held:
        taken.__enter__()
    for taken in held[::2]:
        taken.__exit__(Failed, Failed(), None)
    for taken in held[1::2]:
        taken.__exit__(None, None, None)
    assert memory_of(queue) > 10_000_000
    assert len(drain(queue)) == 20
    assert_sound(queue)
    assert memory_of(queue) < 40 * _taken.KEPT_BYTES + _geometry.QUEUE_KEPT * _geometry.LAZY_CHUNK + 1_000_000


def test_a_queue_that_nobody_has_any_more_is_gone() -> None:
    queue = shlock.JoinableQueue()
    queue.put(1)
    fail(queue)
    queue.get()
    arena = weakref.ref(queue._memory.arena)
    del queue
    gc.collect()
    assert arena() is None


@pytest.mark.parametrize("how", ["put", "put_many", "take"])
def test_without_memory_an_oserror_is_raised_and_the_queue_goes_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = shlock.JoinableQueue()
    queue.put("first")
    if how == "take":
        queue.put("second")

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(_sys.SYSTEM), "reserve", refuse)
        with pytest.raises(OSError, match="No space") as caught:
            if how == "put":
                queue.put(b"x" * 600_000)
            elif how == "put_many":
                queue.put_many([b"x" * 600_000])
            else:
                with queue.take():
                    pass
        assert caught.value.errno == errno.ENOSPC
        if how != "put_many":
            assert queue.get() == "first"
            queue.task_done()
    for item in {"put": [], "put_many": ["first"], "take": ["second"]}[how]:
        assert queue.get(False) == item
        queue.task_done()
    queue.join()
    queue.put(b"x" * 600_000)
    with queue.take() as item:
        assert len(item) == 600_000
    assert_sound(queue)


def test_a_full_shared_memory_is_an_error_of_put_and_no_item_is_lost() -> None:
    """In a /dev/shm of two megabytes of its own."""
    source = """
import shlock, queue
q = shlock.JoinableQueue()
put = got = errors = 0
for round in range(200):
    try:
        q.put((put, b"x" * 30_000))
        put += 1
    except OSError as error:
        assert error.errno == 28, error
        errors += 1
        for _ in range(20):
            try:
                with q.take(False) as item:
                    assert item[0] == got, (item[0], got)
            except OSError as error:  # a place to keep it is memory, too
                assert error.errno == 28, error
                assert q.get()[0] == got
                q.task_done()
            got += 1
while not q.empty():
    assert q.get()[0] == got
    q.task_done()
    got += 1
q.join()
assert put == got, (put, got)
print(put, errors)
"""
    script = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, source],
        capture_output=True,
        text=True,
        env=program_environment(),
        timeout=2 * PATIENCE,
        check=False,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    put, errors = map(int, done.stdout.split())
    assert errors > 0
    assert put > 100


# -- processes ------------------------------------------------------------------------------------------------------------


def echo(queue: Any, answers: Any, simple: Any) -> None:
    """In a process of any start method."""
    while (item := queue.get()) is not None:
        with answers.take() as number:
            simple.put((number, item))
        queue.task_done()
    queue.task_done()


@METHODS
def test_queues_are_passed_to_processes_of_every_start_method(method: str) -> None:
    context = shlock.get_context(method)
    queue, answers, simple = context.JoinableQueue(), context.Queue(5), context.SimpleQueue()
    processes = [context.Process(target=echo, args=(queue, answers, simple)) for _ in range(2)]
    for process in processes:
        process.start()
    for number in range(20):
        queue.put(chr(97 + number))
        answers.put(number, timeout=PATIENCE)
    for _ in processes:
        queue.put(None)
    queue.join()
    found = [simple.get() for _ in range(20)]
    assert sorted(number for number, _ in found) == list(range(20))
    assert sorted(item for _, item in found) == [chr(97 + number) for number in range(20)]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    for one in (queue, answers):
        assert_sound(one)


@pytest.mark.parametrize("kind", [shlock.Queue, shlock.JoinableQueue, shlock.SimpleQueue])
def test_a_queue_without_a_name_is_pickled_only_for_a_child(kind: Any) -> None:
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(kind())


def test_a_queue_with_a_name_is_pickled_anywhere(domain: str) -> None:
    queue = shlock.JoinableQueue(3, "q", domain=domain, max_deliveries=2)
    copy = pickle.loads(pickle.dumps(queue))
    assert type(copy) is shlock.JoinableQueue
    queue.put_many("abc")
    with pytest.raises(Full):
        copy.put(1, False)
    assert drain(copy) == list("abc")


def test_two_unrelated_processes_use_a_queue_by_its_name(domain: str) -> None:
    source = """
        import sys, shlock
        queue = shlock.JoinableQueue(name="jobs", domain=sys.argv[1], max_deliveries=2)
        results = shlock.Queue(name="results", domain=sys.argv[1])
        for _ in range(10):
            with queue.take(timeout=30) as job:
                results.put((job, job ** 2))
    """
    # Whichever comes first makes it.
    worker = InThread(lambda: run(source, domain))
    queue = shlock.JoinableQueue(name="jobs", domain=domain, max_deliveries=2)
    queue.put_many(range(20))
    run(source, domain)
    worker.result()
    queue.join()
    results = shlock.Queue(name="results", domain=domain)
    assert sorted(drain(results)) == [(number, number**2) for number in range(20)]


def test_items_stay_when_their_producer_has_ended() -> None:
    queue = shlock.Queue()
    Child(lambda: [queue.put((number, "x" * LARGE)) for number in range(10)] and None).result()
    assert [item[0] for item in drain(queue)] == list(range(10))


def test_many_threads_of_several_processes_lose_and_double_nothing() -> None:
    queue, results = shlock.JoinableQueue(7), shlock.Queue()
    count, threads, processes = 120, 3, 2

    def work() -> None:
        def consume(number: int) -> None:
            while True:
                if number % 2:
                    item = queue.get()
                    queue.task_done()
                else:
                    with queue.take() as item:
                        pass
                if item is None:
                    return
                results.put(item)

        def produce(number: int) -> None:
            for index in range(count):
                queue.put((os.getpid(), number, index, "x" * random.randrange(3000)))

        producers = [InThread(lambda number=number: produce(number)) for number in range(threads)]
        consumers = [InThread(lambda number=number: consume(number)) for number in range(threads)]
        for thread in producers:
            thread.result()
        for thread in consumers:
            thread.result()

    children = [Child(work) for _ in range(processes)]
    found = [results.get(timeout=PATIENCE) for _ in range(count * threads * processes)]
    queue.put_many([None] * threads * processes)
    for child in children:
        child.result()
    queue.join()
    assert sorted(item[:3] for item in found) == sorted(
        (child.pid, number, index) for child in children for number in range(threads) for index in range(count)
    )
    assert results.empty()
    assert_sound(queue)


# -- signals --------------------------------------------------------------------------------------------------------------


def blocked_call(how: str) -> tuple[shlock.Queue, Callable[[], Any], Callable[[], Any]]:
    """A queue, a call on it that blocks, and what makes such a call succeed."""
    queue = shlock.Queue(1)
    if how in ("put", "put_many", "put out of band"):
        queue.put("there")
        large = pickle.PickleBuffer(b"x" * 10_000)
        puts: dict[str, Callable[[], Any]] = {
            "put": lambda: queue.put("new"),
            "put_many": lambda: queue.put_many(["new"]),
            "put out of band": lambda: queue.put(large),
        }
        return queue, puts[how], queue.get

    def take() -> Any:
        with queue.take() as item:
            return item

    gets = {"get": queue.get, "get_many": lambda: queue.get_many(1), "take": take}
    return queue, gets[how], lambda: queue.put("new")


BLOCKED = pytest.mark.parametrize("how", ["get", "get_many", "take", "put", "put_many", "put out of band"])


@BLOCKED
def test_a_blocked_call_that_a_signal_ends_lost_nothing_and_wakes_the_next(
    how: str, no_polls: None, handling: Callable[..., Any]
) -> None:
    queue, call, free = blocked_call(how)
    main = threading.get_ident()
    handling(signal.SIGALRM, raise_interrupted)

    def disturb() -> InThread:
        eventually(lambda: queue.waiters)
        other = InThread(call)
        eventually(lambda: len(queue.waiters) == 2)
        signal.pthread_kill(main, signal.SIGALRM)
        return other

    helper = InThread(disturb)
    with pytest.raises(Interrupted):
        call()
    other = helper.result()
    eventually(lambda: len(queue.waiters) == 1)
    free()
    other.result()
    assert len(drain(queue)) == (1 if how.startswith("put") else 0)
    assert_sound(queue)


class Consume(Trial):
    """One take, put or get with items of which the second needs a new chunk; a thread waits behind it."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.queue = shlock.JoinableQueue(max_deliveries=1 if how == "bury" else None)
        self.queue.put(("a", "x" * LARGE))
        self.queue.put(("b", "x" * LARGE))
        if how in ("take returned", "bury", "get returned"):
            fail(self.queue)
        self.seen: list[str] = []
        self.waiter: InThread | None = None

    def operate(self) -> None:
        queue = self.queue
        if self.how.startswith("get"):
            self.seen.append(queue.get()[0])
        elif self.how == "put":
            queue.put(("c", "x" * LARGE))
            self.seen.append("c")
        elif self.how == "fail":
            try:
                with queue.take() as item:
                    raise Failed
            except Failed:
                pass
        else:
            with queue.take() as item:
                self.seen.append(item[0])

    def finish(self, outcome: Any) -> None:
        queue = self.queue
        if any(word & at.OWNER for word in queue._slots.view[queue._slots._word].tolist()):
            gc.collect()  # a block whose end was interrupted at its first step, and that the traceback had kept
        left = []
        while True:
            try:
                taken = queue.take(False)
                with taken as item:
                    left.append((item[0], taken.deliveries))
            except Empty:
                break
        letters = [item[0] for item in drain(queue.dead_letters)]
        names = [name for name, _ in left]
        everything = sorted([*names, *letters])
        if self.how.startswith("get"):
            # It is gone, or it is there, and never both.
            assert everything == ["b"] or (outcome.raised and everything == ["a", "b"]), everything
            assert not (self.seen and "a" in names)
            queue_is_done = everything == ["a", "b"]
        elif self.how == "put":
            assert names in (["a", "b", "c"], ["a", "b"])
            assert self.seen == [] or "c" in names
            queue_is_done = True
        elif self.how == "bury":
            assert set(everything) | set(self.seen) == {"a", "b"}
            assert letters.count("a") == 1 or outcome.raised
            queue_is_done = True
        else:
            # At least once: what is not there any more was worked on to the end.
            assert set(names) | set(self.seen) == {"a", "b"}, (names, self.seen)
            if not outcome.raised and self.how != "fail":
                assert names == ["b"]
            if self.how == "fail":
                assert names == ["a", "b"]
            queue_is_done = True
        if not queue_is_done:
            queue.task_done()
        assert queue._slots.unfinished() == 0
        if queue._out.table[:].tobytes().count(2) > 1:
            settle(queue)
        assert_sound(queue)


@pytest.mark.patience(600)
@pytest.mark.parametrize("how", ["take", "take returned", "fail", "bury", "get", "get returned", "put"])
def test_wherever_it_is_interrupted_nothing_is_lost_or_held(how: str, no_polls: None) -> None:
    interrupt_everywhere(lambda: Consume(how), 7)


# -- a death that nobody sleeps to see ------------------------------------------------------------------------------------


def die_with(queue: shlock.Queue, count: int = 1) -> None:
    """A process takes so many items and is killed."""
    page = Page(1)

    def hold() -> None:
        held = [queue.take(timeout=PATIENCE) for _ in range(count)]
        for taken in held:
            taken.__enter__()
        page[0] = 1
        signal.pause()

    child = Child(hold)
    eventually(lambda: page[0] or not child.is_alive())
    child.kill()


@pytest.mark.parametrize("how", ["get", "take", "get_many", "qsize"])
def test_who_never_waits_finds_what_a_dead_process_held(how: str) -> None:
    queue = shlock.Queue()
    queue.put("a")
    die_with(queue)
    if how == "qsize":
        assert (queue.qsize(), queue.empty()) == (1, False)
        assert repr(queue) == "<Queue(1 items)>"
    elif how == "take":
        taken = queue.take(False)
        with taken as item:
            assert (item, taken.deliveries) == ("a", 2)
    elif how == "get":
        assert queue.get(False) == "a"
    else:
        assert queue.get_many(2, block=False) == ["a"]


@pytest.mark.parametrize("how", ["get", "take", "get_many"])
def test_what_a_dead_process_held_comes_back_to_a_queue_that_is_never_empty(how: str) -> None:
    queue = shlock.Queue()
    queue.put_many(range(2))
    die_with(queue)
    give_up = time.monotonic() + PATIENCE
    number, seen = 2, []
    while 0 not in seen:
        assert time.monotonic() < give_up
        queue.put(number)
        number += 1
        if how == "get":
            seen.append(queue.get())
        elif how == "get_many":
            seen += queue.get_many(1)
        else:
            with queue.take() as item:
                seen.append(item)
        assert not queue.empty()


def test_128_items_of_the_dead_come_back_to_who_waits_for_a_slot() -> None:
    queue = shlock.Queue()
    queue.put_many(range(_taken.SLOTS + 1))
    die_with(queue, _taken.SLOTS)
    seen = []
    for _ in range(_taken.SLOTS + 1):
        with queue.take(timeout=PATIENCE) as item:
            seen.append(item)
    assert seen == list(range(_taken.SLOTS + 1))
    queue.get_many(1, block=False) if queue.qsize() else None
    assert_sound(queue)


# -- overwritten memory ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["head", "tail", "state", "after", "length", "taking", "returned", "kept", "done", "word", "data"]),
            st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 129, 130, 2**32, 2**40, 2**63])),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["held", "returned", "waiting"]),
    st.sampled_from([None, 20_000]),
)
def test_overwritten_words_are_an_error_and_never_a_crash_or_a_hang(
    words: list[tuple[str, int]], when: str, size: int | None
) -> None:
    queue = shlock.JoinableQueue(size=size, max_deliveries=3)
    slots = queue._slots
    queue.put_many([1, b"x" * 5000])
    taken = queue.take()
    if when != "waiting":
        taken.__enter__()
    if when == "returned":
        taken.__exit__(Failed, Failed(), None)
    slot = slots.slot(0)
    places = {
        "head": queue._in.head,
        "tail": queue._in.tail,
        "state": slot.state,
        "after": slot.after,
        "length": slot.length,
        "taking": slots.taking,
        "returned": slots.returned,
        "kept": slots.kept,
        "done": slots.done_block.word,
        "word": slot.word,
    }
    for what, value in words:
        if what == "data":
            queue._out.words[value % 512] = value
        else:
            slots.view[places[what]] = value
    calls: list[Callable[[], Any]] = [
        lambda: queue.get(timeout=0),
        lambda: queue.take(False).__enter__(),
        lambda: queue.put(1, False),
        lambda: queue.put_many([1, b"y" * 3000], block=False),
        lambda: queue.get_many(3, block=False),
        lambda: queue.dead_letters.get(False),
        queue.qsize,
        queue.empty,
        queue.full,
        queue.task_done,
        lambda: taken.__exit__(None, None, None) if when == "held" else None,
        lambda: repr(queue),
        lambda: queue.waiters,
    ]
    limits = pytest.MonkeyPatch()
    limits.setattr(_taken, "COURTESY", 0.01)
    try:
        for call in calls:
            with contextlib.suppress(Exception):  # whatever is unpickled may raise anything; a signal or a hang is the failure
                call()
    finally:
        limits.undo()


def test_a_slot_that_says_too_much_is_called_damaged() -> None:
    queue = shlock.Queue(size=20_000)
    queue.put("a")
    fail(queue)
    slot = queue._slots.slot(0)
    slot.view[slot.length] = 1 << 40
    for call in (queue.get, lambda: queue.take().__enter__()):
        with pytest.raises(shlock.SegmentError, match="longer than there is room for"):
            call()
    slot.view[slot.length] = 5
    with pytest.raises(pickle.UnpicklingError):
        queue.get()


def test_a_segment_of_another_shape_is_no_queue(domain: str) -> None:
    queue = shlock.Queue(name="q", domain=domain, size=5000)
    control = queue._memory.control(0)
    words = queue._memory.arena.words
    words.store(control.start + at.BLOCK_PARAMETER, 6000 * 100)
    with pytest.raises(shlock.SegmentError):
        shlock.Queue(name="q", domain=domain)
    words.store(control.start + at.BLOCK_PARAMETER, 1 << 62)
    with pytest.raises(shlock.SegmentError):
        shlock.Queue(name="q", domain=domain)


# -- leases ---------------------------------------------------------------------------------------------------------------


def test_a_holder_that_overruns_is_killed_and_its_item_comes_back_with_the_count(domain: str) -> None:
    def create() -> None:
        queue = shlock.JoinableQueue(name="q", domain=domain, lease=60.0, max_deliveries=3)
        queue.put("work")

    def overrun() -> None:
        queue = shlock.JoinableQueue(name="q", domain=domain, lease=SHORT)
        taken = queue.take(timeout=PATIENCE)
        with taken:
            assert taken.lease is not None
            assert taken.lease.remaining() <= SHORT
            spin()

    def finish() -> tuple[Any, int]:
        queue = shlock.JoinableQueue(name="q", domain=domain)
        taken = queue.take(timeout=PATIENCE)
        with taken as item:
            assert queue.contracts
        queue.join()
        return item, taken.deliveries

    kept = Child(lambda: (create(), signal.pause()))
    eventually(lambda: supervisor_of(domain))
    for _ in range(2):
        assert Child(overrun).wait() == -signal.SIGKILL
    assert Child(finish).result() == ("work", 3)
    assert events(domain, "killed") or True
    kept.kill()


def test_a_queue_that_is_only_received_from_cannot_be_put_to_and_buries_all_the_same(domain: str) -> None:
    def receive() -> list[Any]:
        queue = shlock.Queue(name="q", domain=domain, lease=60.0, operations=("receive",))
        with pytest.raises(shlock.ContractDenied, match="only receive"):
            queue.put(1)
        with pytest.raises(shlock.ContractDenied, match="only receive"):
            queue.put(1, False)
        with pytest.raises(shlock.ContractDenied, match="only receive"):
            queue.put_many([1])
        fail(queue)
        found = [queue.get(timeout=PATIENCE)]
        found.append(queue.dead_letters.get(timeout=PATIENCE))
        return found

    def send() -> None:
        queue = shlock.Queue(name="q", domain=domain, operations=("send",), lease=60.0)
        queue.put("third")
        for call in (lambda: queue.get(timeout=1), lambda: queue.get_many(1), lambda: queue.take(timeout=1).__enter__()):
            with pytest.raises(shlock.ContractDenied, match="only send"):
                call()

    def create() -> None:
        queue = shlock.Queue(name="q", domain=domain, lease=60.0, max_deliveries=1)
        queue.put_many(["first", "second"])
        page[0] = 1
        signal.pause()

    page = Page(1)
    kept = Child(create)
    eventually(lambda: page[0] or not kept.is_alive())
    assert Child(receive).result() == ["second", "first"]
    Child(send).result()
    kept.kill()


def test_put_many_without_memory_says_how_many_it_put(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = shlock.Queue()
    left = [3]
    reserve = type(_sys.SYSTEM).reserve

    def scarce(*arguments: Any) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        reserve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(_sys.SYSTEM), "reserve", scarce)
        with pytest.raises(OSError, match="No space") as caught:
            queue.put_many([bytes([number]) * LARGE for number in range(20)])
    found = [item[0] for item in drain(queue)]
    assert found == list(range(caught.value.put))  # type: ignore[attr-defined]
    assert 1 <= len(found) < 20
    assert_sound(queue)


# -- against a model ------------------------------------------------------------------------------------------------------


class AsAModel(RuleBasedStateMachine):
    """One thread puts, gets, takes, fails and acknowledges in any order; lists say what must come."""

    most_deliveries = 3

    def __init__(self) -> None:
        super().__init__()
        self.queue = shlock.JoinableQueue(12, size=60_000, max_deliveries=self.most_deliveries)
        self.waiting: list[tuple[int, int]] = []  # number, deliveries
        self.returned: list[tuple[int, int]] = []
        self.held: list[tuple[Any, int]] = []
        self.buried: list[int] = []
        self.unfinished = 0
        self.number = 0

    def body(self, number: int) -> tuple[int, bytes]:
        return number, number.to_bytes(4, "big") * (number * 7919 % 2500)

    @rule(count=st.integers(1, 4), many=st.booleans())
    def put(self, count: int, many: bool) -> None:
        numbers = range(self.number, self.number + count)
        done = count
        try:
            if many:
                self.queue.put_many(map(self.body, numbers), block=False)
            else:
                for done, number in enumerate(numbers):
                    self.queue.put(self.body(number), False)
                done = count
        except Full as full:
            done = full.put if many else done  # type: ignore[attr-defined]
            assert self.queue.qsize() > 3
        self.waiting += [(number, 0) for number in numbers[:done]]
        self.number += done
        self.unfinished += done

    def expected(self) -> tuple[int, int] | None:
        while self.returned:
            self.returned.sort()
            number, deliveries = self.returned.pop(0)
            if deliveries < self.most_deliveries:
                return number, deliveries + 1
            self.buried.append(number)
            self.unfinished -= 1
        if self.waiting:
            number, deliveries = self.waiting.pop(0)
            return number, deliveries + 1
        return None

    @rule()
    def take(self) -> None:
        if len(self.held) > 5:
            return
        expected, taken = self.expected(), self.queue.take(False)
        try:
            item = taken.__enter__()
        except Empty:
            assert expected is None
            return
        assert expected == (item[0], taken.deliveries)
        assert item == self.body(item[0])
        self.held.append((taken, item[0]))

    @rule()
    def get(self) -> None:
        expected = self.expected()
        try:
            item = self.queue.get(False)
        except Empty:
            assert expected is None
            return
        assert expected is not None
        assert item == self.body(expected[0])
        self.queue.task_done()
        self.unfinished -= 1

    @rule(which=st.integers(0, 5), works=st.booleans())
    def leave(self, which: int, works: bool) -> None:
        if not self.held:
            return
        taken, number = self.held.pop(which % len(self.held))
        taken.__exit__(None if works else Failed, None, None)
        if works:
            self.unfinished -= 1
        else:
            self.returned.append((number, taken.deliveries))

    @rule()
    def read_letters(self) -> None:
        assert [item[0] for item in drain(self.queue.dead_letters)] == self.buried
        self.buried.clear()

    @invariant()
    def counts_are_right(self) -> None:
        assert self.queue.qsize() == len(self.waiting) + len(self.returned)
        assert self.queue._slots.unfinished() == self.unfinished

    def teardown(self) -> None:
        for taken, _ in self.held:
            taken.__exit__(None, None, None)
        drain(self.queue)
        assert_sound(self.queue)


class TestAsAModel(AsAModel.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
