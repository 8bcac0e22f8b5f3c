"""The ring alone, in one process: its arithmetic against a deque, its chunks, interruptions at every step, damaged words.

An interruption at a crash point leaves the words as a death there does; who comes next repairs them in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import PATIENCE, Child, eventually

from shlock import _layout as at
from shlock import _process, _ring, _sys
from shlock._arena import Declaration
from shlock._memory import Memory, Shape
from shlock._ring import Consumer, Geometry, Producer, Within, declarations, prepare
from shlock.errors import SegmentError

CHUNK = 4096
SMALL = Geometry(CHUNK, 9, 5)  # the longest message takes 4 chunks
LAZY = Geometry(CHUNK, 40, 12, is_lazy=True)  # more chunks than keep their memory
LABELS = (
    "C30 bytes written",
    "C31 TAIL stored",
    "C32 chunks taken, link written",
    "C33 bytes read",
    "C34 HEAD stored",
    "C35 HEAD stored, chunks USED",
    "C35 chunks LEFT, INTENT closed",
)
ENDS = {"C31 TAIL stored", "C34 HEAD stored", "C35 HEAD stored, chunks USED", "C35 chunks LEFT, INTENT closed"}
"""At these, what was going on is done."""


class Ring:
    """One ring in a segment of its own, with as many ends as are asked for."""

    def __init__(self, geometry: Geometry = SMALL, count: int = 0) -> None:
        self.geometry = geometry
        controls = (Declaration(at.CHANNEL, parameter=1), *declarations(at.CHANNEL))
        self.memory = Memory.create(Shape(controls, geometry.size, 0, lambda memory: prepare(memory, geometry)))
        self.producer, self.consumer = self.new_producer(), self.new_consumer()
        view = self.producer.view
        view[self.producer.tail] = view[self.producer.head] = count << _ring.COUNT_SHIFT

    def new_producer(self) -> Producer:
        return Producer(self.memory, 1, self.geometry, "ring")

    def new_consumer(self) -> Consumer:
        return Consumer(self.memory, 1, self.geometry, "ring")

    def states(self) -> bytes:
        return self.producer.table.tobytes()

    def used(self) -> set[int]:
        return {index for index, state in enumerate(self.states()) if state == _ring.USED}

    def chunks_of_messages(self) -> set[int]:
        """Those between HEAD and TAIL, found by going from message to message."""
        end = self.consumer
        place = (end.view[end.head] & _ring.PLACE) << 3
        found = {place // CHUNK}
        for _ in range(end.waiting()):
            left: list[range] = []
            place, word = end.follow(place, left)
            place = place + 8 + (word & _ring.LENGTH) + 7 & ~7
            found |= {place // CHUNK, *(index for chunks in left for index in chunks)}
        assert place == (end.view[end.tail] & _ring.PLACE) << 3
        return found

    def memory_taken(self) -> int:
        """Bytes of /dev/shm that its chunks and tables have."""
        return os.fstat(self.memory.arena.segment.fd).st_blocks * 512


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def interrupted_at(label: str) -> Iterator[list[str]]:
    passed: list[str] = []

    def step(reached: str) -> None:
        passed.append(reached)
        if reached == label:
            raise Interrupted

    _sys.crash_points[:] = [step]
    try:
        yield passed
    finally:
        _sys.crash_points.clear()


def content(number: int, length: int) -> bytes:
    return number.to_bytes(8, "little") * (length // 8) + bytes([number & 0xFF]) * (length % 8)


# -- against a deque ------------------------------------------------------------------------------------------------------

LENGTHS = st.one_of(
    st.integers(0, 40),
    st.integers(0, SMALL.longest),
    # Around the ends of chunks and runs, where the rounding matters.
    st.builds(lambda chunks, less: max(0, chunks * CHUNK - less), st.integers(1, 4), st.integers(0, 64)).filter(
        lambda length: length <= SMALL.longest
    ),
)
ENDS_OF_RING = st.integers(0, 1)


class AsADeque(RuleBasedStateMachine):
    """Two producers and two consumers, each with mappings of their own, do what one deque does."""

    @initialize(geometry=st.sampled_from([SMALL, LAZY]), count=st.sampled_from([0, 5, 2**32 - 3]), most=st.integers(0, 6))
    def start(self, geometry: Geometry, count: int, most: int) -> None:
        self.ring = Ring(geometry, count)
        self.producers = [self.ring.producer, self.ring.new_producer()]
        self.consumers = [self.ring.consumer, self.ring.new_consumer()]
        if most >= 4:  # messages, at most
            for end in (*self.producers, *self.consumers):
                end.most_messages = most
        self.wanted: deque[tuple[int, bytes]] = deque()
        self.number = 0
        self.is_clean = True

    def new(self, length: int) -> tuple[int, bytes]:
        self.number += 1
        return self.number % 4, content(self.number, length)

    @rule(end=ENDS_OF_RING, length=LENGTHS, in_parts=st.booleans())
    def put(self, end: int, length: int, in_parts: bool) -> None:
        producer = self.producers[end]
        tag, body = self.new(length)
        had_room, was_empty = producer.has_room(length), not self.wanted
        if in_parts:
            half = length // 2
            done = producer.put_parts([(half, body[half:]), (0, body[:half])], length, tag)
        else:
            done = producer.put(body, tag)
        if done:
            self.wanted.append((tag, body))
        assert done or not was_empty, "an empty ring takes any message"
        assert done == had_room or not self.is_clean
        assert done or not producer.has_room(length), "whoever waits for room would not sleep"

    @rule(end=ENDS_OF_RING, lengths=st.lists(LENGTHS, min_size=1, max_size=8), first=st.integers(0, 2))
    def put_many(self, end: int, lengths: list[int], first: int) -> None:
        new = [self.new(length) for length in lengths]
        done = self.producers[end].put_many([body for _, body in new], [tag for tag, _ in new[first:]], first)
        self.wanted.extend(new[first:][:done])

    @rule(end=ENDS_OF_RING, length=LENGTHS, keep=st.floats(0, 1), is_sent=st.booleans())
    def reserve(self, end: int, length: int, keep: float, is_sent: bool) -> None:
        producer = self.producers[end]
        tag, body = self.new(length)
        with producer.lock:
            got = producer.begin(producer.view, length)
            if got is None:
                return
            _, place, view = got
            view[:] = body
            producer.take_back()
            if is_sent:
                sent = int(length * keep)
                producer.finish(producer.view, place, sent, tag)
                self.wanted.append((tag, body[:sent]))
            else:
                self.is_clean = False

    @rule(end=ENDS_OF_RING)
    def get(self, end: int) -> None:
        got = self.consumers[end].get()
        assert got == (self.wanted.popleft() if self.wanted else None)
        assert got is None or got[1].__class__ is (bytearray if got[0] == 3 else bytes)

    @rule(end=ENDS_OF_RING, most=st.integers(1, 9))
    def get_many(self, end: int, most: int) -> None:
        got = self.consumers[end].get_many(most)
        assert got == [self.wanted.popleft() for _ in range(min(most, len(self.wanted)))]

    @rule(end=ENDS_OF_RING, is_taken=st.booleans())
    def peek(self, end: int, is_taken: bool) -> None:
        consumer = self.consumers[end]
        with consumer.lock:
            got = consumer.begin(consumer.view)
            if got is None:
                assert not self.wanted
                return
            _, after, tag, view = got
            assert (tag, view) == self.wanted[0]
            consumer.take_back()
            if is_taken:
                consumer.finish(consumer.view, after)
                self.wanted.popleft()

    @rule(end=ENDS_OF_RING, length=LENGTHS, label=st.sampled_from(LABELS[:3]))
    def put_interrupted(self, end: int, length: int, label: str) -> None:
        tag, body = self.new(length)
        with interrupted_at(label):
            try:
                done = self.producers[end].put(body, tag)
            except Interrupted:
                done = label in ENDS
                self.is_clean = False
        if done:
            self.wanted.append((tag, body))

    @rule(end=ENDS_OF_RING, most=st.integers(1, 9), label=st.sampled_from(LABELS[3:]))
    def get_interrupted(self, end: int, most: int, label: str) -> None:
        consumer = self.consumers[end]
        before = consumer.view[consumer.head]
        with interrupted_at(label):
            try:
                done = bool(consumer.get_many(most))
            except Interrupted:
                done = label in ENDS
                self.is_clean = False
                if label == LABELS[-1]:  # perhaps while it did what was left of an earlier one
                    done = consumer.view[consumer.head] != before
        for _ in range(min(most, len(self.wanted)) if done else 0):
            self.wanted.popleft()

    @rule()
    def take_all(self) -> None:
        for consumer in self.consumers:
            for tag, body in consumer.get_many(1000):
                assert (tag, body) == self.wanted.popleft()
        assert not self.wanted

    @invariant()
    def the_number_of_messages_is_right(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.producer.waiting() == self.ring.consumer.waiting() == len(self.wanted)
            assert self.ring.consumer.is_empty() == (not self.wanted)

    @invariant()
    def chunks_between_head_and_tail_are_used_and_others_are_not(self) -> None:  # R4
        if not hasattr(self, "ring"):
            return
        used, needed = self.ring.used(), self.ring.chunks_of_messages()
        assert needed <= used
        end = self.ring.producer
        if not end._is_stuck():
            intent = end.view[end.intent]
            taken = range(intent >> _ring.COUNT_SHIFT, (intent >> _ring.COUNT_SHIFT) + (intent & _ring.PLACE)) if intent else ()
            assert used <= needed | set(taken), "a chunk is lost"

    @precondition(lambda self: hasattr(self, "ring"))
    @rule()
    def settle(self) -> None:
        """After two more uses of chunks nothing of any interruption is left."""
        self.take_all()
        for _ in range(2):
            self.put(0, CHUNK, False)
            self.get(0)
        end = self.ring.producer
        assert not end.view[end._their_intent]
        assert _ring.LEFT not in self.ring.states()
        self.is_clean = True
        self.chunks_between_head_and_tail_are_used_and_others_are_not()


AsADeque.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestAsADeque(AsADeque.TestCase):  # type: ignore[name-defined,misc]
    pass


@pytest.mark.parametrize("length", range(CHUNK - 40, CHUNK + 40))
def test_no_chunk_is_lost_whatever_the_length_of_a_message(length: int) -> None:
    ring = Ring()
    for number in range(30):
        body = content(number, length)
        assert ring.producer.put(body)
        assert ring.consumer.get() == (0, body)
        assert len(ring.used()) <= 2


@pytest.mark.parametrize("capacity", [1, 7, 100, 4096, 5000, 65536, 100_000, 1 << 20, 3_000_000])
def test_a_ring_for_a_capacity_holds_one_message_of_that_size_wherever_the_last_one_lies(capacity: int) -> None:
    ring = Ring(Geometry.for_capacity(capacity))
    assert ring.geometry.longest >= capacity
    body = os.urandom(capacity)
    for small in (0, 1, capacity // 3, capacity // 2, 8, capacity - 1):
        assert ring.producer.put(b"x" * small)
        assert ring.consumer.get() == (0, b"x" * small)
        assert ring.producer.put(body)
        assert ring.consumer.get() == (0, body)


def test_a_ring_for_a_capacity_holds_that_many_bytes_in_messages_that_are_not_small() -> None:
    ring = Ring(Geometry.for_capacity(1 << 20))
    sent = 0
    while ring.producer.put(bytes(1000)):
        sent += 1000
    assert sent >= (1 << 20) * 9 // 10


def test_a_message_that_never_fits_is_refused_and_nothing_is_written() -> None:
    ring = Ring()
    longest = ring.geometry.longest
    for put in (
        lambda: ring.producer.put(bytes(longest + 1)),
        lambda: ring.producer.put_parts([(0, b"x")], longest + 1, 0),
        lambda: ring.producer.put_many([b"a", b"b", bytes(longest + 1)], [0, 0, 0], 0),
    ):
        with pytest.raises(ValueError, match=f"a message of {longest + 1} bytes; the longest that fits has {longest}"):
            put()
        assert ring.consumer.get() is None
    assert ring.producer.put(bytes(longest))


def test_of_many_that_are_put_a_prefix_is_there_and_none_is_torn_wherever_it_is_interrupted() -> None:
    bodies = [content(number, 700) for number in range(40)]
    seen = set()
    for label in LABELS[:3]:
        for times in range(1, 6):
            ring = Ring()
            left = [times]

            def step(reached: str, label: str = label, left: list[int] = left) -> None:
                left[0] -= reached == label
                if not left[0]:
                    _sys.crash_points.clear()
                    raise Interrupted

            _sys.crash_points[:] = [step]
            try:
                ring.producer.put_many(bodies, [0] * 40, 0)
            except Interrupted:
                pass
            finally:
                _sys.crash_points.clear()
            found = [body for _, body in ring.consumer.get_many(100)]
            assert found == bodies[: len(found)]
            seen.add(len(found))
    assert len(seen) > 2


# -- memory that is taken as it is needed ----------------------------------------------------------------------------------


def test_memory_of_a_lazy_ring_is_taken_when_needed_and_given_back() -> None:
    ring = Ring(LAZY)
    before = ring.memory_taken()
    for _ in range(11):
        assert ring.producer.put(bytes(CHUNK - 16))
    full = ring.memory_taken()
    assert full >= before + 10 * CHUNK
    assert len(ring.consumer.get_many(100)) == 11
    kept = ring.states().count(_ring.FREE)
    assert kept == _ring.KEPT_CHUNKS
    assert ring.memory_taken() <= before + (kept + 1) * CHUNK
    assert ring.producer.put(bytes(LAZY.longest))
    assert ring.consumer.get() == (0, bytes(LAZY.longest))


def test_memory_for_some_large_messages_is_kept() -> None:
    ring = Ring(Geometry(CHUNK, 64, 64, is_lazy=True, kept=1))
    body = bytes(2 * CHUNK)
    for take in (lambda: ring.consumer.get_many(100), ring.consumer.get):
        for _ in range(20):
            assert ring.producer.put(body)
        while take():
            pass
        assert ring.states().count(_ring.FREE) == _ring.LARGE_KEPT * 2
    taken = ring.memory_taken()
    for _ in range(50):
        assert ring.producer.put(body)
        assert ring.consumer.get() == (0, body)
    assert ring.memory_taken() == taken, "memory was taken anew, or given back"


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_some_large_messages_may_wait_where_few_chunks_may_be_used(chunks: int) -> None:
    ring = Ring(Geometry(CHUNK, 64, 2, is_lazy=True))
    body = bytes(chunks * CHUNK - 16)
    put = 0
    while ring.producer.put(body):
        put += 1
    # The first chunk is in use from the beginning on, and a message of one chunk begins in it.
    assert put * chunks + (chunks > 1) == {1: 4, 2: 7, 3: 10}[chunks]


@pytest.mark.parametrize(
    ("window", "places"), [(64, [1, 2, 3, 4, 5, 6, 7, 8, 0, 1]), (5, [1, 2, 3, 4, 0, 1, 2]), (0, [1, 2, 0, 1, 2])]
)
def test_single_chunks_are_used_one_after_the_other(monkeypatch: pytest.MonkeyPatch, window: int, places: list[int]) -> None:
    """What the other end's processor has in its cache is not written to again at once."""
    monkeypatch.setattr(_ring, "ROTATION", window * CHUNK)
    ring = Ring(SMALL)
    producer = ring.producer
    assert producer.put(bytes(CHUNK - 16))
    for place in places:
        assert producer.put(bytes(CHUNK - 16))
        assert ((producer.view[producer.tail] & _ring.PLACE) << 3) // CHUNK == place
        assert ring.consumer.get() is not None


def test_who_gets_alone_looks_at_tail_only_when_it_has_come_so_far() -> None:
    """The word, and the producers' lock beside it, stay in the cache of the producer's processor."""
    ring = Ring()
    producer, consumer, other = ring.producer, ring.consumer, ring.new_consumer()
    view, put = producer.view, [str(number).encode() for number in range(9)]
    for body in put[:6]:
        assert producer.put(body)
    tail = view[producer.tail]
    assert consumer.get() == (0, put[0])
    view[producer.tail] = view[consumer.head]  # who looks finds nothing
    assert consumer.get() == (0, put[1])
    view[producer.tail] = tail
    assert other.get() == (0, put[2]), "it has seen nothing yet"
    view[producer.tail] = view[consumer.head]
    assert consumer.get() is None, "HEAD is not where it left it, so that it has to look"
    view[producer.tail] = tail
    assert [consumer.get() for _ in range(4)] == [*((0, body) for body in put[3:6]), None]
    for one, body in zip([consumer, other, consumer], put[6:], strict=True):
        assert producer.put(body)
        assert one.get() == (0, body)
        assert consumer.get() is other.get() is None


class Clock(_sys.System):
    """A clock that goes on by a microsecond whenever somebody looks."""

    now = 0

    def monotonic_ns(self) -> int:
        self.now += 1000
        return self.now


@pytest.mark.parametrize("length", [0, 8_000_000])
def test_looking_at_who_copies_becomes_shorter_each_time_that_it_is_in_vain(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Where both ends run on the same processor, who looks keeps the other one from copying."""
    clock = Clock()
    monkeypatch.setattr(_ring, "SYSTEM", clock)
    monkeypatch.setattr(_ring, "CORES", 2)
    ring = Ring()
    producer = ring.producer
    view = producer.view
    place = ring.consumer.lock._words.places[0][0]
    view[place] = _process.make_word(os.getppid(), 1)  # another process is inside

    def look(*, comes: bool) -> int:
        before = clock.now
        assert producer._comes_while_they_copy(producer.writable_block, lambda: comes, length) is comes
        return clock.now - before

    looks = [look(comes=False) for _ in range(8)]
    longest = max(_ring.LONGEST_COPY, length // _ring.SLOWEST_COPY)
    assert looks[0] == pytest.approx(longest, abs=5000)
    assert looks[1] == pytest.approx(longest / 2, abs=5000)
    assert looks[6] == looks[7] == pytest.approx(longest / 2**_ring.MOST_DOUBTS, abs=5000)
    for _ in range(_ring.MOST_DOUBTS):
        look(comes=True)
    assert look(comes=False) == pytest.approx(longest, abs=5000)
    view[place] = 0
    assert look(comes=False) == 0, "nobody copies"


def test_who_finds_it_there_while_looking_looks_longer_next_time() -> None:
    producer = Ring().producer
    producer._doubts, producer.looks = 2, _ring.MOST_LOOKS - 15
    found = []
    for _ in range(3):
        assert producer.wait_until(producer.writable_block, lambda: True, None)
        found.append((producer._doubts, producer.looks))
    assert found == [(1, _ring.MOST_LOOKS - 5), (0, _ring.MOST_LOOKS), (0, _ring.MOST_LOOKS)]


def test_without_memory_put_raises_and_the_ring_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(LAZY)
    reserve = _sys.System.reserve
    allowed = [2]

    def reserve_some(system: Any, descriptor: int, first: int, length: int) -> None:
        allowed[0] -= 1
        if allowed[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(system, descriptor, first, length)

    monkeypatch.setattr(_sys.System, "reserve", reserve_some)
    with pytest.raises(OSError, match="No space left") as caught:
        ring.producer.put(bytes(5 * CHUNK))
    assert caught.value.errno == errno.ENOSPC
    assert ring.consumer.get() is None
    assert ring.producer.put(b"there is room for this one in the present chunk")
    allowed[0] = 1000
    assert ring.producer.put(bytes(5 * CHUNK))
    assert [len(body) for _, body in ring.consumer.get_many(9)] == [47, 5 * CHUNK]
    assert ring.used() == ring.chunks_of_messages()


def test_an_end_that_was_mapped_early_finds_messages_that_lie_far_behind() -> None:
    """Each process maps as much of a large ring as it has needed so far."""
    ring = Ring(LAZY)
    late = ring.new_producer()
    for number in range(11):
        assert ring.producer.put(content(number, CHUNK - 16 if number < 10 else 8))
    assert late.put(b"small, in a chunk that this end has not mapped yet")
    assert late.put_many([b"more"], [0], 0) == 1
    assert late.put(b"")
    got = ring.new_consumer().get_many(100)
    assert [body for _, body in got][-3:] == [b"small, in a chunk that this end has not mapped yet", b"more", b""]


def test_what_a_dead_consumer_had_half_given_back_and_others_use_again_is_let_alone() -> None:
    """The chunks that it left are recognised by a way through them that nobody may have overwritten (R6)."""
    for label in LABELS[5:]:
        ring = Ring()
        bodies = [content(number, 1300) for number in range(12)]
        assert ring.producer.put_many(bodies, [0] * 12, 0) == 12
        with interrupted_at(label), pytest.raises(Interrupted):
            ring.consumer.get_many(7)
        more = []
        for number in range(100, 140):
            body = content(number, 1100)
            if ring.producer.put(body):
                more.append(body)
        assert more, "the chunks of the dead are free for producers"
        got = []
        while (message := ring.consumer.get()) is not None:
            got.append(message[1])
            ring.producer.put(b"")
            if not more or len(got) > 80:
                break
        assert [body for body in got if body] == bodies[7:] + more


def test_who_waits_for_room_tries_again_when_only_the_dead_are_in_the_way() -> None:
    """Nobody else would ever give these chunks back, or wake it."""
    ring = Ring(Geometry(CHUNK, 5, 3))
    producer = ring.producer
    for is_intent in (False, True):
        if is_intent:  # of a producer that died before it had written the message
            producer.table[2] = producer.table[3] = _ring.USED
            producer.view[producer.intent] = 2 << _ring.COUNT_SHIFT | 2
        else:  # of a consumer
            producer.table[2] = producer.table[4] = _ring.LEFT
        assert producer.has_room(ring.geometry.longest) == is_intent
        assert producer.wait_for_room(ring.geometry.longest, _sys.SYSTEM.monotonic() + PATIENCE)
        assert producer.put(bytes(ring.geometry.longest))
        assert ring.consumer.get() == (0, bytes(ring.geometry.longest))
        while (producer.view[producer.tail] & _ring.PLACE) << 3 >= CHUNK:  # until TAIL is in the first chunk again
            assert producer.put(bytes(CHUNK - 16))
            assert ring.consumer.get() is not None


# -- waiting --------------------------------------------------------------------------------------------------------------


def waiting_at(end: Any, block: Any) -> int:
    return len(list(end.parking.waiting(block.index)))


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sleeps is woken, or the test hangs: nobody looks by itself."""
    monkeypatch.setattr("shlock._parking.POLL_INTERVAL", 1e6)
    monkeypatch.setattr("shlock._parking.LONGEST_POLL_INTERVAL", 1e6)


class Threads:
    """Threads whose exceptions count."""

    def __init__(self) -> None:
        self.all: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        def body() -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.errors.append(error)
                raise

        thread = threading.Thread(target=body, daemon=True)
        self.all.append(thread)
        thread.start()

    def join(self) -> None:
        for thread in self.all:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread hangs"
        assert not self.errors


def get_one(consumer: Consumer) -> bytes:
    while (got := consumer.get()) is None:
        consumer.wait_for_message(None)
    consumer.pass_on()
    return bytes(got[1])


def put_one(producer: Producer, body: bytes) -> None:
    while not producer.put(body):
        producer.wait_for_room(len(body), None)
    producer.pass_on()


@pytest.mark.usefixtures("no_polls")
@pytest.mark.parametrize("most", [None, 1, 3])
def test_many_producers_and_consumers_lose_no_wake_up(most: int | None) -> None:
    ring = Ring()
    rounds, threads, got = 300, Threads(), deque[bytes]()

    def produce(first: int) -> None:
        end = ring.new_producer()
        end.most_messages = most or end.most_messages
        for number in range(rounds):
            put_one(end, content(first + number, (number * 397) % 6000 + 8))

    def consume() -> None:
        end = ring.new_consumer()
        end.most_messages = most or end.most_messages
        while (body := get_one(end)) != b"end":
            got.append(body)

    for number in range(3):
        threads.start(produce, number * rounds)
    for _ in range(3):
        threads.start(consume)
    for thread in threads.all[:3]:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a producer hangs"
    end = ring.new_producer()
    end.most_messages = most or end.most_messages
    for _ in range(3):
        put_one(end, b"end")
    threads.join()
    assert sorted(int.from_bytes(body[:8], "little") for body in got) == list(range(3 * rounds))


@pytest.mark.usefixtures("no_polls")
def test_a_small_message_behind_a_large_one_is_woken_when_there_is_room_for_it() -> None:
    ring = Ring()
    threads = Threads()
    sent = 0
    for body in (bytes(CHUNK // 2), bytes(100)):
        while ring.producer.put(body):
            sent += 1
    producers = [ring.new_producer() for _ in range(3)]
    lengths = (ring.geometry.longest, ring.geometry.longest, 200)
    for number, (producer, length) in enumerate(zip(producers, lengths, strict=True)):
        threads.start(put_one, producer, bytes(length))
        eventually(lambda n=number: waiting_at(producer, producer.writable_block) == n + 1)
        sent += 1
    consumer = ring.consumer
    while consumer.view[consumer.writable] & at.PARKED:
        assert consumer.get() is not None
        sent -= 1
    eventually(lambda: not threads.all[2].is_alive(), "the one behind the two large ones is through")
    for _ in range(sent):  # not more: a thread that has put its message may still be there when nothing comes any more
        get_one(consumer)
    threads.join()
    assert consumer.get() is None


@pytest.mark.usefixtures("no_polls")
def test_a_chosen_one_that_leaves_passes_its_wake_up_on() -> None:
    """It is chosen while it withdraws, and the message is for the other."""
    ring = Ring()
    threads, got = Threads(), list[bytes]()
    first, second = ring.new_consumer(), ring.new_consumer()
    left = threading.Event()

    class Stop(Exception):
        pass

    def is_over() -> bool:
        raise Stop

    def leave() -> None:
        with pytest.raises(Stop):
            first.wait_for_message(None, is_over)
        left.set()

    threads.start(leave)
    eventually(lambda: waiting_at(first, first.readable_block) == 1)
    threads.start(lambda: got.append(get_one(second)))
    eventually(lambda: waiting_at(first, first.readable_block) == 2)
    # The first in line is woken for nothing: it leaves at once, because it is shut; the mark is gone by then.
    ring.producer.view[ring.producer.writable] |= _ring.SHUT
    ring.producer.wake(ring.producer.readable_block)
    left.wait(PATIENCE)
    assert ring.producer.put(b"for the second")
    threads.join()
    assert got == [b"for the second"]


@pytest.mark.usefixtures("no_polls")
def test_a_mark_is_left_for_those_who_sleep_on_when_the_chosen_one_finds_nothing() -> None:
    ring = Ring()
    consumer = ring.consumer
    waiter = _ring._Waiter(consumer, consumer.readable_block, lambda: False, None, lambda: not consumer.is_empty(), None)
    assert not consumer.view[consumer.readable] & at.PARKED
    waiter.withdraw(True, True)
    assert consumer.view[consumer.readable] & at.PARKED


def test_within_raises_when_others_keep_the_lock() -> None:
    ring = Ring()
    other = ring.new_producer()

    def put() -> bool:
        return other.put(b"x", 0, Within(other, _sys.SYSTEM.monotonic() + 0.02))

    def put_in_vain() -> None:
        with pytest.raises(TimeoutError, match="others were busy"):
            put()

    threads = Threads()
    with ring.producer.lock:
        threads.start(put_in_vain)
        threads.join()
        with pytest.raises(RuntimeError, match="this thread is inside already"):
            put()
        assert ring.producer.lock.locked(), "that was not its own to release"
    assert put()


# -- fork -----------------------------------------------------------------------------------------------------------------


def test_a_child_that_is_forked_in_the_middle_of_put_or_get_does_not_go_on_as_its_parent() -> None:
    """Its stores of TAIL and HEAD would come late, and undo what others have done since."""
    for label, operation, outcome in (
        ("C30 bytes written", lambda ring: ring.producer.put(b"parent's"), [b"first", b"parent's", b"later"]),
        ("C33 bytes read", lambda ring: ring.consumer.get(), [b"later"]),
    ):
        ring = Ring()
        ring.producer.put(b"first")
        ready, go = os.pipe()
        children: list[int] = []

        def fork(reached: str, label: str = label, ready: int = ready, children: list[int] = children) -> None:
            if reached == label and not children:
                children.append(os.fork())
                if not children[0]:
                    os.read(ready, 1)

        _sys.crash_points[:] = [fork]
        try:
            operation(ring)
        except RuntimeError as error:
            os._exit(0 if not children[0] and "forked in the middle" in str(error) else 1)
        except BaseException:
            if children and not children[0]:
                os._exit(2)
            raise
        finally:
            _sys.crash_points.clear()
        if not children[0]:
            os._exit(3)
        ring.producer.put(b"later")
        os.write(go, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
        assert [body for _, body in ring.consumer.get_many(9)] == outcome
        os.close(ready)
        os.close(go)


def test_a_forked_child_uses_both_ends_of_its_parents_ring() -> None:
    ring = Ring()

    def use() -> list[bytes]:
        got = [get_one(ring.consumer), get_one(ring.consumer)]
        put_one(ring.producer, b"from the child")
        return got

    ring.producer.put(b"one")
    child = Child(use)
    put_one(ring.producer, b"two")
    assert child.result() == [b"one", b"two"]
    assert get_one(ring.consumer) == b"from the child"


# -- damaged words --------------------------------------------------------------------------------------------------------

KINDS_OF_WORDS = ["tail", "head", "intent", "theirs", "after", "table", "data"]
WORDS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**40 - 1, 2**63, 2**64 - 1, 2**63 + 512, 4096, 512, 511]),
    st.builds(lambda count, place: count << 32 | place, st.integers(0, 20), st.integers(0, 9 * 512)),
)


@settings(max_examples=400, deadline=None)
@given(
    places=st.lists(st.tuples(st.sampled_from(KINDS_OF_WORDS), WORDS), min_size=1),
    at_byte=st.integers(0, 9 * CHUNK // 8 - 1),
)
def test_overwritten_words_are_an_error_and_never_a_crash_or_a_hang(places: list[tuple[str, int]], at_byte: int) -> None:
    """Every operation ends, with messages or with an error that says what is wrong."""
    ring = Ring()
    for number in range(9):
        ring.producer.put(content(number, 1500))
    producer, consumer = ring.producer, ring.consumer
    with memoryview(ring.memory.map(ring.geometry.first + ring.geometry.table, ring.geometry.chunks * CHUNK)) as data:
        words = data.cast("Q")
        for where, value in places:
            if where == "data":
                words[at_byte] = value
            elif where == "table":
                producer.table[value % ring.geometry.chunks] = value & 0xFF
            else:
                place = {
                    "tail": producer.tail,
                    "head": producer.head,
                    "intent": producer.intent,
                    "theirs": producer._their_intent,
                    "after": producer._their_intent + 1,
                }[where]
                producer.view[place] = value
        words.release()
    operations: list[Callable[[], Any]] = [
        lambda: consumer.get(),
        lambda: producer.put(b"small"),
        lambda: consumer.get_many(10),
        lambda: producer.put_many([b"x" * 3000, b"y", bytes(5000)], [0, 0, 0], 0),
        lambda: producer.put(bytes(10_000)),
        lambda: producer.has_room(5000),
        lambda: producer._is_stuck(),
        lambda: consumer.get(),
    ]
    for operation in operations:
        try:
            operation()
        except SegmentError as error:
            assert "overwritten" in str(error)


def test_a_ring_knows_that_its_last_message_ends_behind_the_last_chunk() -> None:
    ring = Ring()
    ring.producer.put(b"x")
    ring.producer.view[ring.producer.tail] = 1 << 32 | 2**32 - 1
    ring.producer.view[ring.producer.head] = 2**32 - 2
    for operation in (lambda: ring.producer.put(b"y"), lambda: ring.consumer.get(), lambda: ring.consumer.get_many(2)):
        with pytest.raises(SegmentError, match="a message ends behind the last chunk"):
            operation()


# -- many of the same length ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 8, 9, 100, 1000, CHUNK - 16, CHUNK, _ring.MOST_JOINED + 1])
@pytest.mark.parametrize("tag", [0, 2, 3])
@pytest.mark.parametrize("geometry", [SMALL, LAZY])
def test_many_messages_of_one_length_are_those_that_were_put(geometry: Geometry, tag: int, length: int) -> None:
    ring = Ring(geometry)
    sent: deque[bytes] = deque()
    number = 0
    for count in (1, 2, 63, 64, 65, 200) * 3:
        bodies = [content(number + index, length) for index in range(count)]
        done = ring.producer.put_many(bodies, [tag] * count, 0)
        assert done
        sent += bodies[:done]
        number += done
        while sent:
            found = ring.consumer.get_many(max(1, len(sent) * 2 // 3))
            assert [(tag, sent.popleft()) for _ in found] == found
            if sent:
                assert ring.consumer.get() == (tag, sent.popleft())
    assert ring.consumer.waiting() == 0


def test_a_message_of_another_length_ends_a_row_of_equal_ones() -> None:
    ring = Ring()
    bodies = [b"x" * 16] * 5 + [b"y" * 15, b"", b"z" * 16, *[b"x" * 16] * 3, b"w" * 24, b"w" * 24]
    for most in range(1, len(bodies) + 2):
        tags = [0] * len(bodies)
        tags[2] = 1
        assert ring.producer.put_many(bodies, tags, 0) == len(bodies)
        found: list[Any] = []
        while ring.consumer.waiting():
            found += ring.consumer.get_many(most)
        assert found == list(zip(tags, bodies, strict=True))


@pytest.mark.parametrize("label", ["C30 bytes written", "C31 TAIL stored", "C33 bytes read", "C34 HEAD stored"])
def test_a_row_of_equal_messages_is_put_and_taken_at_once_or_not_at_all(label: str) -> None:
    ring = Ring()
    bodies = [content(index, 40) for index in range(30)]
    with interrupted_at(label), pytest.raises(Interrupted):
        ring.producer.put_many(bodies, [0] * 30, 0)
        ring.consumer.get_many(30)
    left = {"C30 bytes written": 0, "C31 TAIL stored": 30, "C33 bytes read": 30, "C34 HEAD stored": 0}[label]
    assert [body for _, body in ring.new_consumer().get_many(99)] == bodies[:left]


def test_headers_that_change_after_they_were_checked_decide_nothing() -> None:
    """Of the machine, another user may write there: neither a length that was not checked counts, nor a loop without an end."""
    ring = Ring()
    for _ in range(4):
        assert ring.producer.put(b"12345678")
    consumer, first = ring.consumer, ring.consumer.words[0]
    for lie in (0, 1 << 30, _ring.LINK, first | 1 << _ring.TAG_SHIFT):
        for place in (0, 2):
            ring.producer.words[place] = lie
            end, found = consumer._equals(0, first, 16, 4)
            assert [len(body) for (body,) in found] == [8] * (end // 16)
            assert end == (64 if place == 0 else 16)
            ring.producer.words[place] = first
