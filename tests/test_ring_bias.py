"""The locks of a ring, each biased to the process that uses its end (`shlock/_ring.py`, `shlock/_bias.py`).

The crash points of rings are all visited once more, with every lock biased, by what ``test_modes`` runs.  Here is what only a
bias can do to a ring: who gets it and who takes it away, a death by the door, who looks at the word without taking the lock.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
from support import PATIENCE, Child, DieAtLabel, Page, eventually, watch_steps
from test_signals import Interruption, Trial, interrupt_everywhere

import shlock
from shlock import _bias, _owned, _process, _ring, _ring_door, _sys, channel
from shlock import _layout as at
from shlock._parking import POLL_INTERVAL

pytestmark = pytest.mark.skipif(not _bias.is_possible(), reason="no lock is ever biased here")

GO, OVER = range(2)
MANY = _bias.FIRST_CREDIT + 100  # messages after which the locks of a steady pair are biased
WRITTEN, SENT, READ, GONE = "C30 bytes written", "C31 TAIL stored", "C33 bytes read", "C34 HEAD stored"


@dataclass
class Pair:
    """The two ends of something that has a ring."""

    out: _ring.Producer
    into: _ring.Consumer
    put: Callable[[Any], Any]
    get: Callable[[], Any]
    whole: Any  # what keeps it


def _pipe() -> Pair:
    reader, writer = shlock.Pipe(duplex=False)
    return Pair(writer._out, reader._in, writer.send, lambda: reader.recv(timeout=PATIENCE), (reader, writer))


def _channel() -> Pair:
    channel = shlock.Channel(size=20_000)
    other = channel.other_end()
    return Pair(channel._out, other._in, channel.send, lambda: other.recv(timeout=PATIENCE), channel)


def _queue() -> Pair:
    queue = shlock.Queue()
    return Pair(queue._out, queue._in, queue.put, lambda: queue.get(timeout=PATIENCE), queue)


KINDS = {"pipe": _pipe, "channel": _channel, "queue": _queue}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def choose(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """For the locks that are made from now on, also in children."""
    monkeypatch.setattr(_bias, "_chosen", mode)


def word_of(end: Any) -> int:
    word: int = end.view[end.lock._block.word]
    return word


def has_it(end: Any) -> int | None:
    """Which process the lock of an end is biased to."""
    w = word_of(end)
    if w & at.REVOKED != at.BIASED:
        return None
    return _process.pid_of(end.view[end.lock._words.first_claim + at.slot_in(w)])


def bias(end: Any, use: Callable[[], Any]) -> None:
    """Have its lock biased to this process; ``use``: what takes it."""
    words = end.lock._words
    for _ in range(3):  # it may still have the door of a bias that was revoked
        words.limit, words.credit.cell_contents = _bias.FIRST_CREDIT, 0
        use()
    assert has_it(end) == os.getpid()


# -- who has it -----------------------------------------------------------------------------------------------------------


def test_of_a_steady_pair_each_has_the_lock_of_its_end_until_another_one_comes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, "adaptive")
    pair, page = KINDS[kind](), Page()

    def produce(seat: int) -> None:
        for number in range(MANY):
            pair.put((seat, number))

    def first() -> None:
        produce(0)
        eventually(lambda: page[GO])
        produce(0)

    producer = Child(first)
    found = [pair.get() for _ in range(MANY)]
    assert (has_it(pair.out), has_it(pair.into)) == (producer.pid, os.getpid())
    assert pair.out.lock.owner is None
    pair.put((1, 0))
    assert has_it(pair.out) is None
    assert has_it(pair.into) == os.getpid(), "the other end's has nothing to do with it"
    page[GO] = 1
    found += [pair.get() for _ in range(MANY + 1)]
    producer.result()
    assert [number for seat, number in found if seat == 0] == [*range(MANY), *range(MANY)]
    assert [number for seat, number in found if seat == 1] == [0]
    other = Child(pair.put, (2, 0))
    assert pair.get() == (2, 0)
    other.result()


def test_producers_and_consumers_in_a_crowd_lose_nothing_where_all_is_biased(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, "always")
    pair, each = KINDS[kind](), 600

    def produce(seat: int) -> None:
        for number in range(each):
            pair.put((seat, number))

    producers = [Child(produce, seat) for seat in range(2)]
    consumers = [Child(lambda: [pair.get() for _ in range(each)]) for _ in range(2)]
    found = [consumer.result() for consumer in consumers]
    for producer in producers:
        producer.result()
    assert sorted(found[0] + found[1]) == [(seat, number) for seat in range(2) for number in range(each)]
    for one in found:
        for seat in range(2):
            numbers = [number for producer, number in one if producer == seat]
            assert numbers == sorted(numbers)


def test_a_ring_has_a_slot_for_one_that_does_not_come_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has lost a bias keeps its slot until it uses the lock again."""
    choose(monkeypatch, "always")
    pair, page = KINDS[kind](), Page()

    def claim() -> bool:
        for _ in range(2):
            pair.put(b"x")
        done = has_it(pair.out) == os.getpid()
        page[GO] += 1
        eventually(lambda: page[OVER])
        return done

    slots = at.bias_slots(pair.out.lock._block.kind_word)
    children = []
    for number in range(slots + 1):
        children.append(Child(claim))
        eventually(lambda: page[GO] == number + 1)
    page[OVER] = 1
    assert [child.result() for child in children] == [True] * slots + [False]
    assert slots == 2
    assert [pair.get() for _ in range(2 * (slots + 1))] == [b"x"] * 2 * (slots + 1)


def test_the_words_of_the_bias_are_nothing_else() -> None:
    ends = {at.LOCK: at.BLOCK_CONFIRMED, at.RLOCK: at.BLOCK_CONFIRMED, at.CHANNEL: at.BLOCK_PLACE, at.QUEUE: at.BLOCK_PLACE}
    for kind in range(at.EXTENSION + 1):
        claims, holds = at.bias_words(kind)
        assert holds == claims + at.bias_slots(kind)
        assert holds + at.bias_slots(kind) <= ends.get(kind, at.BLOCK_BIASES)
        claims, holds = at.bias_words(kind | at.LEASED)
        assert claims > at.BLOCK_TOKEN
        assert holds + at.bias_slots(kind | at.LEASED) <= at.BLOCK_CONFIRMED
        assert bool(at.bias_slots(kind | at.LEASED)) is (kind in (at.LOCK, at.RLOCK))


def test_slots_of_a_queue_and_the_ends_of_what_is_leased_are_never_biased(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "always")
    queue = shlock.Queue()
    for number in range(4):
        queue.put(number)
        with queue.take() as item:
            assert item == number
    (slot,) = queue._slots._slots.values()
    assert not word_of(slot) & at.REVOKED
    assert has_it(queue._out) == has_it(queue._in) == os.getpid()
    with shlock.Supervisor(domain):
        channel = shlock.Channel("leased", size=4096, domain=domain, lease=10.0)
        other = channel.other_end()
        for number in range(4):
            channel.send(number)
            assert other.recv() == number
        for end in (channel._out, other._in):
            assert not word_of(end) & at.REVOKED
            assert end.lock._words.limit == _bias.NEVER
        del channel, other, end


@pytest.mark.parametrize("flags", [at.BIASED, at.REVOKING])
@pytest.mark.parametrize("slot", range(at.BIAS_SLOT_MASK + 1))
def test_a_word_that_names_a_slot_which_nobody_has_is_free(flags: int, slot: int, kind: str) -> None:
    """R8: whatever stands in the lock, TAIL and HEAD are not what a slot is made of."""
    pair = KINDS[kind]()
    for number in range(3):  # or TAIL would be INSIDE
        pair.put(number)
    pair.get()
    for end in (pair.out, pair.into):
        words, block = end.lock._words, end.lock._block
        end.view[words.first_hold + 1] = at.SHUT
        if slot < words.bias_slots:
            end.view[words.first_hold + slot] = at.OUTSIDE
        end.view[block.word] = at.biased(slot, 5) ^ at.BIASED | flags
        before = end.view[end.tail], end.view[end.head]
        assert not end.lock.locked()
        assert end.lock.acquire(False)
        end.lock.release()
        assert (end.view[end.tail], end.view[end.head]) == before
        assert word_of(end) == 0
    assert [pair.get() for _ in range(2)] == [1, 2]


# -- death ----------------------------------------------------------------------------------------------------------------


def die_inside(end: Any, label: str, use: Callable[[], Any]) -> None:
    """Be killed there, having got in by the door."""
    bias(end, use)
    step = DieAtLabel(label, 1)

    step.before_death = lambda: None if is_inside(end) else os._exit(77)
    watch_steps(step)
    use()


def assert_killed(child: Child) -> None:
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("label", [WRITTEN, SENT])
def test_a_producer_that_is_killed_inside_by_the_door_has_sent_its_message_or_not(kind: str, label: str) -> None:
    pair, put = KINDS[kind](), iter(range(100))
    assert_killed(Child(die_inside, pair.out, label, lambda: pair.put(next(put))))
    confirmed = 3 + (label == SENT)
    assert Child(pair.put, 50).result() is None
    pair.put(60)
    assert [pair.get() for _ in range(confirmed + 2)] == [*range(confirmed), 50, 60]
    assert pair.into.is_empty()
    bias(pair.out, lambda: pair.put(0))


@pytest.mark.parametrize("label", [READ, GONE])
def test_a_consumer_that_is_killed_inside_by_the_door_has_taken_its_message_or_not(kind: str, label: str) -> None:
    pair = KINDS[kind]()
    for number in range(10):
        pair.put(number)
    assert_killed(Child(die_inside, pair.into, label, pair.get))
    taken = 3 + (label == GONE)
    assert Child(pair.get).result() == taken
    assert [pair.get() for _ in range(taken + 1, 10)] == [*range(taken + 1, 10)]
    assert pair.into.is_empty()
    pair.put(10)
    pair.put(11)
    pair.put(12)
    bias(pair.into, pair.get)


@pytest.mark.parametrize("label", ["C40 TAKING set", "C41 slot filled", "C42 HEAD moved"])
def test_the_heir_of_one_that_takes_and_is_killed_inside_by_the_door_decides_where_the_item_is(label: str) -> None:
    """T3: nobody else gets in by a door before the heir has decided."""
    queue = shlock.Queue()
    for number in range(10):
        queue.put(number)

    def take() -> None:
        with queue.take():
            pass

    assert_killed(Child(die_inside, queue._in, label, take))
    assert sorted(queue.get(timeout=PATIENCE) for _ in range(7)) == [*range(3, 10)]
    assert queue.empty()
    assert not queue._in.view[queue._slots.taking]


@pytest.mark.parametrize("label", [None, "C32 chunks taken, link written", "C35 HEAD stored, chunks USED"])
def test_chunks_that_one_kept_who_was_killed_inside_by_the_door_are_used_again(label: str | None) -> None:
    """What is repaired does not depend on how the dead one got in; a producer does it that does not wait for the lock (C35)."""
    channel = shlock.Channel(size=20_000)
    other = channel.other_end()

    def send(length: int = 9000) -> None:
        channel.send_bytes(bytes(length))

    def die() -> None:
        bias(channel._out, lambda: send(1))
        bias(other._in, other.recv_bytes)
        if end is other._in:
            send()
        step = DieAtLabel(label or "", 1)
        step.before_death = lambda: None if is_inside(end) else os._exit(77)
        watch_steps(step)
        (send if end is channel._out else other.recv_bytes)()

    if label is None:
        send()
        other.recv_bytes()
        end = None
    else:
        end = other._in if "HEAD" in label else channel._out
        assert_killed(Child(die))
    room = 0
    with contextlib.suppress(TimeoutError):
        while True:
            channel.send_bytes(bytes(7000), timeout=5 * POLL_INTERVAL)
            room += 1
    assert room == 2  # else one
    assert [len(other.recv_bytes(timeout=PATIENCE)) for _ in range(room)] == [7000] * room


def is_inside(end: Any) -> bool:
    """Whether this process is in by the door."""
    return bool(end.lock._words.inside.cell_contents and word_of(end) & at.REVOKED == at.BIASED)


# -- in one piece ---------------------------------------------------------------------------------------------------------


def is_in_one_piece() -> bool:
    """Whether this is called, through whatever, by the put or the get of ``_ring_door``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _ring_door.__file__:
        frame = frame.f_back
    return frame is not None


class Quick:
    """A channel whose ends are both biased to this process, and go on where they were; and what is in it."""

    LENGTH = 50

    def __init__(self, waiting: int = 12) -> None:
        self.near = shlock.Channel(size=1 << 18)
        self.far = self.near.other_end()
        self.out, self.into = self.near._out, self.far._in
        self.numbers = itertools.count()
        self.there: deque[bytes] = deque()
        bias(self.out, self.send)
        while len(self.there) < waiting + 6:
            self.send()
        bias(self.into, self.receive)
        while len(self.there) > waiting:
            self.receive()
        assert self.out.tail_left == self.out.view[self.out.tail]
        assert self.into.head_left == self.into.view[self.into.head]
        assert self.into.ahead_index >= 0

    def message(self) -> bytes:
        return b"%d" % next(self.numbers) * self.LENGTH

    def send(self, message: bytes | None = None) -> None:
        message = self.message()[: self.LENGTH] if message is None else message
        self.near.send_bytes(message)
        self.there.append(message)

    def receive(self) -> None:
        assert self.far.recv_bytes() == self.there.popleft()

    def check(self) -> None:
        """All that should be there is, and both ends can be used as before."""
        assert not self.out.lock.locked()
        assert not self.into.lock.locked()
        self.send()
        while self.there:
            self.receive()
        assert self.into.is_empty()
        for _ in range(40):
            self.send()
        assert has_it(self.out) in (None, os.getpid())
        while self.there:
            self.receive()


def die_in_one_piece(label: str, use: Callable[[], Any]) -> None:
    step = DieAtLabel(label, 1)
    step.before_death = lambda: None if is_in_one_piece() else os._exit(77)
    watch_steps(step)
    use()


@pytest.mark.parametrize("label", [WRITTEN, SENT])
def test_who_puts_in_one_piece_and_is_killed_has_sent_its_message_or_not(label: str) -> None:
    def die() -> None:
        bias(near._out, lambda: near.send_bytes(b"000"))
        near.send_bytes(b"xyz")
        die_in_one_piece(label, lambda: near.send_bytes(b"abc"))

    near = shlock.Channel(size=1 << 18)
    far = near.other_end()
    assert_killed(Child(die))
    near.send_bytes(b"heir")
    sent = [b"000"] * 3 + [b"xyz"] + [b"abc"] * (label == SENT) + [b"heir"]
    assert [far.recv_bytes() for _ in sent] == sent
    assert not far.poll()


@pytest.mark.parametrize("label", [READ, GONE])
def test_who_has_copied_messages_ahead_and_is_killed_has_taken_no_more_than_it_should(label: str) -> None:
    def die() -> None:
        bias(far._in, far.recv_bytes)
        assert far.recv_bytes() == b"03"
        assert far._in.ahead_index > 10
        assert far.recv_bytes() == b"04"
        die_in_one_piece(label, far.recv_bytes)

    near = shlock.Channel(size=1 << 18)
    far = near.other_end()
    for number in range(30):
        near.send_bytes(b"%02d" % number)
    assert_killed(Child(die))
    left = range(5 + (label == GONE), 30)
    assert [far.recv_bytes() for _ in left] == [b"%02d" % number for number in left]
    assert not far.poll()


class PutsOrGets(Trial):
    """Its message was sent or not, and one is there that was not taken; nothing else, and nobody is inside."""

    def __init__(self, name: str, where: set[str]) -> None:
        self.name, self.where = name, where
        self.quick = Quick()
        if name == "get, looking ahead":
            self.quick.into.ahead_index = -1
        self.got: bytes | None = None

    def operate(self) -> None:
        if self.name == "put":
            self.quick.near.send_bytes(b"x" * Quick.LENGTH)
        else:
            self.got = self.quick.far.recv_bytes()

    def finish(self, outcome: Interruption) -> None:
        self.where.add(outcome.where.split("+")[0])
        quick, there = self.quick, self.quick.there
        many = quick.into.waiting()
        if self.name == "put":
            assert many == len(there) + 1 or (many == len(there) and outcome.raised)
            there += [b"x" * Quick.LENGTH] * (many - len(there))
        else:
            assert many == len(there) - 1 or (many == len(there) and outcome.raised)
            assert self.got in (None, there[0])
            assert (self.got is None) == outcome.raised
            if many < len(there):
                there.popleft()
        quick.check()


@pytest.mark.parametrize("name", ["put", "get", "get, looking ahead"])
def test_what_is_interrupted_in_one_piece_was_done_or_not(name: str) -> None:
    where: set[str] = set()
    interrupt_everywhere(lambda: PutsOrGets(name, where), 3)
    assert {"put": "make_put.<locals>.put", "get": "make_get.<locals>.get"}.get(name, "Consumer._look_ahead") in where


@pytest.mark.parametrize("revoked", ["before", "inside", "while it leaves"])
@pytest.mark.parametrize("name", ["put", "get"])
def test_a_bias_that_is_revoked_around_a_message_in_one_piece(name: str, revoked: str) -> None:
    quick = Quick()
    end = quick.out if name == "put" else quick.into
    words, page = end.lock._words, Page()

    def want() -> None:
        _sys.crash_points.clear()
        with end.lock:
            page[GO] += 1

    def revoke() -> None:
        if children:
            return
        children.append(Child(want))
        eventually(lambda: page[GO] or word_of(end) & at.REVOKED != at.BIASED)

    def go_in(block: bool) -> bool:
        if revoked == "before":
            revoke()
        return go_in_really(block)

    def go_out() -> None:
        if revoked == "while it leaves":
            revoke()
        go_out_really()

    go_in_really, go_out_really = words.go_in.cell_contents, words.go_out.cell_contents
    children: list[Child] = []
    words.go_in.cell_contents, words.go_out.cell_contents = go_in, go_out
    if revoked == "inside":
        _sys.crash_points[:] = [lambda label: revoke() if is_in_one_piece() else None]
    (quick.send if name == "put" else quick.receive)()
    _sys.crash_points.clear()
    (child,) = children
    child.result()
    assert page[GO] == 1
    assert words.door is None
    quick.check()


@pytest.mark.parametrize("name", ["put", "get"])
def test_another_one_of_this_process_was_there_in_between(name: str) -> None:
    """The other object has the same lock, and goes in by the same door."""
    quick = Quick()
    if name == "put":
        other = quick.far.other_end()
        for _ in range(3):
            message = quick.message()
            other.send_bytes(message)
            quick.there.append(message)
            quick.send()
    else:
        other = quick.near.other_end()
        for _ in range(3):
            assert other.recv_bytes() == quick.there.popleft()
            quick.receive()
            assert quick.into.ahead_index == -1, "it is one of several"
        quick.receive()
        assert quick.into.ahead_index >= 0
    assert has_it(quick.out) == has_it(quick.into) == os.getpid()
    quick.check()


@pytest.mark.parametrize("name", ["put", "get"])
def test_another_thread_was_there_just_before_the_door_is_open(name: str) -> None:
    """It has filled the chunk, or taken all that was copied ahead."""
    quick = Quick()
    for _ in range(3):
        quick.send()
    words = (quick.out if name == "put" else quick.into).lock._words
    really = words.go_in.cell_contents

    def go_in(block: bool) -> bool:
        words.go_in.cell_contents = really
        if name == "put":
            quick.send(bytes(quick.out.limit - quick.out.place_left))
            for _ in range(3):
                quick.receive()
        else:
            while quick.into.ahead_index >= 0:
                taken.append(quick.far.recv_bytes())
        return really(block)

    taken: list[bytes] = []
    words.go_in.cell_contents = go_in
    if name == "put":
        quick.send()
    else:
        got = quick.far.recv_bytes()
        assert [*taken, got] == [quick.there.popleft() for _ in range(len(taken) + 1)]
        assert len(taken) > 3
    quick.check()


def test_messages_that_are_not_alike_are_not_copied_ahead() -> None:
    """Neither of another length, nor of another tag, nor where a link leads to another chunk."""
    quick = Quick()
    random_ = random.Random(1)
    seen = set()
    for _ in range(3000):
        length = random_.choice([quick.LENGTH] * 40 + [0, 7, 8, 9, 4000, 5000])
        if random_.random() < 0.51 and len(quick.there) < 40:
            quick.send(random_.randbytes(length))
        elif quick.there:
            quick.receive()
        seen.add(quick.into.ahead_index)
    assert seen >= set(range(-1, 10))
    while quick.there:
        quick.receive()
    for number in range(60):
        quick.near.send(number if number % 10 == 9 else b"%04d" % number)
    assert [quick.far.recv() for _ in range(60)] == [n if n % 10 == 9 else b"%04d" % n for n in range(60)]
    quick.check()


def test_what_lies_behind_the_last_message_is_none() -> None:
    """Though it looks like one: it was one, when the chunk was in use before."""
    quick = Quick(5)
    for _ in range(3000):
        for _ in range(5):
            quick.send()
        for _ in range(5):
            quick.receive()
    assert quick.out.geometry.content < 15000 * Quick.LENGTH
    quick.check()


def test_no_more_items_are_put_in_one_piece_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "always")
    queue = shlock.Queue(3)
    for _ in range(5):
        for _ in range(3):
            queue.put(b"x")
        assert has_it(queue._out) == os.getpid()
        assert not queue._out.put(b"x")
        assert queue.qsize() == 3
        for _ in range(3):
            queue.get()


@pytest.mark.parametrize("name", ["put", "get"])
def test_a_child_that_is_forked_when_the_door_has_opened_is_not_inside(name: str) -> None:
    """As one that a signal handler forks, before ``inside`` is counted."""
    quick = Quick()
    end = quick.out if name == "put" else quick.into
    words, page = end.lock._words, Page()

    def go_in(block: bool) -> bool:
        words.go_in.cell_contents = really
        got: bool = really(block)
        pid = os.fork()
        if pid:
            children.append(pid)
            eventually(lambda: end.lock.waiters or page[OVER])
            assert not page[OVER], "it did not wait for its parent"
        return got

    really, children, parent = words.go_in.cell_contents, list[int](), os.getpid()
    words.go_in.cell_contents = go_in
    got = None
    try:
        if name == "put":
            quick.near.send_bytes(b"x" * Quick.LENGTH)
        else:
            got = quick.far.recv_bytes()
    finally:
        if os.getpid() != parent:
            page[OVER] = 1
            os._exit(0 if name == "put" or got == quick.there[1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    if name == "put":
        quick.there += [b"x" * Quick.LENGTH] * 2
    else:
        assert got == quick.there.popleft()
        quick.there.popleft()
    quick.check()


@pytest.mark.parametrize("before", range(0, 120, 7))
def test_the_count_of_messages_begins_again_at_zero(before: int) -> None:
    quick = Quick()
    while quick.there:
        quick.receive()
    place = quick.out.view[quick.out.tail] & _ring.PLACE
    for end in (quick.out, quick.into):
        end.view[end.tail] = end.view[end.head] = (_ring.COUNT - before) << _ring.COUNT_SHIFT | place
    for _ in range(60):
        quick.send()
    for _ in range(60):
        quick.receive()
    assert quick.out.view[quick.out.tail] >> _ring.COUNT_SHIFT == (60 - before - 1) % (1 << 32)
    quick.check()


def test_who_has_a_deadline_takes_what_was_copied_ahead_and_copies_some() -> None:
    quick = Quick()
    for _ in range(60):
        quick.send()
    copied = []
    while quick.there:
        assert quick.far.recv_bytes(timeout=PATIENCE) == quick.there.popleft()
        copied.append(quick.into.ahead)
    assert len({id(batch) for batch in copied}) <= 3
    quick.check()


@pytest.mark.parametrize("reason", ["never biased", "lost", "no door there"])
def test_nothing_is_copied_ahead_by_who_does_not_go_in_by_the_door(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "never biased":
        choose(monkeypatch, "never")
    elif reason == "no door there":
        monkeypatch.setattr(_ring, "IS_WEAK", True)
        monkeypatch.setattr(_ring, "fence", lambda: None)
    near = shlock.Channel(size=1 << 18)
    far = near.other_end()
    for number in range(60):
        near.send_bytes(b"%02d" % number)
    if reason != "never biased":
        far._in.lock._words.credit.cell_contents = 0
        assert far.recv_bytes() == b"00"
        assert has_it(far._in) == os.getpid()
    for number in range(reason != "never biased", 60):
        if reason == "lost" and number % 2:
            Child(lambda: far._in.lock.acquire(False) and far._in.lock.release()).result()
        assert far.recv_bytes() == b"%02d" % number
        assert far._in.ahead_index == -1


@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("where", ["when it is asked", "before it is done", "done", "the lock is given back"])
@pytest.mark.parametrize("way", ["reserve", "peek"])
def test_a_child_that_is_forked_at_the_end_of_a_block_does_nothing_in_its_parents_name(
    way: str, where: str, is_biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on when its parent has been on its way for long."""
    if not is_biased:
        choose(monkeypatch, "never")
    near, page, children = shlock.Channel(size=1 << 18), Page(), list[int]()
    far = near.other_end()
    end = near._out if way == "reserve" else far._in
    for number in range(10):
        near.send_bytes(b"%d" % number)
    if is_biased:
        bias(near._out, lambda: near.send_bytes(b"x"))
        bias(far._in, far.recv_bytes)
    expected = deque(far.recv_bytes() for _ in range(near._out.waiting()))
    for message in expected:
        near.send_bytes(message)

    def fork(*arguments: Any) -> None:
        if children or not end.lock._words.is_mine():
            return
        pid = os.fork()
        if pid:
            children.append(pid)
        else:
            children.append(0)
            eventually(lambda: page[GO])

    def asked(words: Any, answer: bool) -> bool:
        if answer and words is end.lock._words and sys._getframe(2).f_code.co_name == "_finish":
            monkeypatch.undo()
            fork()
            return os.getpid() == parent
        return answer

    parent = os.getpid()
    if where == "done":
        _sys.crash_points[:] = [lambda label: fork() if label in (SENT, GONE) else None]
    else:
        kind = channel.Reservation if way == "reserve" else channel.Peek
        act, leave = kind._act, end.lock.__exit__
        if where == "before it is done":
            monkeypatch.setattr(kind, "_act", lambda self, view: (fork(), act(self, view)))
        elif where == "when it is asked":
            is_mine = _owned.OwnedWords.is_mine
            monkeypatch.setattr(_owned.OwnedWords, "is_mine", lambda self: asked(self, is_mine(self)))
        else:
            end.lock.__exit__ = lambda *arguments: (fork(), leave(*arguments))
    try:
        if way == "reserve":
            with near.reserve(3) as view:
                view[:] = b"abc"
            expected.append(b"abc")
        else:
            with far.peek() as view:
                assert view == expected[0]
            expected.popleft()
    finally:
        if os.getpid() != parent:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    _sys.crash_points.clear()
    for number in range(3):
        near.send_bytes(b"later %d" % number)
        expected.append(b"later %d" % number)
        assert far.recv_bytes() == expected.popleft()
    with end.lock:
        page[GO] = 1
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
        assert end.lock._words.is_mine()
    assert [far.recv_bytes() for _ in range(near._out.waiting())] == list(expected)
    assert not end.lock.locked()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("way", ["reserve", "peek"])
def test_a_child_that_is_forked_at_the_beginning_of_a_block_is_told_that_it_is_the_parents(
    way: str, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, children = shlock.Channel(size=1 << 18), list[int]()
    far = near.other_end()
    near.send_bytes(b"there")
    kind = channel.Reservation if way == "reserve" else channel.Peek
    begin, parent = kind._begin, os.getpid()

    def fork(self: Any, words: memoryview) -> memoryview | None:
        view: memoryview | None = begin(self, words) if is_late else None
        children.append(os.fork())
        if children[0]:
            assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
        return view if is_late else begin(self, words)

    monkeypatch.setattr(kind, "_begin", fork)
    block = near.reserve(5) if way == "reserve" else far.peek()
    try:
        with block as view:
            assert os.getpid() == parent
            if way == "reserve":
                view[:] = b"right"
            else:
                assert view == b"there"
    except RuntimeError as error:
        os._exit(0 if os.getpid() != parent and "forked" in str(error) else 1)
    finally:
        if os.getpid() != parent:
            os._exit(2)
    assert [far.recv_bytes() for _ in range(near._out.waiting())] == ([b"there", b"right"] if way == "reserve" else [])


def test_a_child_that_is_forked_inside_a_block_sends_as_ever() -> None:
    near = shlock.Channel(size=1 << 18)
    with near.reserve(1):
        child = Child(lambda: near._out.way_in is near._out.lock)
    assert child.result() is True


def test_who_looks_for_the_dead_gives_back_nothing_that_its_thread_has() -> None:
    """As a signal handler that takes or puts while its thread is inside."""
    queue = shlock.Queue()
    queue.put(1)
    lock, slots = queue._in.lock, queue._slots
    assert slots is not None
    view = queue._in.view
    with lock:
        view[slots.kept] = 1
        slots.look_for_the_dead()
        assert lock._words.is_mine()
        view[slots.taking] = 1
        assert not slots._is_returned(slots.slot(0), None)
        assert lock._words.is_mine()
        view[slots.taking] = 0
        view[queue._out._their_intent] = 1
        assert not queue._out._finish_for_the_dead()
        assert lock._words.is_mine()
        view[queue._out._their_intent] = 0
    assert not lock.locked()
    assert queue.get() == 1


def test_a_message_that_was_handed_out_is_not_kept() -> None:
    quick = Quick()
    index = quick.into.ahead_index
    assert quick.into.ahead[index] == quick.there[0]
    quick.receive()
    assert quick.into.ahead_index == index - 1
    assert quick.into.ahead[index] is None


@pytest.mark.parametrize("name", ["put", "get"])
def test_who_sleeps_is_woken_by_a_message_in_one_piece(name: str) -> None:
    quick = Quick()
    end, place = (quick.out, quick.out.readable) if name == "put" else (quick.into, quick.into.writable)
    end.view[place] |= at.PARKED
    if name == "put":
        quick.send()
    else:
        while quick.there:
            assert end.view[place] & at.PARKED
            quick.receive()
    assert not end.view[place] & at.PARKED
    quick.check()


def test_who_puts_in_one_piece_is_told_that_nobody_takes_messages_any_more() -> None:
    reader, writer = shlock.Pipe(duplex=False)
    bias(writer._out, lambda: writer.send_bytes(b"abc"))
    writer.send_bytes(b"abc")
    assert writer._out.tail_left == writer._out.view[writer._out.tail]
    reader.close()
    with pytest.raises(BrokenPipeError):
        writer.send_bytes(b"abc")
    assert not writer._out.lock.locked()


def test_a_word_that_was_overwritten_is_an_error_in_one_piece_too() -> None:
    quick = Quick()
    quick.out.tail_left = quick.out.view[quick.out.tail] = 5 << 40 | _ring.PLACE
    quick.out.place_left, quick.out.limit = _ring.PLACE << 3, _ring.PLACE << 4
    with pytest.raises(shlock.SegmentError, match="TAIL or HEAD points nowhere"):
        quick.near.send_bytes(b"x")
    assert not quick.out.lock.locked()


def test_a_child_goes_on_with_what_its_parent_had_copied_ahead() -> None:
    """It is a copy, and as good as the parent's while HEAD is the same."""
    quick = Quick()

    def take() -> list[bytes]:
        return [quick.far.recv_bytes() for _ in range(3)]

    assert Child(take).result() == [quick.there.popleft() for _ in range(3)]
    quick.check()


# -- who looks ------------------------------------------------------------------------------------------------------------


def test_who_waits_for_a_message_looks_longer_while_somebody_is_inside_by_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ring, "CORES", 2)
    monkeypatch.setattr(_ring, "LONGEST_COPY", 1 << 62)
    channel, page = shlock.Channel(size=20_000), Page()
    other = channel.other_end()

    def send_slowly() -> None:
        bias(channel._out, lambda: channel.send_bytes(b""))
        with channel.reserve(10):
            page[GO] = 1
            eventually(lambda: page[OVER])

    def look() -> bool:
        looks.append(1)
        return len(looks) > 3

    looks: list[int] = []
    sender = Child(send_slowly)
    eventually(lambda: page[GO])
    assert channel._out.lock.owner.pid == sender.pid
    assert other._in._comes_while_they_copy(other._in.readable_block, look)
    assert len(looks) == 4
    page[OVER] = 1
    sender.result()
    assert has_it(channel._out) == sender.pid
    assert not other._in._comes_while_they_copy(other._in.readable_block, look), "nobody is inside"


def test_a_thread_that_is_inside_by_the_door_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = shlock.Channel(size=20_000)
    other = channel.other_end()
    bias(channel._out, lambda: channel.send_bytes(b""))
    with channel.reserve(4) as view:
        view[:] = b"1234"
        with pytest.raises(RuntimeError, match="inside already"):
            channel.send_bytes(b"x")
    assert has_it(channel._out) == os.getpid()
    assert [other.recv_bytes() for _ in range(4)] == [b"", b"", b"", b"1234"]


def test_a_child_that_is_forked_inside_by_the_door_is_not_inside() -> None:
    channel, page = shlock.Channel(size=20_000), Page()
    other, lock = channel.other_end(), channel._out.lock

    def in_child() -> bool:
        if lock._words.is_mine() or lock.owner.pid != os.getppid():
            return False
        page[GO] = 1
        eventually(lambda: not lock.locked())
        return lock.acquire(False) and lock.owner.pid == os.getpid()

    bias(channel._out, lambda: channel.send_bytes(b""))
    with channel.reserve(4) as view:
        view[:] = b"1234"
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                os._exit(0 if in_child() else 1)
            os._exit(2)
        eventually(lambda: page[GO])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [other.recv_bytes() for _ in range(4)] == [b"", b"", b"", b"1234"]
    channel.send_bytes(b"y")
    assert other.recv_bytes(timeout=PATIENCE) == b"y"


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "send_bytes": lambda channel, other: channel.send_bytes(b"x"),
    "send in parts": lambda channel, other: channel.send(pickle.PickleBuffer(bytearray(9000))),
    "send_many": lambda channel, other: channel.send_many([b"x"]),
    "reserve": lambda channel, other: reserve(channel),
    "recv_bytes": lambda channel, other: other.recv_bytes(),
    "recv_many": lambda channel, other: other.recv_many(1),
    "peek": lambda channel, other: peek(other),
}


def reserve(channel: Any) -> None:
    with channel.reserve(1):
        pass


def peek(channel: Any) -> None:
    with channel.peek():
        pass


@pytest.mark.parametrize("way", WAYS)
def test_where_the_door_is_no_fence_there_is_one_before_it_is_looked_who_sleeps(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7.  Where the processor keeps loads behind stores nobody can see the difference: so the order of the calls is tested."""
    fenced: list[bool] = []
    monkeypatch.setattr(_ring, "IS_WEAK", True)
    channel = shlock.Channel(size=40_000)
    other = channel.other_end()
    assert (channel._out.put, other._in.get) == (channel._out.put_anyhow, other._in.get_anyhow)  # that have the fences
    end = channel._out if way.startswith(("send", "reserve")) else other._in
    for _ in range(5):
        channel.send_bytes(b"x")
    monkeypatch.setattr(_ring, "fence", lambda: fenced.append(end.lock.locked()))

    class Watched:
        """Of READABLE and WRITABLE, when they are looked at."""

        def __init__(self, view: Any) -> None:
            self.view = view

        def __getitem__(self, place: Any) -> Any:
            if place in (end.readable, end.writable) and not end.lock.locked():
                looked.append(fenced[-1:] == [False])
            return self.view[place]

        def __setitem__(self, place: Any, value: Any) -> None:
            self.view[place] = value

    looked: list[bool] = []
    end.view = Watched(end.view)
    WAYS[way](channel, other)
    end.view = end.view.view
    assert looked[:1] == [True]
