"""When a consumer leaves messages until there are more: how often, how long, and that nothing is lost by it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from support import PATIENCE, eventually
from test_ring import LAZY, Ring

import shlock
from shlock import _piling
from shlock._geometry import COUNT, COUNT_SHIFT, LINK
from shlock._piling import FEW, LEAST, MOST_PATIENCE, PAUSE, PILE, SLOWEST_COPY, Piling

LENGTH = 64 << 10


class Clock:
    """A microsecond later each time that it is read, unless it stands still."""

    now, step = 0, 1000

    def monotonic_ns(self) -> int:
        self.now += self.step
        return self.now


class End:
    """What a `Piling` looks at.  Another message comes at each ``every``-th look, if at all."""

    def __init__(self) -> None:
        self.view, self.head = [0], 0
        self.length, self.there, self.every, self.looks = LENGTH, 1, 0, 0
        self.geometry, self.chunk, self.most_messages = SimpleNamespace(most=64), 1 << 20, COUNT

    def next_length(self) -> int:
        return self.length

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


def pile(end: End, times: int = FEW, taken: int = 1) -> Piling:
    piling = Piling(end)  # type: ignore[arg-type]
    wait(piling, end, times, taken)
    return piling


def wait(piling: Piling, end: End, times: int, taken: int = 1) -> None:
    for _ in range(times):
        end.take(taken)
        piling.after_waiting()


def test_it_is_left_alone_until_it_has_waited_a_few_times(clock: Clock, end: End) -> None:
    pile(end, FEW - 1)
    assert (end.looks, clock.now) == (0, 0)


@pytest.mark.parametrize("length", [LEAST, LENGTH, PILE - 1, PILE, 5 * PILE])
def test_it_leaves_them_until_so_many_bytes_are_there(clock: Clock, end: End, length: int) -> None:
    end.length, end.every = length, 2
    pile(end)
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
    end.length, end.every = LEAST - 1, 2
    pile(end, 10 * FEW)
    assert (end.there, clock.now) == (1, 0)


def test_it_does_not_wait_where_there_is_no_message(clock: Clock, end: End) -> None:
    """Somebody else has taken it; or what it waited for is an item that was given back."""
    piling = pile(end, FEW - 1)
    end.there = 0
    piling.after_waiting()
    assert clock.now == 0


def test_it_does_not_wait_for_more_than_there_may_be(clock: Clock, end: End) -> None:
    clock.step, end.every = 0, 1
    end.most_messages = 3
    pile(end)
    assert end.there == 3
    few = End()
    few.every, few.geometry.most, few.chunk = 1, 8, LENGTH  # half of them are 4 messages
    pile(few)
    assert few.there == 4


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


def test_the_next_length_is_a_guess_that_reads_nothing_outside() -> None:
    ring = Ring(LAZY)
    consumer, producer = ring.consumer, ring.producer
    assert producer.put(bytes(3000))
    assert consumer.next_length() == 3000
    assert producer.put(bytes(2000))  # does not fit behind it: a link leads there
    assert consumer.get()
    assert consumer.words[(consumer.view[consumer.head] & 0xFFFFFFFF)] & LINK
    assert consumer.next_length() == 2000
    for word in (LINK, LINK | (1 << 32) - 1, (1 << 64) - 1):
        producer.words[consumer.view[consumer.head] & 0xFFFFFFFF] = word
        assert 0 <= consumer.next_length() < 1 << 40
    consumer.view[consumer.head] = (1 << 32) - 1
    assert consumer.next_length() == 0, "not mapped"


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
        reader._in.piling._waits = 1
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


@pytest.mark.parametrize("kind", ["Queue", "Pipe"])
def test_whoever_waited_for_a_message_has_it_counted(kind: str) -> None:
    ends = shlock.Pipe() if kind == "Pipe" else [getattr(shlock.get_context("fork"), kind)()] * 2
    reader, writer = ends
    get, put = (reader.recv, writer.send) if kind == "Pipe" else (reader.get, writer.put)
    put(1)
    assert get() == 1
    assert reader._in.piling._waits == FEW, "it did not wait"
    thread = threading.Thread(target=get)
    thread.start()
    eventually(lambda: waits_for_a_message(reader), "it waits")
    put(2)
    thread.join(PATIENCE)
    assert reader._in.piling._waits == FEW - 1
    reader.close()
    writer.close()


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
        reader._in.piling._waits = 1

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
