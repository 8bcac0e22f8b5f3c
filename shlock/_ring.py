"""Messages in shared memory, from many producers to many consumers, in order: what Channel, Pipe and Queue are made of.

The memory is cut into chunks.  Messages follow each other inside a chunk; where the next one does not fit, a link leads to
another chunk, or to a run of several for a message that is larger.  So every message lies in one piece, whatever its size, and
the memory that is in use grows and shrinks with what is waiting.

    TAIL, HEAD  count of messages, modulo 2**32, << 32 | place of the next one, in words from the first chunk
    message     header word: length in bytes | tag << 40, then the bytes, up to a word boundary
    link        header word: LINK | place of the message that should be here
    chunk       one byte in the table: NO_MEMORY, FREE or USED

Producers have a lock, consumers another one (those of ``_owned``, which outlive their holders), and each writes only what is
its own: TAIL, message and link the one, HEAD the other.  A chunk is made USED by producers and anything else by consumers.

    # R1  a message is visible only when it is whole: TAIL is stored last, in one step
    # R2  a message is gone only when it was read to its end: HEAD is stored last, in one step; a consumer that dies before
    #     gives it back, one that dies afterwards had it
    # R3  there is always room for one link behind the last message
    # R4  chunks between HEAD and TAIL are USED; others are not, but for those that INTENT names
    # R5  memory is reserved before it is written to: a full /dev/shm is an OSError of put

    killed after                     words say                 repaired by                outcome
    C30 bytes written                TAIL unchanged            -                          the message was never sent
    C31 TAIL stored                  message there, lock held  the next producer          sent; a consumer asleep finds it
                                                                                          within its poll interval
    C32 chunks taken, link written   INTENT of producers       next time chunks are taken the chunks are free again
    C33 bytes read                   HEAD unchanged            the next consumer          it gets this message
    C34 HEAD stored                  message gone, lock held   the next consumer          the dead one had it
    C35 HEAD stored, chunks USED     INTENT of consumers       next time chunks are given the chunks are free
                                                               back, or are short

Who finds the ring empty (or full) parks at the word READABLE (or WRITABLE) of the ring: it sets PARKED there, looks again, and
sleeps.  Who puts a message there (or takes one away) clears PARKED and wakes one, who either acts and then wakes the next
if there is more to do, or passes the wake-up on.  Storing TAIL before looking at PARKED needs a fence in between: that is the
release of the lock.  A wake-up that dies with the process which owed it is made up for by the sleeper's poll.
"""

from __future__ import annotations

import errno
import mmap
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from . import _layout as at
from . import _process
from ._arena import Block, Declaration
from ._atomic import Operand, fence
from ._lending import Lender
from ._memory import Memory, pages
from ._owned import IGNORE, usable_cores
from ._parking import Spot, parking_of
from ._pickling import Part
from ._sys import SYSTEM, crash_points
from .contract import Terms
from .errors import SegmentError
from .synchronize import Lock, owned_words

__all__ = ["CONTROLS", "LONGEST", "Consumer", "Geometry", "Producer", "Within", "declarations", "prepare"]

PRODUCERS, CONSUMERS, READABLE, WRITABLE = range(4)  # control blocks of a ring, from its first one on
CONTROLS: Final = 4

LENGTH_BITS: Final = 40
LENGTH: Final = (1 << LENGTH_BITS) - 1
TAG_SHIFT: Final = LENGTH_BITS
TAG: Final = 0xFF
LINK: Final = 1 << 63
#: A header word from here on is of a message that is taken as a bytearray, which can be written to.
TO_BE_WRITTEN: Final = 3 << TAG_SHIFT
#: In READABLE: nobody will take messages any more; in WRITABLE: nobody will put any.
SHUT: Final = 1 << 1
ATTENTION: Final = at.PARKED | SHUT

COUNT_SHIFT: Final = 32
PLACE: Final = (1 << COUNT_SHIFT) - 1
COUNT: Final = PLACE
ONE: Final = 1 << COUNT_SHIFT
LONGEST: Final = (PLACE + 1) * at.WORD // 4  # bytes of a message: a run of chunks is found though others lie in between

NO_MEMORY, FREE, USED = range(3)
_NO_MEMORY_BYTE, _FREE_BYTE, _USED_BYTE = (bytes([state]) for state in (NO_MEMORY, FREE, USED))
OVERHEAD: Final = 3 * at.WORD - 1  # of a message: its header, what it is rounded up by, and a link behind it
#: Chunks that nobody uses and that keep their memory, where memory is taken as it is needed.
KEPT_CHUNKS: Final = 8

MOST_LOOKS: Final = 300  # at a ring that is empty or full, before a thread parks; each takes some 0.1 us
FEWEST_LOOKS: Final = 10

#: Where stores may pass stores and loads pass loads, there is a fence between a message and TAIL, or HEAD.
IS_WEAK: Final = platform.machine() not in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Geometry:
    """How large a ring is.

    chunk   bytes, a power of two and whole pages
    chunks  how many there are
    most    how many may be in use while more than one message is waiting
    first   byte of the data at which the ring begins: its table, and then its chunks
    is_lazy whether the memory of a chunk is taken when it is first used, and given back when many are not
    """

    chunk: int
    chunks: int
    most: int
    first: int = 0
    is_lazy: bool = False

    @classmethod
    def for_capacity(cls, capacity: int, first: int = 0) -> Geometry:
        """One that holds messages of so many bytes in all, and any single one up to that size.  About twice that in memory."""
        chunk = at.PAGE
        while chunk * 16 < capacity:
            chunk *= 2
        run = -(-(capacity + OVERHEAD) // chunk)
        # The last message may lie in the middle: then there is a run on one of its sides.
        return cls(chunk, 2 * run + 1, run + 1, first)

    @property
    def table(self) -> int:
        """Bytes of the table."""
        return pages(self.chunks)

    @property
    def size(self) -> int:
        """Bytes of the whole ring."""
        return self.table + self.chunk * self.chunks

    @property
    def longest(self) -> int:
        """Bytes of the longest message."""
        return min(self.chunk * ((self.chunks - 1) // 2) - OVERHEAD, LONGEST)


def declarations(kind: int, lease: int = 0, grace: int = 0) -> tuple[Declaration, ...]:
    """Those of the control blocks of a new ring.  Who gets a lock of it after a death has nothing to repair."""
    lock = Declaration(kind, policy=IGNORE, lease=lease, grace=grace)
    return lock, lock, Declaration(kind), Declaration(kind)


def prepare(memory: Memory, geometry: Geometry) -> None:
    """Make the first state of a ring in a new segment.  OSError if the memory for it can't be had."""
    whole = geometry.table + (geometry.chunk if geometry.is_lazy else geometry.chunk * geometry.chunks)
    memory.reserve(geometry.first, whole)
    with memoryview(memory.map(geometry.first, geometry.table)) as table:
        table[: geometry.chunks] = (_NO_MEMORY_BYTE if geometry.is_lazy else _FREE_BYTE) * geometry.chunks
        table[0] = USED


class _End:
    """What producers and consumers have in common: the words, the table, a mapping of the chunks, and waiting."""

    def __init__(self, memory: Memory, control: int, geometry: Geometry, name: str, *, writable: bool) -> None:
        arena = memory.arena
        self.memory = memory
        self.arena = arena
        self.geometry = geometry
        self.text = name
        self.view = arena.words.view
        producers, consumers, self.readable_block, self.writable_block = (
            memory.control(control + index) for index in range(CONTROLS)
        )
        self.tail = producers.start + at.BLOCK_PLACE
        self.head = consumers.start + at.BLOCK_PLACE
        self.readable = self.readable_block.word
        self.writable = self.writable_block.word
        self.parking = parking_of(arena)
        self.chunk = geometry.chunk
        self.mask = geometry.chunk - 1
        self.room = geometry.chunk - OVERHEAD  # the longest message at the beginning of a chunk
        self.table = memoryview(memory.map(geometry.first, geometry.table))
        self.most_messages = COUNT  # that may wait
        self.looks = MOST_LOOKS // 4
        self._writable_data = writable
        self._mapped = 0  # bytes of chunks
        self.lock: Lock
        self.lender: Lender
        self.map_up_to(min(geometry.chunk * min(geometry.chunks, KEPT_CHUNKS), geometry.chunk * geometry.chunks))

    # -- memory -------------------------------------------------------------------------------------------------------

    def map_up_to(self, end: int) -> None:
        """Have the chunks mapped up to a byte, at least.  SegmentError if there are not so many."""
        if end > self.chunk * self.geometry.chunks:
            raise self.damaged("a message ends behind the last chunk")
        if end > self._mapped:
            mapped = self._mapped or self.chunk
            while mapped < end:
                mapped *= 2
            self._mapped = min(mapped, self.chunk * self.geometry.chunks)
            self.lender = Lender(self._map)
            self.look_again()

    def _map(self) -> mmap.mmap:
        return self.memory.map(self.geometry.first + self.geometry.table, self._mapped, writable=self._writable_data)

    def look_again(self) -> None:
        """Take the views of the present mapping."""
        self.data = memoryview(self.lender.mapping)
        self.words = self.data.cast("Q")

    def give_back(self, left: list[range]) -> None:
        """Chunks are not in use any more."""
        table = self.table
        for chunks in left:
            for index in chunks:
                if table[index] != USED:
                    continue
                state = FREE
                if self.geometry.is_lazy and table[: self.geometry.chunks].tobytes().count(_FREE_BYTE) >= KEPT_CHUNKS:
                    self.memory.give_back(self.geometry.first + self.geometry.table + index * self.chunk, self.chunk)
                    state = NO_MEMORY
                table[index] = state

    def damaged(self, fact: str) -> SegmentError:
        return self.arena.damaged(f"{self.text}: {fact}")

    # -- what is there ------------------------------------------------------------------------------------------------

    def waiting(self) -> int:
        """How many messages there are."""
        return (self.view[self.tail] >> COUNT_SHIFT) - (self.view[self.head] >> COUNT_SHIFT) & COUNT

    def is_empty(self) -> bool:
        return self.view[self.tail] >> COUNT_SHIFT == self.view[self.head] >> COUNT_SHIFT

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_until(
        self, block: Block, condition: Callable[[], bool], deadline: float | None, is_over: Callable[[], bool] | None = None
    ) -> bool:
        """Block until the condition holds (True), or until the deadline, or until ``is_over`` (False).

        The condition is made true by others that then call ``wake``.
        """
        looks = self.looks if usable_cores() > 1 else 1
        for _ in range(looks):
            if condition():
                self.looks = min(MOST_LOOKS, self.looks + 10)
                return True
        self.looks = max(FEWEST_LOOKS, self.looks - 5)
        if deadline is not None and SYSTEM.monotonic() >= deadline:
            return False
        waiter = _Waiter(self, block, condition, is_over)
        while True:
            try:
                return self.parking.park(waiter, deadline) and not waiter.over
            except _process.Forked:
                waiter = _Waiter(self, block, condition, is_over)

    def wake(self, block: Block, most: int = 1) -> None:
        """Have one that waits at this word look again, or several."""
        place, view = block.word, self.view
        operand = Operand()
        pointer = self.arena.words.pointer(place)
        for _ in range(100):  # somebody may overwrite it all the time
            w = view[place]
            if not w & at.PARKED or operand.compare_exchange(pointer, w, w & ~at.PARKED):
                break
        if most == 1:
            self.parking.unpark_one(block.index)
        else:
            self.parking.unpark_many(block.index, most)


class Within:
    """The lock of one end, for who waits for it until a deadline at most: TimeoutError."""

    __slots__ = ("__exit__", "_deadline", "_end")

    def __init__(self, end: _End, deadline: float) -> None:
        self._end = end
        self._deadline = deadline
        self.__exit__: Callable[..., None] = end.lock.__exit__

    def __enter__(self) -> None:
        lock = self._end.lock
        try:
            if not lock.acquire(True, max(0.0, self._deadline - SYSTEM.monotonic())):
                raise TimeoutError(f"{self._end.text}: others were busy with it until the time was over")
        except BaseException:
            if lock._words.is_mine():
                lock.release()
            raise


class _Waiter:
    """One thread that waits until a ring is not empty, or not full."""

    def __init__(self, end: _End, block: Block, condition: Callable[[], bool], is_over: Callable[[], bool] | None) -> None:
        self.end = end
        self.block = block
        self.index = block.index
        self.condition = condition
        self.is_over = is_over
        self.over = False
        self.mark = Operand()

    def attempt(self, spot: Spot) -> bool:
        spot.renew()
        words = self.end.arena.words
        place, pointer = self.block.word, words.pointer(self.block.word)
        # Counted up, so that who found nobody waiting, and clears the mark late, does not clear this one.
        for _ in range(1000):
            w = words.load(place)
            if self.mark.compare_exchange(pointer, w, (w + at.ONE | at.PARKED) & at.WORD_MASK):
                break
        return self.over or self.condition()

    def poll(self, spot: Spot) -> None:
        if self.is_over is not None and not self.condition() and self.is_over():
            self.over = True

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        if notified:
            self.pass_on()

    def pass_on(self) -> None:
        if self.condition():
            self.end.parking.unpark_one(self.index)


class Producer(_End):
    """The side of a ring on which messages are put, in this process."""

    def __init__(self, memory: Memory, control: int, geometry: Geometry, name: str, terms: Terms | None = None) -> None:
        super().__init__(memory, control, geometry, name, writable=True)
        block = memory.control(control + PRODUCERS)
        self.lock = Lock._over(block, terms, needs="send")
        self.intent = block.start + at.BLOCK_INTENT
        self._consumers = memory.control(control + CONSUMERS)
        self._their_intent = self._consumers.start + at.BLOCK_INTENT
        self.longest = geometry.longest
        self.look_for_the_dead: Callable[[], None] | None = None  # called when several chunks are waiting

    # -- putting ------------------------------------------------------------------------------------------------------

    def put(self, body: Any, tag: int = 0, lock: Lock | Within | None = None) -> bool:
        """Put one message there, without waiting for room; whether there was any.

        body  an object with ``len`` in bytes that a memoryview of bytes can be assigned from
        lock  its own, or Within
        """
        length = len(body)
        view = self.view
        try:
            with lock or self.lock:
                tail = view[self.tail]
                place = (tail & PLACE) << 3
                if (place & self.mask) + length > self.room or self.most_messages != COUNT:
                    place = self._find_place(tail, length)
                    if place < 0:
                        return False
                start = place + 8
                self.data[start : start + length] = body
                self.words[place >> 3] = length | tag << TAG_SHIFT
                if crash_points:
                    crash_points[0]("C30 bytes written")
                if IS_WEAK:
                    fence()
                view[self.tail] = tail + ONE & ~PLACE & at.WORD_MASK | start + length + 7 >> 3  # R1
                if crash_points:
                    crash_points[0]("C31 TAIL stored")
        except IndexError:
            raise self.damaged("TAIL points nowhere") from None
        if view[self.readable] & ATTENTION:
            self.tell()
        return True

    def put_parts(self, parts: list[Part], length: int, tag: int, lock: Lock | Within | None = None) -> bool:
        """Put one message there that is given in parts, as ``put``."""
        try:
            with lock or self.lock:
                place = self._find_place(self.view[self.tail], length)
                if place < 0:
                    return False
                for offset, part in parts:
                    self.data[place + 8 + offset : place + 8 + offset + len(part)] = part
                self.finish(place, length, tag)
        except IndexError:
            raise self.damaged("TAIL points nowhere") from None
        if self.view[self.readable] & ATTENTION:
            self.tell()
        return True

    def put_many(self, bodies: list[Any], tags: Iterable[int], first: int, lock: Lock | Within | None = None) -> int:
        """Put messages there from the one of that index on, without waiting for room; how many there was room for."""
        view, words, data, mask, room = self.view, self.words, self.data, self.mask, self.room
        done = 0
        try:
            with lock or self.lock:
                tail = view[self.tail]
                place, count = (tail & PLACE) << 3, tail >> COUNT_SHIFT
                for body, tag in zip(bodies[first:] if first else bodies, tags, strict=False):
                    length = len(body)
                    if (place & mask) + length > room or self.most_messages != COUNT:
                        if IS_WEAK:
                            fence()
                        view[self.tail] = (count + done & COUNT) << COUNT_SHIFT | place >> 3
                        place = self._find_place(view[self.tail], length)
                        if place < 0:
                            break
                        words, data = self.words, self.data
                    start = place + 8
                    data[start : start + length] = body
                    words[place >> 3] = length | tag << TAG_SHIFT
                    place = start + length + 7 & ~7
                    done += 1
                else:
                    if crash_points:
                        crash_points[0]("C30 bytes written")
                    if IS_WEAK:
                        fence()
                    view[self.tail] = (count + done & COUNT) << COUNT_SHIFT | place >> 3
                if crash_points:
                    crash_points[0]("C31 TAIL stored")
        except IndexError:
            raise self.damaged("TAIL points nowhere") from None
        if done and view[self.readable] & ATTENTION:
            self.tell(done)
        return done

    def wait_for_room(self, length: int, deadline: float | None, is_over: Callable[[], bool] | None = None) -> bool:
        """Block until there may be room for a message."""
        return self.wait_until(self.writable_block, lambda: self.has_room(length), deadline, is_over)

    def pass_on(self) -> None:
        """After waiting for room: wake the next one if there is more."""
        if self.view[self.writable] & at.PARKED and self.has_room(0):
            self.wake(self.writable_block)

    def has_room(self, length: int) -> bool:
        """Whether there is room for a message now, for who has no lock."""
        tail = self.view[self.tail]
        if self.waiting() >= self.most_messages:
            return False
        if ((tail & PLACE) << 3 & self.mask) + length <= self.room:
            return True
        run = -(-(length + OVERHEAD) // self.chunk)
        table = self.table[: self.geometry.chunks].tobytes()
        if not self.is_empty() and table.count(_USED_BYTE) + run > self.geometry.most:
            return False
        return table.replace(_FREE_BYTE, _NO_MEMORY_BYTE).find(_NO_MEMORY_BYTE * run) >= 0

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _find_place(self, tail: int, length: int) -> int:
        """Where the next message goes, under the lock; -1 if there is no room.  ValueError if there never will be."""
        if length > self.longest:
            raise ValueError(f"{self.text}: a message of {length} bytes; the longest that fits has {self.longest}")
        if self.waiting() >= self.most_messages:
            return -1
        place = (tail & PLACE) << 3
        self.map_up_to(place + at.WORD)
        if (place & self.mask) + length <= self.room:
            return place
        self._undo_intent(place)
        run = -(-(length + OVERHEAD) // self.chunk)
        if self.look_for_the_dead is not None and self.table[: self.geometry.chunks].tobytes().count(_USED_BYTE) > run:
            self.look_for_the_dead()
        first = self._find_run(run)
        if first < 0 and self._their_intent_is_open():
            first = self._find_run(run)
        if first < 0:
            return -1
        self.view[self.intent] = first << COUNT_SHIFT | run
        for index in range(first, first + run):
            if self.table[index] == NO_MEMORY:
                self.memory.reserve(self.geometry.first + self.geometry.table + index * self.chunk, self.chunk)  # R5
            self.table[index] = USED
        self.map_up_to((first + run) * self.chunk)
        self.words[place >> 3] = LINK | first * self.chunk >> 3  # R3
        if crash_points:
            crash_points[0]("C32 chunks taken, link written")
        return first * self.chunk

    def _find_run(self, run: int) -> int:
        """The first of so many chunks in a row that are not in use; -1 if there are none, or too many are in use."""
        table = self.table[: self.geometry.chunks].tobytes()
        if not self.is_empty() and table.count(_USED_BYTE) + run > self.geometry.most:
            return -1
        with_memory = table.find(_FREE_BYTE * run)
        return with_memory if with_memory >= 0 else table.replace(_FREE_BYTE, _NO_MEMORY_BYTE).find(_NO_MEMORY_BYTE * run)

    def _undo_intent(self, place: int) -> None:
        """Give back what was taken for a message that was never sent (C32).  ``place``: of TAIL, under the lock."""
        intent = self.view[self.intent]
        if intent:
            first, run = intent >> COUNT_SHIFT, intent & PLACE
            if not first * self.chunk <= place < (first + run) * self.chunk:
                for index in range(first, min(first + run, self.geometry.chunks)):
                    if self.table[index] == USED:
                        self.table[index] = FREE if self._has_memory(index) else NO_MEMORY
            self.view[self.intent] = 0

    def _has_memory(self, index: int) -> bool:
        """Take the memory of a chunk, be it for the second time; whether there is some."""
        try:
            self.memory.reserve(self.geometry.first + self.geometry.table + index * self.chunk, self.chunk)
        except OSError:
            return False
        return True

    def _their_intent_is_open(self) -> bool:
        """Finish what a dead consumer has begun (C35), if no living one is at it."""
        if not self.view[self._their_intent]:
            return False
        words = owned_words(self._consumers, [self._consumers.word])
        if not words.acquire(False, None, repair=True):
            return False
        try:
            finish_giving_back(self, self._their_intent, self.head)
        finally:
            words.release()
        return True

    # -- in place -----------------------------------------------------------------------------------------------------

    def begin(self, length: int) -> tuple[int, memoryview] | None:
        """Under the lock: the place of the next message and a view of its bytes; None if there is no room."""
        place = self._find_place(self.view[self.tail], length)
        return None if place < 0 else (place, self.lender.lend(place + 8, length))

    def finish(self, place: int, length: int, tag: int = 0) -> None:
        """Under the lock: send the message whose bytes are in place."""
        self.words[place >> 3] = length | tag << TAG_SHIFT
        if crash_points:
            crash_points[0]("C30 bytes written")
        if IS_WEAK:
            fence()
        self.view[self.tail] = self.view[self.tail] + ONE & ~PLACE & at.WORD_MASK | place + 8 + length + 7 >> 3
        if crash_points:
            crash_points[0]("C31 TAIL stored")

    def tell(self, count: int = 1) -> None:
        """Without the lock: wake who waits for so many messages.  BrokenPipeError if nobody will take any."""
        w = self.view[self.readable]
        if w & at.PARKED:
            self.wake(self.readable_block, count)
        if w & SHUT:
            raise BrokenPipeError(errno.EPIPE, f"{self.text}: the other end is closed")


class Consumer(_End):
    """The side of a ring on which messages are taken, in this process."""

    def __init__(self, memory: Memory, control: int, geometry: Geometry, name: str, terms: Terms | None = None) -> None:
        super().__init__(memory, control, geometry, name, writable=False)
        block = memory.control(control + CONSUMERS)
        self.lock = Lock._over(block, terms, needs="receive")
        self.intent = block.start + at.BLOCK_INTENT

    # -- taking -------------------------------------------------------------------------------------------------------

    def get(self, lock: Lock | Within | None = None) -> tuple[int, bytes | bytearray] | None:
        """Take the next message: its tag and its bytes; None if there is none.  Waits for nothing but other consumers."""
        view = self.view
        left: list[range] | None = None
        try:
            with lock or self.lock:
                head = view[self.head]
                if view[self.tail] >> COUNT_SHIFT == head >> COUNT_SHIFT:
                    return None
                if IS_WEAK:
                    fence()
                place = (head & PLACE) << 3
                word = self.words[place >> 3] if place < self._mapped else LINK
                length = word & LENGTH
                if word & LINK or (place & self.mask) + length > self.room:
                    left = []
                    place, word = self._follow(place, left)
                    length = word & LENGTH
                start = place + 8
                part = self.data[start : start + length]
                body = part.tobytes() if word < TO_BE_WRITTEN else bytearray(part)
                if crash_points:
                    crash_points[0]("C33 bytes read")
                after = head + ONE & ~PLACE & at.WORD_MASK | start + length + 7 >> 3
                if left is None:
                    view[self.head] = after  # R2
                else:
                    self._step(head, after, left)
                if crash_points:
                    crash_points[0]("C34 HEAD stored")
        except IndexError:
            raise self.damaged("HEAD points nowhere") from None
        if view[self.writable] & at.PARKED and (left or self.most_messages != COUNT or self.is_empty()):
            self.wake(self.writable_block)
        return word >> TAG_SHIFT & TAG, body

    def get_many(self, most: int, lock: Lock | Within | None = None) -> list[tuple[int, bytes]]:
        """Take all messages that are there, up to so many, at once: none of them is gone if we die meanwhile."""
        view = self.view
        found: list[tuple[int, bytes]] = []
        append = found.append
        left: list[range] = []
        try:
            with lock or self.lock:
                head = view[self.head]
                count = min((view[self.tail] >> COUNT_SHIFT) - (head >> COUNT_SHIFT) & COUNT, most)
                if not count:
                    return found
                if IS_WEAK:
                    fence()
                place = (head & PLACE) << 3
                words, data, mask, room, mapped = self.words, self.data, self.mask, self.room, self._mapped
                for _ in range(count):
                    word = words[place >> 3] if place < mapped else LINK
                    length = word & LENGTH
                    if word & LINK or (place & mask) + length > room:
                        place, word = self._follow(place, left)
                        words, data, mapped = self.words, self.data, self._mapped
                        length = word & LENGTH
                    start = place + 8
                    append((word >> TAG_SHIFT & TAG, data[start : start + length].tobytes()))
                    place = start + length + 7 & ~7
                if crash_points:
                    crash_points[0]("C33 bytes read")
                self._step(head, (head >> COUNT_SHIFT) + count << COUNT_SHIFT & at.WORD_MASK | place >> 3, left)
                if crash_points:
                    crash_points[0]("C34 HEAD stored")
        except IndexError:
            raise self.damaged("HEAD points nowhere") from None
        if view[self.writable] & at.PARKED and (left or self.most_messages != COUNT or self.is_empty()):
            self.wake(self.writable_block, count)
        return found

    def wait_for_message(self, deadline: float | None, is_over: Callable[[], bool] | None = None) -> bool:
        """Block until there may be a message."""
        return self.wait_until(self.readable_block, lambda: not self.is_empty(), deadline, is_over)

    def pass_on(self) -> None:
        """After waiting for a message: wake the next one if there are more."""
        if self.view[self.readable] & at.PARKED and not self.is_empty():
            self.wake(self.readable_block)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _follow(self, place: int, left: list[range]) -> tuple[int, int]:
        """Place and header of the message that should be at a place, checked; ``left`` gets the chunks before it."""
        self.map_up_to(place + at.WORD)
        word = self.words[place >> 3]
        if word & LINK:
            before, place = place, (word & PLACE) << 3
            if place & self.mask:
                raise self.damaged("a link leads into the middle of a chunk")
            self.map_up_to(place + at.WORD)
            word = self.words[place >> 3]
            left.append(range(before // self.chunk, before // self.chunk + 1))
        length = word & LENGTH
        if word & LINK or ((place & self.mask) + length > self.room and place & self.mask):
            raise self.damaged("the header of a message was overwritten")
        end = place + length + OVERHEAD & ~7
        self.map_up_to(end)
        if (end - 1) // self.chunk > place // self.chunk:
            left.append(range(place // self.chunk, (end - 1) // self.chunk))
        return place, word

    def _step(self, before: int, after: int, left: list[range]) -> None:
        """Move HEAD, and give back the chunks that are left."""
        view = self.view
        if not left:
            view[self.head] = after  # R2
            return
        if view[self.intent]:
            finish_giving_back(self, self.intent, self.head)
        view[self.intent + 1] = after
        view[self.intent] = (before & PLACE) + 1
        view[self.head] = after  # R2
        if crash_points:
            crash_points[0]("C35 HEAD stored, chunks USED")
        self.give_back(left)
        view[self.intent] = 0

    # -- in place -----------------------------------------------------------------------------------------------------

    def begin(self) -> tuple[int, int, memoryview] | None:
        """Under the lock: HEAD behind the next message, its tag, and a view of its bytes; None if there is none."""
        head = self.view[self.head]
        if self.is_empty():
            return None
        if IS_WEAK:
            fence()
        self._left: list[range] = []
        place, word = self._follow((head & PLACE) << 3, self._left)
        length = word & LENGTH
        after = head + ONE & ~PLACE & at.WORD_MASK | place + 8 + length + 7 >> 3
        return after, word >> TAG_SHIFT & TAG, self.lender.lend(place + 8, length, read_only=True)

    def finish(self, after: int) -> None:
        """Under the lock: the message that ``begin`` gave is taken."""
        if crash_points:
            crash_points[0]("C33 bytes read")
        self._step(self.view[self.head], after, self._left)
        if crash_points:
            crash_points[0]("C34 HEAD stored")

    def tell(self) -> None:
        """Without the lock, after ``finish``: wake who waits for room."""
        if self.view[self.writable] & at.PARKED:
            self.wake(self.writable_block)


def finish_giving_back(end: _End, intent: int, head: int) -> None:
    """Under the lock of the consumers: give back the chunks that one of them had left when it died."""
    view = end.view
    before, after, now = view[intent] - 1 << 3, view[intent + 1], view[head]
    passed = (now >> COUNT_SHIFT) - (after >> COUNT_SHIFT) & COUNT
    if passed < COUNT >> 1:
        left: list[range] = []
        place, goal = before, (after & PLACE) << 3
        for _ in range(end.geometry.chunks * end.chunk // at.WORD):
            if place == goal:
                break
            end.map_up_to(place + at.WORD)
            word = end.words[place >> 3]
            if word & LINK:
                left.append(range(place // end.chunk, place // end.chunk + 1))
                place = (word & PLACE) << 3
                continue
            following = place + 8 + (word & LENGTH) + 7 & ~7
            left.append(range(place // end.chunk, following // end.chunk))
            place = following
        end.give_back(left)
    view[intent] = 0
