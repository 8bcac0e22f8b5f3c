"""When a consumer leaves messages until there are more: how often, how long, and that nothing is lost by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support import PATIENCE, eventually

import shlock
from shlock import _piling
from shlock._geometry import COUNT, COUNT_SHIFT
from shlock._piling import FEW, LEAST, LONGEST, MOST_PATIENCE, PAUSE, PILE, SLOWEST_COPY, Piling
from shlock._ring import Producer

LENGTH = 64 << 10


class Clock:
    """A microsecond later each time that it is read, unless it stands still."""

    now, step = 0, 1000

    def monotonic_ns(self) -> int:
        self.now += self.step
        return self.now

    def monotonic(self) -> float:
        return self.now / 1e9


class End:
    """What a `Piling` looks at.  Another message comes at each ``every``-th look, if at all."""

    def __init__(self) -> None:
        self.view, self.head = [0], 0
        self.there, self.every, self.looks = 1, 0, 0
        self.geometry, self.chunk, self.most_messages = SimpleNamespace(most=64), 1 << 20, COUNT

    def waiting(self) -> int:
        self.looks += 1
        if self.every and self.looks % self.every == 0:
            self.there += 1
        return self.there

    def take(self, count: int) -> None:
        self.view[0] += count << COUNT_SHIFT
        self.there = 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_piling, "SYSTEM", clock)
    return clock


@pytest.fixture
def end() -> End:
    return End()


def pile(end: End, times: int = FEW, length: int = LENGTH) -> Piling:
    piling = Piling(end)  # type: ignore[arg-type]
    wait(piling, end, times, length=length)
    return piling


def wait(piling: Piling, end: End, times: int, taken: int = 1, length: int = LENGTH, deadline: float | None = None) -> None:
    for _ in range(times):
        end.take(taken)
        piling.after_waiting(length, deadline, lambda: None)


def test_it_is_left_alone_until_it_has_waited_a_few_times(clock: Clock, end: End) -> None:
    pile(end, FEW - 1)
    assert (end.looks, clock.now) == (0, 0)


@pytest.mark.parametrize("length", [LEAST, LENGTH, PILE - 1, PILE, 5 * PILE])
def test_it_leaves_them_until_so_many_bytes_are_there(clock: Clock, end: End, length: int) -> None:
    end.every = 2
    pile(end, length=length)
    assert end.there == -(-PILE // length)


def test_it_takes_what_there_is_if_no_further_one_comes(clock: Clock, end: End) -> None:
    pile(end)
    assert end.there == 1
    assert clock.now == pytest.approx(PAUSE + LENGTH // SLOWEST_COPY, abs=3000)


def test_every_further_one_is_given_the_same_time(clock: Clock, end: End) -> None:
    end.every = 10  # looks, and so some 10 us
    pile(end)
    assert end.there == PILE // LENGTH
    assert clock.now > 2 * (PAUSE + LENGTH // SLOWEST_COPY), "longer than for one"


def test_short_messages_are_not_left(clock: Clock, end: End) -> None:
    end.every = 2
    piling = pile(end, 10 * FEW, LEAST - 1)
    assert (end.there, clock.now) == (1, 0)
    wait(piling, end, 1)
    assert end.there > 1, "they took no patience"


def test_it_does_not_wait_where_there_is_no_message(clock: Clock, end: End) -> None:
    """Somebody else has taken it; or what it waited for is an item that was given back."""
    piling = pile(end, FEW - 1)
    end.there = 0
    piling.after_waiting(LENGTH, None, lambda: None)
    assert clock.now == 0


def test_it_does_not_wait_on_one_processor(clock: Clock, end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer does not run meanwhile."""
    monkeypatch.setattr(_piling, "CORES", 1)
    pile(end)
    assert clock.now == 0


def test_it_does_not_wait_where_the_deadline_is_near(clock: Clock, end: End) -> None:
    piling = pile(end, FEW - 1)
    wait(piling, end, 1, deadline=clock.monotonic() + LONGEST)
    assert end.looks == 0
    wait(piling, end, 1, deadline=clock.monotonic() + 2 * LONGEST)
    assert end.looks > 0, "and it was not counted as a try"


@pytest.mark.parametrize("length", [*range(LEAST, LEAST + 64, 8), 50_000, LENGTH, PILE - 8, PILE - 1])
def test_it_takes_no_longer_than_it_says(clock: Clock, end: End, length: int) -> None:
    """Each further message comes at the last moment."""
    clock.step = PAUSE + length // SLOWEST_COPY - 1
    end.every = 2
    pile(end, length=length)
    assert end.there == -(-PILE // length)
    assert clock.now < 2 * LONGEST * 1e9, "two looks at the clock for each"


def test_before_it_waits_others_are_woken(clock: Clock, end: End) -> None:
    piling = pile(end, FEW - 1)
    seen: list[int] = []
    piling.after_waiting(LENGTH, None, lambda: seen.append(end.looks))
    assert seen == [0]
    assert end.looks > 0


def test_it_does_not_wait_for_more_than_there_may_be(clock: Clock, end: End) -> None:
    """Half of those that may wait: the producer of a full queue goes to sleep."""
    clock.step, end.every = 0, 1
    end.most_messages = 7
    pile(end)
    assert end.there == 3


@pytest.mark.parametrize("length", [LEAST, 3 * LEAST, LENGTH - 16, LENGTH, 2 * LENGTH, 5 * LENGTH])
@pytest.mark.parametrize("size", [32 << 10, LENGTH, 128 << 10, 1 << 20, 3 << 20, None])
def test_it_waits_for_no_more_than_the_ring_holds(
    monkeypatch: pytest.MonkeyPatch, end: End, size: int | None, length: int
) -> None:
    wanted: list[int] = []
    monkeypatch.setattr(Piling, "_wait_for", lambda self, messages, pause: wanted.append(messages))
    reader, writer = shlock.Pipe(duplex=False, size=size)
    with reader, writer:
        end.geometry, end.chunk = reader._in.geometry, reader._in.chunk
        pile(end, length=length)
        if length <= reader._in.geometry.longest:
            for _ in range(*wanted):
                assert writer._out.put(bytes(length))


def test_it_tries_again_after_twice_as_many_each_time(clock: Clock, end: End) -> None:
    piling, tried = pile(end, 0), []
    for index in range(1, 4 * MOST_PATIENCE):
        before = clock.now
        wait(piling, end, 1)
        if clock.now > before:
            tried.append(index)
    gaps = [after - before for before, after in zip([0, *tried], tried, strict=False)]
    assert gaps[:4] == [FEW, 2 * FEW, 4 * FEW, 8 * FEW]
    assert gaps[-1] == MOST_PATIENCE == max(gaps)


def test_where_they_pile_up_by_themselves_it_never_tries_and_afterwards_soon(clock: Clock, end: End) -> None:
    piling = pile(end, 100)
    before = clock.now
    wait(piling, end, 1000, taken=FEW + 1)
    assert clock.now == before
    wait(piling, end, FEW)
    assert clock.now > before


def test_messages_pile_up_and_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.step = 0  # it never gives up
    monkeypatch.setattr(_piling, "SYSTEM", clock)
    reader, writer = shlock.Pipe(duplex=False)
    got: list[int] = []

    def consume() -> None:
        while (body := reader.recv_bytes())[0] < 255:
            got.append(body[0])

    with reader, writer:
        be_about_to_pile_up(reader._in)
        looks = looks_of(reader, monkeypatch)
        thread = threading.Thread(target=consume)
        thread.start()
        eventually(lambda: waits_for_a_message(reader), "it waits")
        many = PILE // LENGTH
        writer.send_bytes(bytes([0]) * LENGTH)
        eventually(lambda: len(looks) > 100, "it looks for more")
        assert not got, "the first one is left"
        for index in range(1, many):
            writer.send_bytes(bytes([index]) * LENGTH)
        eventually(lambda: len(got) == many, "they are taken")
        writer.send_bytes(bytes([255]))
        thread.join(PATIENCE)
        assert got == list(range(many))


def peeked(reader: Any) -> bytes:
    with reader.peek() as view:
        return bytes(view)


def taken(queue: Any) -> Any:
    with queue.take() as item:
        return item


@pytest.mark.parametrize(
    ("kind", "get"),
    [
        ("Queue", lambda queue: queue.get()),
        ("Queue", lambda queue: queue.get(timeout=PATIENCE)),
        ("Queue", lambda queue: queue.get_many(4)[0]),
        ("Queue", taken),
        ("Pipe", lambda reader: reader.recv_bytes()),
        ("Pipe", lambda reader: reader.recv_many(4)[0]),
        ("Pipe", peeked),
    ],
)
def test_whoever_waited_for_a_message_has_it_counted(kind: str, get: Callable[[Any], bytes]) -> None:
    reader, writer = shlock.Pipe(duplex=False) if kind == "Pipe" else [shlock.Queue()] * 2
    put = writer.send_bytes if kind == "Pipe" else writer.put
    consumer = reader._in
    put(bytes(LENGTH))
    assert len(get(reader)) == LENGTH
    assert consumer.piling._waits == FEW, "it did not wait"
    if get is not taken:  # which copies it in the ring's name
        assert consumer.last_length >= LENGTH
    thread = threading.Thread(target=get, args=[reader])
    thread.start()
    eventually(lambda: waits_for_a_message(reader), "it waits")
    put(bytes(LENGTH))
    thread.join(PATIENCE)
    assert consumer.piling._waits == FEW - 1
    reader.close()
    writer.close()


def test_who_finds_an_item_there_has_not_waited() -> None:
    """As who waits for an empty slot."""
    queue = shlock.Queue()
    queue.put(bytes(LENGTH))
    assert queue._wait(queue._in, None)
    assert queue._in.piling._waits == FEW
    queue.close()


def test_who_sleeps_beside_what_is_left_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: the one that was woken leaves them, for good; nobody polls, and who puts them wakes only one."""
    tell = Producer.tell
    monkeypatch.setattr(Producer, "tell", lambda self, count=1: tell(self))
    monkeypatch.setattr("shlock._parking.POLL_INTERVAL", 1e6)
    monkeypatch.setattr("shlock._parking.LONGEST_POLL_INTERVAL", 1e6)
    clock = Clock()
    clock.step = 0
    monkeypatch.setattr(_piling, "SYSTEM", clock)
    queue = shlock.Queue()
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.append(queue.get())) for _ in range(2)]
    be_about_to_pile_up(queue._in)
    for thread in threads:
        thread.start()
    eventually(lambda: len(waits_for_a_message(queue)) == 2, "both sleep")
    queue.put_many([b"first", b"second"])
    eventually(lambda: got, "one leaves them, and the other one takes one")
    clock.step = 1_000_000
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(got) == [b"first", b"second"]
    queue.close()


def be_about_to_pile_up(consumer: Any) -> None:
    consumer.piling._waits, consumer.last_length = 1, LENGTH


def waits_for_a_message(reader: Any) -> list[int]:
    line: list[int] = reader._in.parking.in_line(reader._in.readable_block.index)
    return line


def looks_of(reader: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    looks: list[int] = []
    waiting = type(reader._in).waiting

    def counted(end: Any) -> int:
        found: int = waiting(end)
        looks.append(found)
        return found

    monkeypatch.setattr(type(reader._in), "waiting", counted)
    return looks


def test_an_exception_while_they_pile_up_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = shlock.Pipe(duplex=False)
    with reader, writer:
        be_about_to_pile_up(reader._in)

        class Interrupting(Clock):
            def monotonic_ns(self) -> int:
                raise KeyboardInterrupt

        caught: list[BaseException] = []

        def consume() -> None:
            with pytest.raises(KeyboardInterrupt) as info:
                reader.recv_bytes()
            caught.append(info.value)

        monkeypatch.setattr(_piling, "SYSTEM", Interrupting())
        thread = threading.Thread(target=consume)
        thread.start()
        eventually(lambda: waits_for_a_message(reader), "it waits")
        writer.send_bytes(b"first" + bytes(LENGTH))
        thread.join(PATIENCE)
        assert caught
        assert reader.recv_bytes()[:5] == b"first"
