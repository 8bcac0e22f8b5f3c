"""Channel: whole messages or none, in order, nothing dropped; views that end; everything that may be wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import BufferTooShort
from pathlib import Path
from typing import Any

import pytest
from support import (
    PATIENCE,
    Child,
    Page,
    end_process,
    eventually,
    is_sleeping,
    program_environment,
    supervisor_of,
)
from test_enforcement import spin
from test_signals import Interruption, InThread, Trial, interrupt_everywhere
from test_system_calls import calls_of_loop, tracing_works

import shlock
from shlock import Channel, _names, _parking, _ring, snapshot
from shlock import _layout as at
from shlock.errors import ContractDenied, SegmentError

SIZE = 100_000
LONG, SHORT = 60.0, 0.05

try:
    import numpy
except ModuleNotFoundError:
    numpy = None  # type: ignore[assignment]
pytestmark = pytest.mark.patience(60)
needs_numpy = pytest.mark.skipif(numpy is None, reason="numpy is not installed")


@pytest.fixture
def domain(domain: str) -> Iterator[str]:
    """As everywhere; its supervisor ends with the test, and the files of its channels go."""
    yield domain
    pid = supervisor_of(domain)
    if pid is not None:
        end_process(pid, signal.SIGTERM)

    def is_clean() -> bool:
        gc.collect()
        snapshot.clean(domain)
        return not [name for name in os.listdir("/dev/shm") if name.startswith(f"{_names.segment_name(domain)}=")]

    eventually(is_clean, "its channels are gone", 10)


@pytest.fixture
def channel() -> Channel:
    return Channel(size=SIZE)


@pytest.fixture
def other(channel: Channel) -> Channel:
    return channel.other_end()


def fill(channel: Channel, message: bytes = bytes(1000)) -> int:
    """Send until there is no more room, even for a small one; how many."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            channel.send_bytes(message, timeout=0)
            count += 1
    with contextlib.suppress(TimeoutError):
        while True:
            channel.send_bytes(b"", timeout=0)
            count += 1
    return count


def drain(channel: Channel) -> list[bytes]:
    found = []
    while channel.poll():
        found.append(channel.recv_bytes())
    return found


def locks_of(channel: Channel) -> list[Any]:
    return [channel._out.lock, channel._in.lock]


def assert_usable(channel: Channel, other: Channel) -> None:
    """Nobody holds or waits for anything, and messages go both ways."""
    assert not any(lock.locked() for lock in (*locks_of(channel), *locks_of(other)))
    assert channel.waiters == ()
    for one, two in ((channel, other), (other, channel)):
        drain(two)
        one.send_bytes(b"x" * one.size)
        assert two.recv_bytes(timeout=PATIENCE) == b"x" * one.size


# -- messages -------------------------------------------------------------------------------------------------------------


def test_what_one_end_sends_the_other_receives_in_order(channel: Channel, other: Channel) -> None:
    for one, two in ((channel, other), (other, channel)):
        for number in range(1000):
            one.send_bytes(b"%d" % number, timeout=1 if number % 2 else None)
            if number % 3 == 0:
                one.send(number)
        for number in range(1000):
            assert two.recv_bytes(timeout=1 if number % 5 else None) == b"%d" % number
            if number % 3 == 0:
                assert two.recv() == number
        assert not one.poll()
        assert not two.poll()


def test_ends_with_the_same_name_meet_in_other_processes(domain: str) -> None:
    channel = Channel("c", size=SIZE, domain=domain, privileged=True)

    def answer() -> str:
        user = Channel("c", domain=domain)
        user.send([user.recv(), user.size, user.privileged])
        return repr(user)

    channel.send("question")
    assert Child(answer).result() == "<Channel('c', user end, 0 to receive, 1 sent and not received)>"
    assert channel.recv() == ["question", SIZE, False]
    assert repr(channel) == "<Channel('c', privileged end, 0 to receive, 0 sent and not received)>"


OBJECTS = [
    None, 1, "text", b"", b"bytes", bytes(90_000), bytearray(b"array"), bytearray(50_000), [1, {2: (3,)}], 1.5, {1, 2},
    [bytearray(5000), bytearray(6000), b"x" * 5000], Path("path"), OSError(2, "no"),
]  # fmt: skip


@pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: type(obj).__name__)
def test_objects_arrive_as_they_were_sent(obj: Any, channel: Channel, other: Channel) -> None:
    for timeout in (None, PATIENCE):
        channel.send(obj, timeout=timeout)
        got = other.recv(timeout=timeout)
        assert type(got) is type(obj)
        assert repr(got) == repr(obj)


def test_a_pickle_is_what_recv_bytes_gives_of_an_object_as_in_multiprocessing(channel: Channel, other: Channel) -> None:
    for obj in OBJECTS[:-1]:
        channel.send(obj)
        assert pickle.loads(other.recv_bytes()) == obj
        channel.send_bytes(pickle.dumps(obj))
        assert other.recv() == obj
        channel.send(obj)
        assert pickle.loads(other.recv_many(1)[0]) == obj


class Big:
    """An object that gives its buffer as numpy's arrays do."""

    def __init__(self, content: bytearray) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> Any:
        assert protocol == 5
        return bytearray, (pickle.PickleBuffer(self.content),)


def test_large_buffers_go_beside_the_pickle_and_are_copied_once(channel: Channel, other: Channel) -> None:
    big = bytearray(os.urandom(50_000))
    channel.send(Big(big))
    with pytest.raises(KeyError), other.peek() as view:
        raw = bytes(view)
        raise KeyError
    assert len(raw) < 51_000
    assert bytes(big) in raw
    got = other.recv()
    assert got == big
    big[0] ^= 1
    assert got != big


@needs_numpy
def test_arrays_arrive_writable_and_belong_to_who_received_them(channel: Channel, other: Channel) -> None:
    for arrays in (
        [numpy.arange(10_000)],
        [numpy.arange(3), numpy.ones((50, 70), "f4"), numpy.array([], "u1")],
        [numpy.asfortranarray(numpy.arange(6000.0).reshape(60, 100)), numpy.arange(9000)[::2]],
    ):
        for receive in (other.recv, lambda: pickle.loads(other.recv_many(3)[0])):
            channel.send(arrays)
            got = receive()
            channel.send(arrays)  # in the same memory
            for one, two in zip(got, arrays, strict=True):
                assert (one == two).all()
                assert one.dtype == two.dtype
                if receive == other.recv:
                    assert one.flags.writeable
                    one[...] = 0
            assert all((one == two).all() for one, two in zip(other.recv(), arrays, strict=True))


def test_send_bytes_takes_what_multiprocessing_takes(channel: Channel, other: Channel) -> None:
    import array

    data = b"abcdefghij"
    for arguments, wanted in (
        ((data,), data),
        ((data, 3), data[3:]),
        ((data, 3, 4), data[3:7]),
        ((data, 10), b""),
        ((data, 10, 0), b""),
        ((bytearray(data), 1), data[1:]),
        ((memoryview(data)[2:],), data[2:]),
    ):
        channel.send_bytes(*arguments)
        assert other.recv_bytes() == wanted
    numbers = array.array("i", [1, 2, 3])
    channel.send_bytes(numbers)
    into = array.array("i", bytes(40))
    assert other.recv_bytes_into(into, 8) == 12
    assert list(into[2:5]) == [1, 2, 3]
    for arguments in ((data, 11), (data, -1), (data, 5, 6), (data, 5, -1)):
        with pytest.raises(ValueError):
            channel.send_bytes(*arguments)
    for wrong in ("text", 5, None, [1]):
        with pytest.raises(TypeError):
            channel.send_bytes(wrong)
    assert not other.poll()


def test_recv_bytes_into_takes_nothing_if_the_buffer_is_wrong_and_gives_all_if_it_is_short(
    channel: Channel, other: Channel
) -> None:
    channel.send_bytes(b"0123456789")
    for buffer, offset, error in ((bytearray(5), -1, ValueError), (bytearray(5), 6, ValueError), (bytes(20), 0, TypeError)):
        with pytest.raises(error):
            other.recv_bytes_into(buffer, offset)
    with pytest.raises(BufferTooShort) as caught:
        other.recv_bytes_into(bytearray(12), 3)
    assert caught.value.args == (b"0123456789",)
    assert not other.poll()


def test_a_message_longer_than_maxlength_raises(channel: Channel, other: Channel) -> None:
    for _ in range(2):
        channel.send_bytes(b"12345")
    assert other.recv_bytes(5) == b"12345"
    with pytest.raises(OSError, match="a message of 5 bytes, and at most 4 are wanted"):
        other.recv_bytes(4)
    with pytest.raises(ValueError, match="negative"):
        other.recv_bytes(-1)


def test_many_are_sent_and_received_at_once(channel: Channel, other: Channel) -> None:
    messages = [b"%d" % number * (number % 50) for number in range(500)]
    channel.send_many(messages)
    assert channel.other_end().qsize() == 500
    got: list[bytes] = []
    while len(got) < 500:
        got += other.recv_many(77)
    assert got == messages
    with pytest.raises(ValueError):
        other.recv_many(0)
    sent = fill(channel)
    with pytest.raises(TimeoutError) as caught:
        channel.send_many([b"x"] * 10, timeout=0.01)
    assert caught.value.sent == 0  # type: ignore[attr-defined]
    assert len(drain(other)) == sent


# -- in place -------------------------------------------------------------------------------------------------------------


def test_a_reserved_view_is_sent_at_the_end_of_the_block(channel: Channel, other: Channel) -> None:
    for size in (0, 1, 5, 4096, SIZE):
        with channel.reserve(size) as view:
            assert len(view) == size
            view[:] = b"r" * size
            assert not other.poll()
        assert other.recv_bytes() == b"r" * size


def test_a_reservation_can_be_cut_short_and_keeps_no_memory(channel: Channel, other: Channel) -> None:
    for number in range(100):
        reservation = channel.reserve(SIZE)
        with reservation as view:
            view[:3] = b"abc"
            reservation.truncate(3)
            with pytest.raises(ValueError):
                reservation.truncate(4)
        assert other.recv_bytes() == b"abc", number


def test_a_reservation_that_is_left_by_an_exception_sends_nothing(channel: Channel, other: Channel) -> None:
    for _ in range(100):
        with pytest.raises(KeyError), channel.reserve(50_000) as view:
            view[:] = b"x" * 50_000
            raise KeyError
        assert not other.poll()
    assert_usable(channel, other)


def test_a_peeked_message_is_taken_at_the_end_of_the_block_but_not_after_an_exception(channel: Channel, other: Channel) -> None:
    for message in (b"", b"small", b"l" * SIZE):
        channel.send_bytes(message)
        with pytest.raises(KeyError), other.peek() as view:
            raise KeyError
        with other.peek() as view:
            assert view == message
            with pytest.raises(TypeError):
                view[:] = view
            assert other.qsize() == 1
        assert other.qsize() == 0
    with pytest.raises(TimeoutError), other.peek(timeout=0.01):
        pass


def test_views_end_with_their_block(channel: Channel, other: Channel) -> None:
    with channel.reserve(100) as view:
        pass
    with other.peek() as seen:
        pass
    for dead in (view, seen):
        with pytest.raises(ValueError, match="released"):
            dead[0]


def test_what_is_kept_of_a_view_is_cut_off(channel: Channel, other: Channel) -> None:
    """Neither writing to it nor reading from it reaches anybody's message, nor does anything crash."""
    kept = []
    for length in (10, 5000, SIZE):
        with channel.reserve(length) as view:
            view[:] = b"s" * length
            kept += [view[1:], view.cast("b"), memoryview(view)]
        for part in kept:
            part[0] = 0 if part.format == "b" else 88
        assert other.recv_bytes() == b"s" * length
        channel.send_bytes(b"p" * length)
        with other.peek() as view:
            seen = view[:9]
        for _ in range(20):
            channel.send_bytes(b"q" * length)
            assert other.recv_bytes() == b"q" * length
        assert seen == b"p" * min(9, length)


@needs_numpy
def test_arrays_over_views_are_cut_off_and_keep_what_they_saw(channel: Channel, other: Channel) -> None:
    with channel.reserve(80_000) as view:
        written = numpy.frombuffer(view, "i8")
        written[:] = 7
    written[:] = 8
    with other.peek() as view:
        read = numpy.frombuffer(view, "i8")
        assert (read == 7).all()
    for _ in range(20):
        channel.send_bytes(bytes(80_000))
        assert other.recv_bytes() == bytes(80_000)
    assert (read == 7).all()
    assert (written == 8).all()
    assert_usable(channel, other)


def test_one_cannot_send_within_ones_own_reservation_nor_receive_within_ones_own_peek(channel: Channel, other: Channel) -> None:
    """It would wait for itself."""
    channel.send_bytes(b"first")
    with channel.reserve(5) as view, other.peek() as seen:
        view[:] = b"hello"
        assert seen == b"first"
        for use in (
            lambda: channel.send_bytes(b"x"),
            lambda: channel.send_bytes(b"x", timeout=1),
            lambda: channel.send_many([b"x"]),
            lambda: channel.reserve(1).__enter__(),
            lambda: other.recv_bytes(),
            lambda: other.recv_bytes(timeout=1),
            lambda: other.recv_many(2),
            lambda: other.peek().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="this thread is inside already"):
                use()
    assert drain(other) == [b"hello"]
    assert_usable(channel, other)


def test_others_wait_while_a_message_is_made_or_read_in_place(channel: Channel, other: Channel) -> None:
    with channel.reserve(3) as view:
        thread = InThread(lambda: channel.send_bytes(b"second"))
        eventually(lambda: thread.is_parked_at(channel))
        with pytest.raises(TimeoutError, match="others were busy"):
            InThread(lambda: channel.send_bytes(b"never", timeout=0.01)).result()
        view[:] = b"one"
    thread.result()
    with other.peek() as view:
        thread = InThread(other.recv_bytes)
        eventually(lambda: thread.is_parked_at(other))
        assert view == b"one"
    assert thread.result() == b"second"


def test_a_block_in_place_is_used_once_and_left_by_the_thread_that_entered(channel: Channel, other: Channel) -> None:
    reservation = channel.reserve(1)
    with reservation:
        pass
    with pytest.raises(ValueError, match="used already"), reservation:
        pass
    assert other.recv_bytes() == b"\0"
    left = channel.reserve(1)
    left.__enter__()
    with pytest.raises(RuntimeError, match="not held by this thread any more"):
        InThread(lambda: left.__exit__(None, None, None)).result()
    assert not other.poll()
    channel._out.lock.release()


@pytest.mark.parametrize("size", [-1, 1.0, "1", True, None])
def test_a_reservation_of_a_wrong_size_is_refused(size: Any, channel: Channel) -> None:
    with pytest.raises((TypeError, ValueError), match="size must"):
        channel.reserve(size)


# -- waiting --------------------------------------------------------------------------------------------------------------


def test_a_full_channel_makes_senders_wait_and_drops_nothing(channel: Channel, other: Channel) -> None:
    sent = fill(channel)
    thread = InThread(lambda: channel.send_bytes(b"last"))
    eventually(lambda: thread.is_parked_at(channel))
    got = []
    while not got or got[-1] != b"last":
        got.append(other.recv_bytes(timeout=PATIENCE))
    thread.result()
    assert len(got) == sent + 1


@pytest.mark.parametrize("timeout", [0, 0.03, -1])
def test_timeouts_are_kept(timeout: float, channel: Channel, other: Channel) -> None:
    def times_out(call: Callable[[], Any]) -> None:
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            call()
        assert time.monotonic() - begun >= timeout

    begun = time.monotonic()
    assert other.poll(timeout) is False
    assert time.monotonic() - begun >= timeout
    for call in (
        lambda: other.recv(timeout=timeout),
        lambda: other.recv_bytes(timeout=timeout),
        lambda: other.recv_many(3, timeout=timeout),
        lambda: other.recv_bytes_into(bytearray(9), timeout=timeout),
        lambda: other.peek(timeout=timeout).__enter__(),
    ):
        times_out(call)
    sent = fill(channel)
    for call in (
        lambda: channel.send(bytearray(9000), timeout=timeout),
        lambda: channel.send_bytes(b"x", timeout=timeout),
        lambda: channel.send_many([b"x"], timeout=timeout),
        lambda: channel.reserve(1, timeout=timeout).__enter__(),
    ):
        times_out(call)
    assert len(drain(other)) == sent
    with pytest.raises(ValueError, match="NaN"):
        other.recv(timeout=math.nan)
    assert_usable(channel, other)


def test_poll_wakes_up_for_a_message_and_leaves_it_to_others(
    channel: Channel, other: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 1e6)
    poller = InThread(lambda: other.poll(None))
    eventually(lambda: poller.is_parked_at(other))
    receiver = InThread(other.recv_bytes)
    eventually(lambda: receiver.is_parked_at(other))
    channel.send_bytes(b"x")
    assert poller.result() is True
    assert receiver.result() == b"x"


@pytest.mark.parametrize("first", ["send_bytes", "send with a timeout", "send_many", "reserve", "reserve in vain"])
def test_a_sender_that_was_woken_wakes_the_next_one(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 1e6)
    monkeypatch.setattr(_parking, "LONGEST_POLL_INTERVAL", 1e6)
    channel = Channel(size=20_000)
    other = channel.other_end()
    fill(channel)

    def in_vain() -> None:
        with contextlib.suppress(KeyError), channel.reserve(5):
            raise KeyError

    ways: dict[str, Callable[[], Any]] = {
        "send_bytes": lambda: channel.send_bytes(b"1"),
        "send with a timeout": lambda: channel.send(1, timeout=1e6),
        "send_many": lambda: channel.send_many([b"1", b"2"]),
        "reserve": lambda: reserve_new(channel, other),
        "reserve in vain": in_vain,
    }
    threads = []
    for way in (ways[first], ways["send_bytes"], ways["reserve"]):
        threads.append(InThread(way))
        eventually(lambda: threads[-1].is_parked_at(channel))
    while not any(thread.is_over() for thread in threads) and other.qsize() > 12:
        other.recv_bytes()  # until it makes room, which wakes one of them
    for thread in threads:
        thread.result()


@pytest.mark.parametrize("first", ["recv", "recv with a timeout", "recv_many", "peek", "peek in vain", "poll"])
def test_a_receiver_that_was_woken_wakes_the_next_one(
    first: str, channel: Channel, other: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 1e6)
    monkeypatch.setattr(_parking, "LONGEST_POLL_INTERVAL", 1e6)

    def in_vain() -> None:
        with contextlib.suppress(KeyError), other.peek():
            raise KeyError

    ways: dict[str, Callable[[], Any]] = {
        "recv": other.recv,
        "recv with a timeout": lambda: other.recv(timeout=1e6),
        "recv_many": lambda: other.recv_many(1),
        "peek": lambda: peek_old(channel, other),
        "peek in vain": in_vain,
        "poll": lambda: other.poll(None),
    }
    threads = []
    for way in (ways[first], ways["recv"], ways["peek"]):
        threads.append(InThread(way))
        eventually(lambda: threads[-1].is_parked_at(other))
    with monkeypatch.context() as patched:
        patched.setattr(_ring.Producer, "wake", lambda *_: None)  # all three messages come before anybody is woken
        for number in range(3):
            channel.send(number)
    channel._out.tell()
    for thread in threads:
        thread.result()


def test_threads_of_one_process_share_both_ends(channel: Channel, other: Channel) -> None:
    got: list[list[int]] = [[], [], []]

    def produce(first: int) -> None:
        for number in range(first, first + 1000):
            if number % 10:
                channel.send(number)
            else:
                with channel.reserve(20_000) as view:
                    data = pickle.dumps(number)
                    view[: len(data)] = data

    def consume(mine: list[int]) -> None:
        while True:
            if len(mine) % 7:
                number = other.recv()
            else:
                with other.peek() as view:
                    number = pickle.loads(view)
            if number < 0:
                return
            mine.append(number)

    consumers = [InThread(lambda mine=mine: consume(mine)) for mine in got]
    producers = [InThread(lambda number=number: produce(1000 * number)) for number in range(3)]
    for thread in producers:
        thread.result()
    for _ in consumers:
        channel.send(-1)
    for thread in consumers:
        thread.result()
    assert sorted(number for mine in got for number in mine) == list(range(3000))
    for mine in got:
        for first in (0, 1000, 2000):
            part = [number for number in mine if first <= number < first + 1000]
            assert part == sorted(part), "those of one producer come in order"


# -- fork and pickling ----------------------------------------------------------------------------------------------------


def test_a_child_that_is_forked_inside_a_block_has_neither_the_view_nor_the_message(channel: Channel, other: Channel) -> None:
    channel.send_bytes(b"for the parent")

    def in_child(view: memoryview, block: Any) -> tuple[bytes, str]:
        try:
            view[0]
        except ValueError as error:
            text = str(error)
        block.__exit__(None, None, None)  # as if it had left the block by itself
        return text, other.qsize()

    reservation = channel.reserve(6)
    with reservation as view:
        text, count = Child(in_child, view, reservation).result()
        assert "released" in text
        assert count == 1
        view[:] = b"second"
    peek = other.peek()
    with peek as view:
        assert Child(in_child, view, peek).result()[1] == 2
        assert view == b"for the parent"
    assert drain(other) == [b"second"]
    assert_usable(channel, other)


def test_a_fork_while_threads_wait_leaves_parent_and_child_able_to_send_and_receive(channel: Channel, other: Channel) -> None:
    waiting = InThread(other.recv_bytes)
    eventually(lambda: waiting.is_parked_at(other))
    back = InThread(channel.recv_bytes)
    eventually(lambda: back.is_parked_at(channel))
    parent_has_its_message = shlock.Event()

    def in_child() -> bytes:
        channel.send_bytes(b"from the child")
        other.send_bytes(b"from the child, too")
        assert parent_has_its_message.wait(PATIENCE)
        return other.recv_bytes(timeout=PATIENCE)

    child = Child(in_child)
    assert waiting.result() == b"from the child"
    assert back.result() == b"from the child, too"
    parent_has_its_message.set()
    channel.send_bytes(b"to the child")
    assert child.result() == b"to the child"
    assert_usable(channel, other)


def echo(channel: Channel) -> None:
    while (message := channel.recv(timeout=PATIENCE)) is not None:
        channel.send((os.getpid(), message, channel.privileged))


@pytest.mark.patience(120)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("kind", ["named", "anonymous"])
def test_a_channel_travels_to_a_process_that_is_started_by(method: str, kind: str, domain: str) -> None:
    context = multiprocessing.get_context(method)
    channel = Channel("c", size=SIZE, domain=domain) if kind == "named" else Channel(size=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=echo, args=(channel.other_end(),))
        process.start()
    for message in ("text", b"b" * 50_000, list(range(1000))):
        channel.send(message)
        assert channel.recv(timeout=PATIENCE) == (process.pid, message, True)
    channel.send(None)
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_a_channel_with_a_name_can_be_pickled_and_one_without_cannot(domain: str) -> None:
    named = Channel("c", size=SIZE, domain=domain, privileged=True)
    copy = pickle.loads(pickle.dumps(named))
    assert (copy.name, copy.domain, copy.size, copy.privileged) == ("c", domain, SIZE, True)
    named.other_end().send(5)
    assert copy.recv() == 5
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(Channel(size=SIZE))
    named.close()
    with pytest.raises(OSError, match="closed"):
        pickle.dumps(named)


# -- what may be wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "error", "text"),
    [
        (0, ValueError, "at least one byte"),
        (-1, ValueError, "at least one byte"),
        (True, TypeError, "number of bytes"),
        (1.5, TypeError, "number of bytes"),
        ("1", TypeError, "number of bytes"),
        (1 << 40, OSError, "no memory"),
        (1 << 70, OSError, "no memory"),
    ],
)
@pytest.mark.parametrize("make", [Channel, lambda size: shlock.Pipe(size=size)], ids=["Channel", "Pipe"])
def test_a_size_that_cannot_be_is_refused(size: Any, error: type[Exception], text: str, make: Any) -> None:
    with pytest.raises(error, match=text) as caught:
        make(size=size)
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.ENOSPC


def test_what_does_not_fit_into_dev_shm_is_an_error_at_creation(domain: str) -> None:
    facts = os.statvfs("/dev/shm")
    total = facts.f_blocks * facts.f_frsize
    size = min(total // 2, 1 << 33)
    if 4 * size <= total:
        pytest.skip("there may be memory for the largest channel")
    for make in (lambda: Channel(size=size), lambda: Channel("c", size=size, domain=domain), lambda: shlock.Pipe(size=size)):
        with pytest.raises(OSError) as caught:
            make()
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SegmentError, match="there is no 'c'"):
        Channel("c", domain=domain)


def test_an_attach_that_does_not_fit_names_both(domain: str) -> None:
    Channel("c", size=1000, domain=domain).send(1)
    shlock.Block("b", size=1000, domain=domain)
    kept = Channel("c", domain=domain), shlock.Block("b", domain=domain)
    for make, texts in (
        (lambda: Channel("c", size=2000, domain=domain), ("a Channel of 1000 bytes", "a Channel of 2000 bytes is wanted")),
        (
            lambda: Channel("b", domain=domain),
            ("a Block of 1000 bytes", "a Channel is wanted"),
        ),
        (lambda: Channel("b", size=1000, domain=domain), ("a Block of 1000 bytes", "a Channel of 1000 bytes is wanted")),
        (lambda: shlock.Block("c", size=1000, domain=domain), ("a Channel of 1000 bytes", "a Block of 1000 bytes is wanted")),
        (lambda: Channel("c", domain=domain, lease=1.0), ("a Channel of 1000 bytes", "without a lease")),
        (lambda: Channel("d", domain=domain), ("there is no 'd'", "Give a size")),
    ):
        for where in (lambda make=make: make(), lambda make=make: Child(attempt, make).result()):
            if where is not None:
                with pytest.raises(SegmentError) as caught:
                    error = where()
                    if isinstance(error, SegmentError):
                        raise error
                for text in texts:
                    assert re.search(text, str(caught.value)), str(caught.value)
    del kept


def attempt(make: Callable[[], Any]) -> BaseException | None:
    try:
        make()
    except SegmentError as error:
        return error
    return None


@pytest.mark.parametrize(
    "options",
    [
        {"domain": "d"},
        {"name": "", "size": 1},
        {"name": 5, "size": 1},
        {"name": "x" * 300, "size": 1},
        {"name": "c", "size": 1, "domain": "/machine"},
        *({"size": 1, option: value} for option, value in (("grace", 1.0), ("rank", 1), ("operations", ("send",)))),
        {"size": 1, "lease": -1},
        {"size": 1, "lease": 1.0, "operations": ("acquire",)},
    ],
    ids=repr,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Channel(options.pop("name", None), **options)


def test_a_message_larger_than_the_channel_is_refused_before_anything_is_written(channel: Channel, other: Channel) -> None:
    longest = channel._out.longest
    assert SIZE <= longest < SIZE * 5 // 4
    for send in (
        lambda: channel.send_bytes(bytes(longest + 1)),
        lambda: channel.send_bytes(bytes(longest + 1), timeout=1),
        lambda: channel.send(bytearray(longest)),
        lambda: channel.send("x" * (longest + 1)),
        lambda: channel.send_many([b"a", b"b", bytes(longest + 1)]),
        lambda: channel.reserve(longest + 1).__enter__(),
    ):
        with pytest.raises(ValueError, match=f"a message of [0-9]+ bytes; the longest that fits has {longest}"):
            send()
        assert not other.poll()
    assert_usable(channel, other)


class CannotBePickled:
    def __reduce__(self) -> Any:
        raise KeyError("not me")


def test_of_an_object_that_cannot_be_pickled_nothing_is_sent(channel: Channel, other: Channel) -> None:
    for obj in (CannotBePickled(), [bytearray(9000), CannotBePickled()], [1, lambda: 0], threading.Lock(), {1: iter([])}):
        with contextlib.suppress(KeyError, AttributeError, TypeError, pickle.PicklingError):
            channel.send(obj)
            if isinstance(obj, dict):
                other.recv()
                continue
            pytest.fail("it was sent")
        assert not other.poll()
        channel.send([1, bytearray(9000)])
        assert other.recv() == [1, bytearray(9000)]


def test_close_is_final_and_can_be_repeated(channel: Channel, other: Channel) -> None:
    channel.send(1)
    with channel as same:
        assert same is channel
    channel.close()
    assert channel.closed
    assert repr(channel) == "<Channel (closed)>"
    for use in (
        lambda: channel.send(CannotBePickled()),
        lambda: channel.send_bytes(b""),
        lambda: channel.send_many([b"x"]),
        lambda: channel.recv(),
        lambda: channel.recv_bytes(),
        lambda: channel.recv_many(1),
        lambda: channel.recv_bytes_into(bytearray(5)),
        lambda: channel.poll(),
        lambda: channel.qsize(),
        lambda: channel.reserve(1).__enter__(),
        lambda: channel.peek().__enter__(),
    ):
        with pytest.raises(OSError, match="the channel is closed"):
            use()
    assert other.recv() == 1
    assert not other.closed


def test_a_channel_that_is_closed_while_a_view_is_out_is_closed_when_the_block_ends(channel: Channel, other: Channel) -> None:
    with channel.reserve(5) as view:
        channel.close()
        view[:] = b"still"
    assert other.recv_bytes() == b"still"


DAMAGES = {
    "parameter": lambda channel: (channel._memory.control(0).start + at.BLOCK_PARAMETER, 5),
    "no size": lambda channel: (channel._memory.control(0).start + at.BLOCK_PARAMETER, 0),
    "huge size": lambda channel: (channel._memory.control(0).start + at.BLOCK_PARAMETER, 2**63),
    "kind": lambda channel: (channel._memory.control(0).start + at.BLOCK_KIND, at.LOCK),
    "no kind": lambda channel: (channel._memory.control(0).start + at.BLOCK_KIND, 200),
    "data": lambda channel: (at.HEADER_DATA, 4096),
    "much data": lambda channel: (at.HEADER_DATA, 2**62),
    "blocks": lambda channel: (at.HEADER_BLOCKS, 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_channel_is_refused_by_who_opens_it(damage: str, domain: str) -> None:
    def create() -> None:
        channel = Channel("c", size=SIZE, domain=domain)
        place, value = DAMAGES[damage](channel)
        channel._memory.arena.words.view[place] = value

    Child(create).result()
    error = Child(attempt, lambda: Channel("c", domain=domain)).result()
    assert isinstance(error, SegmentError), "it was opened"
    assert str(error)
    for name in os.listdir("/dev/shm"):
        if name.startswith(f"{_names.segment_name(domain)}="):
            os.unlink(f"/dev/shm/{name}")


def test_a_damaged_message_with_buffers_is_an_error(channel: Channel, other: Channel) -> None:
    for place, value in ((0, 0), (0, 2**63), (0, 10**6), (8, 2**63), (16, 90_000), (16, 2**64 - 1)):
        channel.send([Big(bytearray(9000))])
        reader = other._in
        with other.peek() as view:
            length = len(view)
        channel.send([Big(bytearray(9000))])
        start = (reader.view[reader.head] & _ring.PLACE) << 3
        with memoryview(other._memory.map(reader.geometry.first + reader.geometry.table, reader._mapped)) as data:
            where, word = reader.follow(start, [])
            assert word & _ring.LENGTH == length
            data[where + 8 + place : where + 16 + place] = value.to_bytes(8, "little")
        with pytest.raises(ValueError, match="a message with buffers was overwritten"):
            other.recv()
        assert_usable(channel, other)


# -- signals --------------------------------------------------------------------------------------------------------------


class InMessages(Trial):
    """One operation on a channel, with a message there and room; afterwards both ends are usable."""

    def __init__(self, operation: Callable[[Channel, Channel], Any], before: int = 1) -> None:
        self.channel = Channel(size=4000)
        self.other = self.channel.other_end()
        self.operation = operation
        self.before = before
        for _ in range(before):
            self.channel.send_bytes(b"before" * 300)
        self.result: Any = None

    def operate(self) -> None:
        self.result = self.operation(self.channel, self.other)

    def finish(self, outcome: Interruption) -> None:
        messages = drain(self.other)
        for message in messages:
            assert message in (b"before" * 300, b"new" * 300), "torn"
        news = messages.count(b"new" * 300)
        assert news <= 1
        if not outcome.raised:
            assert len(messages) == self.expected
        assert_usable_small(self.channel, self.other)

    expected = 1


def assert_usable_small(channel: Channel, other: Channel) -> None:
    for end in (channel, other):
        for lock in locks_of(end):
            if lock._words.is_mine():
                pytest.fail("a lock is held")
    for _ in range(8):
        channel.send_bytes(b"x" * 4000, timeout=PATIENCE)
        assert other.recv_bytes(timeout=PATIENCE) == b"x" * 4000
    assert_nothing_used(channel)


def assert_nothing_used(channel: Channel) -> None:
    table = channel._out.table.tobytes()
    assert table.count(_ring.USED) <= 2, "chunks are lost"


NEW = b"new" * 300


def reserve_new(channel: Channel, other: Channel) -> None:
    with channel.reserve(900) as view:
        view[:] = NEW


def reserve_and_keep(channel: Channel, other: Channel) -> None:
    with channel.reserve(900) as view:
        view[:] = NEW
        channel.kept = view[3:]  # type: ignore[attr-defined]


def peek_old(channel: Channel, other: Channel) -> None:
    with other.peek() as view:
        bytes(view)


OPERATIONS: dict[str, tuple[Callable[[Channel, Channel], Any], int]] = {
    "send_bytes": (lambda channel, other: channel.send_bytes(NEW), 2),
    "send_bytes with a timeout": (lambda channel, other: channel.send_bytes(NEW, timeout=5), 2),
    "send_many": (lambda channel, other: channel.send_many([NEW]), 2),
    "reserve": (reserve_new, 2),
    "reserve and keep": (reserve_and_keep, 2),
    "recv_bytes": (lambda channel, other: other.recv_bytes(), 0),
    "recv_bytes with a timeout": (lambda channel, other: other.recv_bytes(timeout=5), 0),
    "recv_many": (lambda channel, other: other.recv_many(1), 0),
    "peek": (peek_old, 0),
}


@pytest.mark.patience(300)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_is_interrupted_anywhere_leaves_whole_messages_and_no_lock(name: str) -> None:
    operation, expected = OPERATIONS[name]

    def make() -> Trial:
        trial = InMessages(operation)
        trial.expected = expected
        return trial

    interrupt_everywhere(make, 5)


class WithWaiter(Trial):
    """An operation that lets a thread of the other end go on, which never looks by itself."""

    def __init__(self, operation: Callable[[Channel, Channel], Any], is_receiver: bool) -> None:
        self.channel = Channel(size=4000)
        self.other = self.channel.other_end()
        self.operation = operation
        if is_receiver:
            self.waiter = InThread(self.other.recv_bytes)
        else:
            fill(self.channel, b"f" * 900)
            self.waiter = InThread(lambda: self.channel.send_bytes(NEW))
        eventually(lambda: self.waiter.is_parked_at(self.channel))
        self.is_receiver = is_receiver

    def operate(self) -> None:
        self.operation(self.channel, self.other)

    def finish(self, outcome: Interruption) -> None:
        if self.is_receiver:
            if not self.other.poll() and not self.waiter.is_over():
                with contextlib.suppress(AssertionError):
                    eventually(self.waiter.is_over, "it may have been woken", 0.05)
            if not self.waiter.is_over() and not self.other.qsize():
                self.channel.send_bytes(b"instead")  # nothing was sent
            self.waiter.result()
        else:
            while not self.waiter.is_over() and self.other.poll():
                self.other.recv_bytes()
            self.waiter.result()


@pytest.mark.patience(300)
@pytest.mark.parametrize("name", ["send_bytes", "reserve", "recv_bytes", "peek"])
def test_an_operation_that_is_interrupted_anywhere_loses_nobodys_wake_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 1e6)
    monkeypatch.setattr(_parking, "LONGEST_POLL_INTERVAL", 1e6)
    interrupt_everywhere(lambda: WithWaiter(OPERATIONS[name][0], name in ("send_bytes", "reserve")), 5)


class HandlerError(Exception):
    pass


BLOCKED: dict[str, Callable[[Channel, Channel], Any]] = {
    "send_bytes": lambda channel, other: channel.send_bytes(b"x"),
    "send with a timeout": lambda channel, other: channel.send([1], timeout=PATIENCE),
    "reserve": reserve_new,
    "recv": lambda channel, other: channel.recv(),
    "recv_many": lambda channel, other: channel.recv_many(3),
    "peek": lambda channel, other: peek_old(other, channel),
    "poll": lambda channel, other: channel.poll(None),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=["KeyboardInterrupt", "a handler that raises"])
@pytest.mark.parametrize("name", BLOCKED)
def test_what_a_handler_raises_comes_out_of_a_blocked_call_and_nothing_is_lost(
    name: str, number: int, channel: Channel, other: Channel
) -> None:
    sent = fill(channel)

    def raising(number: int, frame: Any) -> None:
        raise HandlerError

    def blocked() -> str:
        signal.signal(signal.SIGUSR1, raising)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            BLOCKED[name](channel, other)
        except (HandlerError, KeyboardInterrupt) as error:
            other.send_bytes(b"")
            assert channel.recv_bytes() == b""
            return type(error).__name__
        return "went on"

    child = Child(blocked)
    eventually(lambda: any(waiter.pid == child.pid for waiter in channel.waiters) and is_sleeping(child.pid))
    child.signal(number)
    assert child.result() == ("KeyboardInterrupt" if number == signal.SIGINT else "HandlerError")
    assert len(drain(other)) == sent
    assert_usable(channel, other)


# -- leases ---------------------------------------------------------------------------------------------------------------


def mappings_of_data(channel: Channel) -> dict[int, str]:
    """Rights of this process's mappings of the chunks, by their place in the segment."""
    segment = channel._memory.arena.segment
    inode, found = os.fstat(segment.fd).st_ino, {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(inode):
            found[int(fields[2], 16) - channel._memory._first] = fields[1]
    return found


def test_a_producer_that_overruns_inside_reserve_is_killed_and_nothing_of_it_is_sent(domain: str) -> None:
    def overrun() -> None:
        channel = Channel("x", size=SIZE, domain=domain, lease=SHORT)
        assert len(channel.contracts) == 2
        reservation = channel.reserve(9)
        with reservation as view:
            assert reservation.lease is not None
            assert reservation.lease.remaining() <= SHORT
            view[:] = b"bad bytes"
            spin()

    def overrun_reading() -> None:
        with Channel("x", domain=domain, privileged=True, lease=SHORT).peek() as view:
            assert view == b"good"
            spin()

    def send() -> None:
        Channel("x", domain=domain, lease=LONG).send_bytes(b"good", timeout=PATIENCE)

    def receive() -> list[bytes]:
        channel = Channel("x", domain=domain, privileged=True, lease=LONG)
        return [channel.recv_bytes(timeout=PATIENCE), *drain(channel)]

    for _ in range(3):
        assert Child(overrun).wait() == -signal.SIGKILL
        Child(send).result()
        assert Child(overrun_reading).wait() == -signal.SIGKILL
        assert Child(receive).result() == [b"good"]


def test_a_contract_for_receiving_maps_the_messages_read_only_and_cannot_send(domain: str) -> None:
    def send() -> None:
        Channel("x", size=SIZE, domain=domain, privileged=True, lease=LONG).send_bytes(b"data")

    def receive() -> None:
        channel = Channel("x", domain=domain, lease=LONG, operations=("receive",))
        assert channel.recv_bytes(timeout=PATIENCE) == b"data"
        for use in (
            lambda: channel.send_bytes(b"x"),
            lambda: channel.send(1, timeout=1),
            lambda: channel.send_many([b"x"]),
            lambda: channel.reserve(1).__enter__(),
        ):
            with pytest.raises(ContractDenied, match="does not allow to send, only receive"):
                use()
        rights = mappings_of_data(channel)
        for end in (channel._in, channel._out):
            assert rights[end.geometry.first + end.geometry.table] == "r--s"
            with pytest.raises(TypeError):
                end.data[0] = 1

    def send_only() -> None:
        channel = Channel("x", domain=domain, lease=LONG, operations=("send",))
        channel.send_bytes(b"back")
        with pytest.raises(ContractDenied, match="does not allow to receive, only send"):
            channel.recv()
        with pytest.raises(ContractDenied, match="does not allow to receive, only send"), channel.peek():
            pass

    Child(send).result()
    Child(receive).result()
    Child(send_only).result()


def test_without_a_lease_what_is_received_is_mapped_read_only_too(channel: Channel) -> None:
    rights = mappings_of_data(channel)
    for end, wanted in ((channel._in, "r--s"), (channel._out, "rw-s")):
        assert rights[end.geometry.first + end.geometry.table] == wanted


def test_who_opens_a_leased_channel_without_terms_gets_those_it_was_made_with(domain: str) -> None:
    def create() -> None:
        Channel("x", size=SIZE, domain=domain, lease=LONG, grace=0.5).send(1)

    def attach() -> list[tuple[float, float]]:
        channel = Channel("x", domain=domain, privileged=True)
        assert channel.recv() == 1
        return [(contract.lease, contract.grace) for contract in channel.contracts]

    Child(create).result()
    assert Child(attach).result() == [(LONG, 0.5), (LONG, 0.5)]


# -- system calls ---------------------------------------------------------------------------------------------------------

PAIR = "(lambda channel: (channel, channel.other_end()))(shlock.Channel(size=1 << 20))"
#: One that has taken the memory that it goes on using.
PIPE = "(lambda p: ([p[0].send_bytes(bytes(100_000)) or p[1].recv_bytes() for _ in range(20)], p)[1])(shlock.Pipe())"
LOOPS = {
    "bytes": (PAIR, "p[0].send_bytes(b'x' * 100); p[1].recv_bytes()"),
    "objects": (PAIR, "p[0].send((1, 'text')); p[1].recv()"),
    "large objects": ("(*" + PAIR + ", bytearray(9000))", "import pickle; p[0].send(pickle.PickleBuffer(p[2])); p[1].recv()"),
    "in place": (PAIR, "with p[0].reserve(3000) as v: v[0] = 1\nwith p[1].peek() as v: v[0]"),
    "many": (PAIR, "p[0].send_many([b'x'] * 20); p[1].recv_many(20)"),
    "Pipe": (PIPE, "p[0].send((1, 'text')); p[1].recv()"),
}


@pytest.mark.parametrize("what", LOOPS)
def test_no_system_call_in_10_000_messages(what: str, tmp_path: Path) -> None:
    primitive, body = LOOPS[what]
    calls = calls_of_loop(primitive, body, 10_000, "", tmp_path)
    # The allocator of large objects asks the kernel for memory now and then.
    calls = [call for call in calls if not re.search(r" (brk|mmap|munmap|madvise|mremap)\(", call)]
    assert calls == [], f"{len(calls)} system calls"


STEADY = """
import mmap, os, sys
import shlock

# Two processes; who is ahead of the other too far, or too little, waits for it by looking, not by sleeping.
count = memoryview(mmap.mmap(-1, 4096)).cast("Q")
channel = {channel}
one, two = channel
MESSAGES, LEAD = 30_000, 100
pid = os.fork()
SENT, RECEIVED, READY, GO = range(4)
if pid == 0:
    count[READY] = 1
    for number in range(1, MESSAGES + 1):
        while count[SENT] < min(number + 5, MESSAGES):
            pass
        assert two.recv_bytes() == b"message"
        count[RECEIVED] = number
        if number == MESSAGES // 10:
            os.access("/shlock-mark/begin2", os.F_OK)
        if number == MESSAGES - MESSAGES // 10:
            os.access("/shlock-mark/end2", os.F_OK)
    os._exit(0)
while not count[READY]:
    pass
for number in range(1, MESSAGES + 1):
    while number > count[RECEIVED] + LEAD:
        pass
    one.send_bytes(b"message")
    count[SENT] = number
    if number == MESSAGES // 10:
        os.access("/shlock-mark/begin1", os.F_OK)
    if number == MESSAGES - MESSAGES // 10:
        os.access("/shlock-mark/end1", os.F_OK)
os.waitpid(pid, 0)
os._exit(0)
"""


@pytest.mark.parametrize("mode", ["never", "adaptive"])
@pytest.mark.parametrize("kind", ["channel", "pipe"])
def test_no_system_call_of_a_producer_and_a_consumer_that_never_run_empty_or_full(kind: str, mode: str, tmp_path: Path) -> None:
    if reason := tracing_works():
        pytest.skip(reason)
    trace = tmp_path / "trace"
    source = STEADY.replace("{channel}", LOOPS["bytes" if kind == "channel" else "Pipe"][0])
    command = ["strace", "-f", "-qq", "-o", str(trace), sys.executable, "-c", source]
    environment = {**program_environment(), "SHLOCK_BIAS": mode}
    subprocess.run(command, env=environment, check=True, timeout=2 * PATIENCE, capture_output=True)
    lines = trace.read_text().splitlines()
    for process in ("1", "2"):
        begin, end = (
            next(i for i, line in enumerate(lines) if f"/shlock-mark/{mark}{process}" in line) for mark in ("begin", "end")
        )
        thread = lines[begin].split()[0]
        assert lines[end].split()[0] == thread
        between = [line for line in lines[begin + 1 : end] if line.startswith(f"{thread} ") and "access" not in line]
        assert between == [], f"{len(between)} system calls in 24,000 messages of one process"


def test_what_is_sent_and_received_in_a_storm_of_pages_is_whole(channel: Channel, other: Channel) -> None:
    """Two processes at each end, messages of all sizes, no deaths: what comes out is what went in."""
    page = Page()

    def produce(seat: int) -> int:
        total = 0
        for number in range(400):
            length = (number * 7919 + seat) % 20_000
            channel.send_bytes(number.to_bytes(4, "little") * (length // 4 + 1))
            total += number
        return total

    def consume() -> int:
        total = 0
        while (message := other.recv_bytes(timeout=PATIENCE)) != b"end":
            number = int.from_bytes(message[:4], "little")
            if message != number.to_bytes(4, "little") * (len(message) // 4):
                page[0] += 1
            total += number
        return total

    consumers = [Child(consume) for _ in range(2)]
    sent = sum(child.result() for child in [Child(produce, seat) for seat in range(2)])
    for _ in consumers:
        channel.send_bytes(b"end")
    assert sum(child.result() for child in consumers) == sent
    assert page[0] == 0
