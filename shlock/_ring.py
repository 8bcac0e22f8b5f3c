"""Messages in shared memory, from many producers to many consumers, in order: what Channel, Pipe and Queue are made of.

The memory is cut into chunks.  Messages follow each other inside a chunk; where the next one does not fit, a link leads to
another chunk, or to a run of several for a message that is larger.  So every message lies in one piece, whatever its size, and
the memory that is in use grows and shrinks with what is waiting.

    TAIL, HEAD  count of messages, modulo 2**32, << 32 | place of the next one, in words from the first chunk
    message     header word: length in bytes | tag << 40, then the bytes, up to a word boundary
    link        header word: LINK | place of the message that should be here
    chunk       one byte in the table: NO_MEMORY, FREE, USED, or LEFT: read to its end, and about to be FREE
    INTENT      of producers: chunks that are being taken.  Of consumers: the messages whose chunks are being left

Producers have a lock, consumers another one (those of ``_owned``, which outlive their holders), and each writes only what is
its own: TAIL, message and link the one, HEAD the other.  A chunk is made USED by producers and anything else by consumers.
Either lock may be biased (``_bias``), as it soon is where one process puts and another one takes; what is repaired after a
death does not depend on how the dead one got in.  Leased ones, and so those of the machine, never are.

    # R1  a message is visible only when it is whole: TAIL is stored last, in one step
    # R2  a message is gone only when it was read to its end: HEAD is stored last, in one step; a consumer that dies before
    #     gives it back, one that dies afterwards had it
    # R3  there is always room for one link behind the last message
    # R4  chunks between HEAD and TAIL are USED; others are not, but for those that INTENT names
    # R5  memory is reserved before it is written to: a full /dev/shm is an OSError of put
    # R6  no chunk is FREE while the INTENT of consumers is open: the way from message to message through the chunks that are
    #     left can be gone once more, because nobody has written there.  LEFT ones belong to whoever has the consumers' lock
    # R7  whoever sleeps is marked in the word it sleeps at, or a wake-up is under way, or somebody is about to wake one
    # R8  places, lengths, links, intents and counts are what others wrote: each is read once, checked, and used as it was
    #     checked; chunks that are left are counted, so that no way goes in a circle (others need not mean well: ``_machine``)

    killed after                     words say                 repaired by                outcome
    C30 bytes written                TAIL unchanged            -                          the message was never sent
    C31 TAIL stored                  message there, lock held  the next producer          sent; a consumer asleep finds it
                                                                                          within its poll interval
    C32 chunks taken, link written   INTENT of producers       next time chunks are taken the chunks are free again
    C33 bytes read                   HEAD unchanged            the next consumer          it gets this message
    C34 HEAD stored                  message gone, lock held   the next consumer          the dead one had it
    C35 HEAD stored, chunks USED     INTENT of consumers       next time chunks are given the chunks are free
        or LEFT, none of them free   open                      back, or are short
    C35 chunks LEFT, some free       INTENT closed             the same                   the same

Small messages that are alike are copied some at a time (``_look_ahead``), but HEAD moves past each of them alone, when it is
handed out: a copy is of use only to who finds HEAD where it left it, and else forgotten.

Who finds the ring empty (or full) parks at the word READABLE (or WRITABLE) of the ring: it sets PARKED there by an exchange,
looks again, and sleeps.  Who puts a message there (or takes one away) clears PARKED and then wakes one, who either acts and
then wakes the next if there is more to do, or passes the wake-up on: it marks the word for those who still sleep, looks, and
wakes the next.  A chosen producer for whose message there is still no room wakes the one behind it: that one's may be smaller.
Storing TAIL before looking at PARKED needs a fence in between: on x86-64 that is the release of the lock, a locked instruction
also where it is done by the door of a biased lock; elsewhere the door's release orders only what comes before it, and there is
a fence of our own.  So nobody sleeps beside a message without a death; a wake-up that dies with the process which owed it is
made up for by the sleeper's poll.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from . import _bias, _process
from . import _layout as at
from ._arena import Block
from ._atomic import IS_WEAK, Operand, fence
from ._geometry import (
    ATTENTION,
    CONSUMERS,
    CONTROLS,
    COUNT,
    COUNT_SHIFT,
    FREE,
    HIGH,
    KEPT_CHUNKS,
    LARGE_KEPT,
    LEFT,
    LENGTH,
    LINK,
    LONGEST,
    MOST_KEPT,
    NO_MEMORY,
    ONE,
    OVERHEAD,
    PLACE,
    PRODUCERS,
    SHUT,
    STEP,
    TAG,
    TAG_SHIFT,
    USED,
    Geometry,
    declarations,
    prepare,
)
from ._lending import Lender
from ._memory import Memory
from ._owned import IGNORE
from ._parking import Spot, parking_of
from ._pickling import Part
from ._piling import CORES, SLOWEST_COPY, Piling
from ._ring_door import make_get, make_put
from ._sys import SYSTEM, crash_points
from .contract import Terms
from .errors import SegmentError
from .synchronize import Lock, owned_words

__all__ = ["CONTROLS", "LONGEST", "Consumer", "Geometry", "Producer", "Within", "declarations", "prepare"]

#: Messages with a tag from here on are taken as a bytearray, which can be written to.
TO_BE_WRITTEN: Final = 3
#: Bytes of messages that are joined to be written in one piece: longer ones take less to be written than to be copied twice.
MOST_JOINED: Final = 4096
#: Messages that are looked at together to see whether they are equally long.
MOST_EQUALS: Final = 64
#: Bytes of messages, taken together, up to which the memory of a batch is kept for the next one: see ``_keep_memory_for``.
LARGEST_KEPT_BATCH: Final = 16 << 20
#: Messages that are copied together, the next one and some for the ``get`` of this process that follow: if so many are waiting
#: at least, and so many bytes of them.
FEWEST_AHEAD, MOST_BYTES_AHEAD = 4, 128 << 10
WORD_MASK: Final = at.WORD_MASK

_NO_MEMORY_BYTE, *_WITH_MEMORY = (bytes([state]) for state in (NO_MEMORY, FREE, USED, LEFT))
_FREE_BYTE, _USED_BYTE, _LEFT_BYTE = _WITH_MEMORY
#: INTENT of consumers: place of the first message + 1, and from this bit on how many messages.
MESSAGES_SHIFT: Final = 33
MOST_MESSAGES: Final = (1 << 64 - MESSAGES_SHIFT) - 1  # that are taken at once
MOST_OF_MACHINE: Final = 1024  # likewise
OVERTIME: Final = 1.0  # seconds
#: Chunks of which the whole table is searched.
SHORT_TABLE: Final = 64
#: Bytes over which single chunks are used one after the other, instead of the first that is free.  What the other end's
#: processor has just read is in its own cache, from where it takes twice as long to come as from one that both have.
ROTATION: Final = 4 << 20

MOST_LOOKS: Final = 300  # at a ring that is empty or full, before a thread parks; each takes some 0.1 us
FEWEST_LOOKS: Final = 10
#: Nanoseconds for which a thread goes on looking, if somebody is inside at the other end: a long message is being copied there,
#: and to sleep and be woken takes longer than most copies do.  Half as long after each time that this was in vain, as it is
#: where both ends run on the same processor, up to so many times.
LONGEST_COPY: Final = 300_000
MOST_DOUBTS: Final = 5


class _End:
    """What producers and consumers have in common: the words, the table, a mapping of the chunks, and waiting."""

    # In an object with more than 30 attributes and no slots, the interpreter takes three times as long to find each.
    __slots__ = (
        "__weakref__", "_busy", "_doubts", "_is_short", "_known", "_mapped", "_may_go_by_door", "_most", "_nothing",
        "_their_intent", "_writable_data", "arena", "chunk", "data", "geometry", "head", "inside", "intent", "is_allowed",
        "lender", "lent", "lock", "looks", "mapping", "mask", "memory", "most_at_once", "most_messages", "parking",
        "readable", "readable_block", "room", "table", "tail", "text", "view", "way_in", "words", "writable",
        "writable_block",
    )  # fmt: skip

    def __init__(
        self, memory: Memory, control: int, which: int, geometry: Geometry, name: str, terms: Terms | None, needs: str
    ) -> None:
        """``which`` of the control blocks has the lock of this end; ``needs``: what the contract must allow to use it."""
        arena = memory.arena
        self.is_allowed = terms is None or needs in terms.operations
        self._may_go_by_door = not IS_WEAK and terms is None  # as in ``_ring_door``, which has no fences and no lease
        self.memory = memory
        self.arena = arena
        self.geometry = geometry
        self.text = name
        self.view = arena.words.view[:]  # of its own: see in_child
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
        self.table = memoryview(memory.map(geometry.first, geometry.table))[: geometry.chunks]
        self._known, self._nothing = 0, b""  # how much of the table was ever in use, and what there is behind that
        self._is_short, self._most = geometry.chunks <= SHORT_TABLE, geometry.most
        self.most_messages = COUNT  # that may wait
        self.looks = MOST_LOOKS // 4
        self._doubts = 0  # how often looking for longer was in vain, less how often something came while it looked
        self.intent = 0  # that of this end
        #: By the word at which a thread waits: the control block with the lock of those for whom it waits.
        self._busy = {self.readable_block.index: producers, self.writable_block.index: consumers}
        self.lent: memoryview | None = None
        self._their_intent = consumers.start + at.BLOCK_INTENT
        self._writable_data = which == PRODUCERS and self.is_allowed
        self._mapped = 0  # bytes of chunks
        self.lock = Lock._over(memory.control(control + which), terms, needs=needs, may_be_biased=True)
        self.lock._words.policy = IGNORE  # whatever stands there
        self.way_in: Lock | Within = self.lock  # or ``inside``, in a block in place
        self.inside = Within(self, None)
        self.lender: Lender
        #: Messages that are taken at once.  Of the machine, as few as an heir may have to count again within its lease (M8).
        self.most_at_once = MOST_MESSAGES if arena.made is None else MOST_OF_MACHINE
        _all.add(self)
        if self.is_allowed or arena.made is None:  # of the machine, who may not has no descriptor of them
            self.map_up_to(geometry.chunk * min(geometry.chunks, KEPT_CHUNKS))

    def check(self) -> None:
        """ContractDenied if the contract does not allow to use this end."""
        if not self.is_allowed:
            self.lock.acquire()

    # -- memory -------------------------------------------------------------------------------------------------------

    def map_up_to(self, end: int) -> None:
        """Have the chunks mapped up to a byte, at least.  SegmentError if there are not so many."""
        if end > self.chunk * self.geometry.chunks:
            raise self.damaged("a message ends behind the last chunk")
        if end > self._mapped:
            mapped = self._mapped or self.chunk
            while mapped < end:
                mapped *= 2
            mapped = min(mapped, self.chunk * self.geometry.chunks)
            self.lender = Lender(lambda: self._map(mapped))
            self.look_again()
            self._mapped = mapped  # last: whatever is raised before, it is done anew

    def _map(self, length: int) -> mmap.mmap:
        return self.memory.map(self.geometry.first + self.geometry.table, length, writable=self._writable_data)

    def look_again(self) -> None:
        """Take the views of the present mapping."""
        self.mapping = self.lender.mapping
        self.data = memoryview(self.mapping)
        self.words = self.data.cast("Q")

    def lend(self, place: int, length: int, *, read_only: bool = False) -> memoryview:
        """Under the lock: a view of the bytes of the message there, until ``take_back``."""
        view = self.lent = self.lender.lend(place + 8, length, read_only=read_only)
        return view

    def take_back(self) -> None:
        """The end of the view.  May be called again when it was interrupted."""
        if self.lent is not None:
            self.lender.end(self.lent)
            if self.words.obj is not self.lender.mapping:
                self.look_again()
            self.lent = None

    def in_child(self) -> None:
        """In a forked child: what its parent was doing is not the child's, neither the view nor the words."""
        view, self.view = self.view, self.arena.words.view[:]
        view.release()
        self.way_in = self.lock
        self.take_back()

    # -- chunks ---------------------------------------------------------------------------------------------------------

    def follow(self, place: int, left: list[range]) -> tuple[int, int]:
        """Place and header of the message that should be at a place, checked; ``left`` gets the chunks before it."""
        chunk, mask = self.chunk, self.mask
        if place >= self._mapped:
            self.map_up_to(place + at.WORD)
        word = self.words[place >> 3]
        if word & LINK:
            index, place = place // chunk, (word & PLACE) << 3
            if place & mask:
                raise self.damaged("a link leads into the middle of a chunk")
            if place >= self._mapped:
                self.map_up_to(place + at.WORD)
            word = self.words[place >> 3]
            left.append(range(index, index + 1))
        length = word & LENGTH
        if (place & mask) + length > self.room or word & LINK:
            if word & LINK or place & mask:
                raise self.damaged("the header of a message was overwritten")
            end = place + length + OVERHEAD + 7 & ~7
            self.map_up_to(end)
            left.append(range(place // chunk, (end - 1) // chunk))
        return place, word

    def check_way(self, left: list[range], known: int, passed: int) -> int:
        """How many chunks were left since ``known`` of them had been.  SegmentError if those, and ``passed``, are too many."""
        more = sum(map(len, left[known:]))
        if passed + more > self.geometry.chunks:
            raise self.damaged("its messages go round in a circle")
        return more

    def give_back(self, left: list[range]) -> None:
        """Under the lock of the consumers, HEAD being behind them: chunks are not in use any more.  Closes INTENT (R6)."""
        mine = [used for chunks in left for used in self._used_of(chunks)]
        count = 0
        for chunks in mine:
            self.table[chunks.start : chunks.stop] = _LEFT_BYTE * len(chunks)
            count += len(chunks)
        if IS_WEAK:
            fence()
        self.view[self._their_intent] = 0
        if crash_points:
            crash_points[0]("C35 chunks LEFT, INTENT closed")
        states = self.states()
        self._free(mine, states)
        if states.count(_LEFT_BYTE) > count:
            self._sweep()

    def states(self) -> bytes:
        """The table; of a long one as far as there are chunks with memory, because to search it all takes so long."""
        states, known = self.table.tobytes(), self._known
        if len(states) <= SHORT_TABLE:
            return states
        if states[known:] != self._nothing:
            known = min(self.geometry.chunks, 2 + 2 * max(map(states.rfind, _WITH_MEMORY)))
            self._known, self._nothing = known, _NO_MEMORY_BYTE * (self.geometry.chunks - known)
        return states[:known]

    def _used_of(self, chunks: range) -> Iterable[range]:
        """Those that are USED: all of them, unless the table was overwritten or a dead consumer has begun to leave them."""
        states = self.table[chunks.start : chunks.stop].tobytes()
        if states == _USED_BYTE * len(chunks):
            return (chunks,)
        return [range(index, index + 1) for index, state in zip(chunks, states, strict=False) if state == USED]

    def _free(self, mine: Sequence[range], states: bytes) -> None:
        """Chunks that are the caller's are not in use any more."""
        geometry = self.geometry
        may_keep = geometry.chunks
        if geometry.is_lazy:
            longest = max(map(len, mine), default=0)  # the next message may be as long as this one was
            may_keep = max(geometry.kept, min(LARGE_KEPT * longest, MOST_KEPT)) - states.count(_FREE_BYTE)
        for chunks in mine:
            kept = min(len(chunks), max(0, may_keep))
            end = chunks.start + kept
            self.table[chunks.start : end] = _FREE_BYTE * kept
            for index in range(end, chunks.stop):
                self._give_memory_back(index)
            may_keep -= kept

    def _sweep(self) -> None:
        """Under the lock of the consumers: free what one of them had left when it died."""
        states = self.table.tobytes()
        index = states.find(LEFT)
        while index >= 0:
            if self.geometry.is_lazy:
                self._give_memory_back(index)  # perhaps for the second time: it may have none, and must not be FREE then
            else:
                self.table[index] = FREE
            index = states.find(LEFT, index + 1)

    def _give_memory_back(self, index: int) -> None:
        self.memory.give_back(self.geometry.first + self.geometry.table + index * self.chunk, self.chunk)
        self.table[index] = NO_MEMORY

    def finish_giving_back(self) -> None:
        """Under the lock of the consumers: give back the chunks that one of them had left when it died (C35)."""
        view = self.view
        intent, after, now = view[self._their_intent], view[self._their_intent + 1], view[self.head]
        left: list[range] = []
        if intent and (now >> COUNT_SHIFT) - (after >> COUNT_SHIFT) & COUNT < COUNT >> 1:  # HEAD has moved
            place = (intent & (1 << MESSAGES_SHIFT) - 1) - 1 << 3
            count = min(intent >> MESSAGES_SHIFT, self.chunk * self.geometry.chunks // at.WORD)
            passed = 0
            for _ in range(count if place >= 0 and count <= self.most_at_once else 0):
                known = len(left)
                place, word = self.follow(place, left)
                passed += self.check_way(left, known, passed)
                place = place + 8 + (word & LENGTH) + 7 & ~7
            if place != (after & PLACE) << 3:
                raise self.damaged("what a dead consumer had begun was overwritten")
        self.give_back(left)

    def is_something_left(self) -> bool:
        """Whether a consumer is giving chunks back, or died while it was."""
        return self.view[self._their_intent] != 0 or LEFT in self.table.tobytes()

    def damaged(self, fact: str) -> SegmentError:
        return self.arena.damaged(f"{self.text}: {fact}")

    # -- what is there ------------------------------------------------------------------------------------------------

    def waiting(self) -> int:
        """How many messages there are."""
        head = self.view[self.head] >> COUNT_SHIFT  # first: the other way round it may have passed the TAIL that was seen
        return (self.view[self.tail] >> COUNT_SHIFT) - head & COUNT

    def is_empty(self) -> bool:
        return self.view[self.head] >> COUNT_SHIFT == self.view[self.tail] >> COUNT_SHIFT

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_until(
        self,
        block: Block,
        condition: Callable[[], bool],
        deadline: float | None,
        is_over: Callable[[], bool] | None = None,
        for_others: Callable[[], bool] | None = None,
        is_stuck: Callable[[], bool] | None = None,
    ) -> bool:
        """Block until the condition holds (True), or until the deadline, or until ``is_over`` (False).

        The condition is made true by others that then call ``wake``.

        for_others  whether there may be something to do for others that wait here; None: they wait for the same condition
        is_stuck    asked at each poll: whether a death may stand in the way, so that the caller had better try (True)
        """
        for _ in range(self.looks if CORES > 1 else 1):
            if condition():
                self._came_soon()
                return True
        self.looks = max(FEWEST_LOOKS, self.looks - 5)
        if deadline is not None and SYSTEM.monotonic() >= deadline:
            return False
        if self._comes_while_they_copy(block, condition):
            return True
        while True:
            waiter = _Waiter(self, block, condition, is_over, for_others or condition, is_stuck)
            try:
                return self.parking.park(waiter, deadline) and not waiter.over
            except _process.Forked:
                continue  # we are a child that was forked meanwhile: it waits as itself

    def _comes_while_they_copy(self, block: Block, condition: Callable[[], bool], length: int = 0) -> bool:
        """Look a while longer, if another process is inside at the other end; False at once if none is.

        length  of the message that they copy, if it is known
        """
        busy, view = self._busy.get(block.index), self.view
        if CORES < 2 or busy is None:
            return False
        if at.process_in(_bias.ordinary(view, busy.start, view[busy.word])) in (0, _process.current.word):
            return False
        end = SYSTEM.monotonic_ns() + (max(LONGEST_COPY, length // SLOWEST_COPY) >> self._doubts)
        while SYSTEM.monotonic_ns() < end:
            if condition():
                self._came_soon()
                return True
        self._doubts = min(MOST_DOUBTS, self._doubts + 1)
        return False

    def _came_soon(self) -> None:
        """While this thread looked: so both ends are at work at the same time, and it is worth it."""
        self.looks = min(MOST_LOOKS, self.looks + 10)
        self._doubts = max(0, self._doubts - 1)

    def wake(self, block: Block, most: int = 1) -> None:
        """Have one that waits at this word look again, or several."""
        _process.to_the_end(lambda: self._wake(block, most))

    def _wake(self, block: Block, most: int) -> None:
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

    def failed(self, block: Block, error: BaseException, process: object) -> BaseException:
        """What to raise when putting or taking was interrupted: whoever it would have woken is woken."""
        if process is not _process.current:
            return RuntimeError(f"{self.text}: this process was forked in the middle of it. It is the parent's; begin anew.")
        is_older = self.way_in is not self.lock or error.__class__ is _Inside
        try:
            if not is_older and self.lock._words.is_mine():  # a signal came at the first step of the way out
                self.lock.__exit__()  # unlike release() it does nothing in a child that was forked since
        finally:
            if self.view[block.word] & at.PARKED:
                self.wake(block)
        return self.damaged("TAIL or HEAD points nowhere") if error.__class__ is IndexError else error


_all: weakref.WeakSet[_End] = weakref.WeakSet()


def _in_child() -> None:
    for end in list(_all):
        end.in_child()


_process.refresh_in_child.append(_in_child)


class _Inside(RuntimeError):
    """The thread had the lock before."""


class Within:
    """The lock of one end, for who waits for it until a deadline at most: TimeoutError.

    RuntimeError for a thread that has it already, which would wait for itself.

    ``until``: the deadline of the whole call, if it is an earlier one.  An attempt is made also when that is over; but none
    more than OVERTIME later, as they would be made for ever where somebody goes on changing the words (M8).
    """

    __slots__ = ("__exit__", "_deadline", "_end", "_until")

    def __init__(self, end: _End, deadline: float | None, until: float | None = None) -> None:
        self._end = end
        self._deadline = deadline
        self._until = deadline if until is None else until
        self.__exit__: Callable[..., None] = end.lock.__exit__

    def __enter__(self) -> None:
        lock, deadline = self._end.lock, self._deadline
        if lock._words.is_mine():
            raise _Inside(f"{self._end.text}: this thread is inside already, and it is not recursive")
        try:
            now = 0.0 if deadline is None else SYSTEM.monotonic()
            is_late = self._until is not None and now > self._until + OVERTIME
            if is_late or not lock.acquire(True, None if deadline is None else max(0.0, deadline - now)):
                raise TimeoutError(f"{self._end.text}: others were busy with it until the time was over")
        except BaseException:
            if lock._words.is_mine():
                lock.__exit__()
            raise


class _Waiter:
    """One thread that waits until a ring is not empty, or not full."""

    precedence = 0

    def __init__(
        self,
        end: _End,
        block: Block,
        condition: Callable[[], bool],
        is_over: Callable[[], bool] | None,
        for_others: Callable[[], bool],
        is_stuck: Callable[[], bool] | None,
    ) -> None:
        self.end = end
        self.block = block
        self.index = block.index
        self.pointer = end.arena.words.pointer(block.word)
        self.condition = condition
        self.is_over = is_over
        self.for_others = for_others
        self.is_stuck = is_stuck
        self.over = False
        self.had_better_try = False
        self.mark = Operand()

    def attempt(self, spot: Spot) -> bool:
        if spot.is_notified() and not self.condition() and self.for_others():
            # It may be enough for one behind us.  Not for one before: it has looked already.
            self.end.parking.unpark_behind(self.index, spot)
        spot.renew()
        self._mark()
        if self._is_shut() and self.is_over is not None and self.is_over():
            self.over = True
        return self.over or self.had_better_try or self.condition()

    def _mark(self) -> None:
        """Always an exchange, so that our S is out before we look."""
        view, place = self.end.view, self.block.word
        for _ in range(1000):  # somebody may overwrite it all the time
            w = view[place]
            if self.mark.compare_exchange(self.pointer, w, w | at.PARKED):
                break

    def _is_shut(self) -> bool:
        return bool((self.end.view[self.end.readable] | self.end.view[self.end.writable]) & SHUT)

    def poll(self, spot: Spot) -> None:
        if self.is_over is not None and not self.condition() and self.is_over():
            self.over = True
        self.had_better_try = self.is_stuck is not None and self.is_stuck()

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        self.pass_on()  # also if it was not chosen: it may have put a chosen spot back to waiting just before

    def pass_on(self) -> None:
        """R7: whoever woke us has cleared the mark, and others may still sleep."""
        self._mark()
        if self.for_others():
            self.end.parking.unpark_one(self.index)


class Producer(_End):
    """The side of a ring on which messages are put, in this process."""

    __slots__ = (
        "_consumers", "_head_seen", "last_length", "last_size", "last_step", "limit", "longest", "look_for_the_dead",
        "place_left", "put", "tail_left",
    )  # fmt: skip

    def __init__(
        self, memory: Memory, control: int, geometry: Geometry, name: str, terms: Terms | None = None, needs: str = "send"
    ) -> None:
        """``needs``: what the contract must allow to put messages here."""
        super().__init__(memory, control, PRODUCERS, geometry, name, terms, needs)
        self.intent = memory.control(control + PRODUCERS).start + at.BLOCK_INTENT
        self._consumers = memory.control(control + CONSUMERS)
        self.longest = geometry.longest
        #: Called when several chunks are waiting and nobody has taken any of their messages since the last one was begun.
        self.look_for_the_dead: Callable[[], None] | None = None
        self._head_seen = -1
        #: What TAIL was after some put() of this object, its place in bytes, and up to where messages may begin there, less
        #: their length: of use only while TAIL is that.  The length of one message, its bytes in all, how far TAIL moves by it.
        self.tail_left = self.last_length = -1
        self.place_left = self.limit = self.last_size = self.last_step = 0
        self.put = make_put(self) if self._may_go_by_door else self.put_anyhow

    # -- putting ------------------------------------------------------------------------------------------------------

    def put_anyhow(self, body: Any, tag: int = 0, lock: Lock | Within | None = None) -> bool:
        """Put one message there, without waiting for room; whether there was any.

        body  an object with ``len`` in bytes that a memoryview of bytes can be assigned from
        lock  its own, or Within
        """
        length = len(body)
        view, process = self.view, _process.current
        try:
            with lock or self.way_in:
                tail = view[self.tail]
                word = tail & PLACE
                place = word << 3
                if (place & self.mask) + length > self.room or place >= self._mapped or self.most_messages != COUNT:
                    place = self._find_place(tail, length)
                    if place < 0:
                        return False
                    word = place >> 3
                    tail = tail & HIGH | word
                start = place + 8
                self.mapping[start : start + length] = body
                self.words[word] = length | tag << TAG_SHIFT if tag else length
                if crash_points:
                    crash_points[0]("C30 bytes written")
                if IS_WEAK:
                    fence()
                view[self.tail] = after = tail + (length + STEP >> 3) & WORD_MASK  # R1
                if length <= self.room and self.most_messages == COUNT and after >> COUNT_SHIFT < COUNT - self.chunk:
                    self.limit, self.place_left = (place & ~self.mask) + self.room, start + length + 7 & ~7
                    self.tail_left = after
                if crash_points:
                    crash_points[0]("C31 TAIL stored")
            if IS_WEAK:
                fence()  # R7
            if view[self.readable] & ATTENTION:
                self.tell()
        except BaseException as error:
            raise self.failed(self.readable_block, error, process) from None
        return True

    def put_parts(self, parts: list[Part], length: int, tag: int, lock: Lock | Within | None = None) -> bool:
        """Put one message there that is given in parts, as ``put``."""
        view, process = self.view, _process.current
        try:
            with lock or self.way_in:
                place = self._find_place(view[self.tail], length)
                if place < 0:
                    return False
                for offset, part in parts:
                    self.data[place + 8 + offset : place + 8 + offset + len(part)] = part
                self.finish(view, place, length, tag)
            self.tell()
        except BaseException as error:
            raise self.failed(self.readable_block, error, process) from None
        return True

    def put_many(self, bodies: list[Any], tags: Iterable[int], first: int, lock: Lock | Within | None = None) -> int:
        """Put messages there from the one of that index on, without waiting for room; how many there was room for.

        ValueError if one of them never fits, and then none was put.  OSError if there is no memory for the first of them.
        """
        self.check()
        lengths = list(map(len, bodies))
        if not first and bodies and (longest := max(lengths)) > self.longest:
            raise self.too_long(longest)
        tags = list(tags)
        step = 0  # from one message to the next, of many that are to be written in one piece
        if len(tags) > 1 and len(set(lengths)) == 1 and len(set(tags)) == 1 and lengths[0] <= min(MOST_JOINED, self.room):
            step = lengths[0] + 15 & ~7
            header = (lengths[0] | tags[0] << TAG_SHIFT).to_bytes(8, "little")
            between = bytes(step - 8 - lengths[0]) + header
        view, words, mapping, mask, room, mapped = self.view, self.words, self.mapping, self.mask, self.room, self._mapped
        process, has_limit = _process.current, self.most_messages != COUNT
        done = 0
        try:
            with lock or self.way_in:
                tail = view[self.tail]
                place, count = (tail & PLACE) << 3, tail >> COUNT_SHIFT
                while first + done < len(bodies):
                    index = first + done
                    length = lengths[index]
                    if (place & mask) + length > room or place >= mapped or has_limit:
                        if IS_WEAK:
                            fence()
                        view[self.tail] = (count + done & COUNT) << COUNT_SHIFT | place >> 3
                        try:
                            place = self._find_place(view[self.tail], length)
                        except OSError:
                            if not done:
                                raise
                            break  # who puts the rest is told
                        if place < 0:
                            break
                        words, mapping, mapped = self.words, self.mapping, self._mapped
                    if step and not has_limit:
                        run = bodies[index : index + (self.chunk - at.WORD - (place & mask)) // step]
                        written = header + between.join(run)
                        mapping[place : place + len(written)] = written
                        place += step * len(run)
                        done += len(run)
                    else:
                        end = place + 8 + length
                        mapping[place + 8 : end] = bodies[index]
                        words[place >> 3] = length | tags[done] << TAG_SHIFT
                        place = end + 7 & ~7
                        done += 1
                else:
                    if crash_points:
                        crash_points[0]("C30 bytes written")
                    if IS_WEAK:
                        fence()
                    view[self.tail] = (count + done & COUNT) << COUNT_SHIFT | place >> 3
                if crash_points:
                    crash_points[0]("C31 TAIL stored")
            if done:
                self.tell(done)
        except BaseException as error:
            raise self.failed(self.readable_block, error, process) from None
        return done

    def wait_for_room(self, length: int, deadline: float | None, is_over: Callable[[], bool] | None = None) -> bool:
        """Block until there may be room for a message."""
        return self.wait_until(
            self.writable_block,
            lambda: self.has_room(length),
            deadline,
            is_over,
            for_others=lambda: self.has_room(0),
            is_stuck=self._is_stuck,
        )

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
        if self._are_chunks_taken_in_vain():
            return True  # whoever takes the next chunks gives these back first
        run = -(-(length + OVERHEAD) // self.chunk)
        states = self.states()
        return not self._are_too_many_used(states, run) and self._run_without_memory(states, run) >= 0

    def _are_chunks_taken_in_vain(self) -> bool:
        """Whether there are chunks of a message that was not sent: not yet, or never (C32; a reservation that was given up)."""
        intent, place = self.view[self.intent], (self.view[self.tail] & PLACE) << 3
        first, run = intent >> COUNT_SHIFT, intent & PLACE
        return bool(intent and not first * self.chunk <= place < (first + run) * self.chunk)

    def _is_stuck(self) -> bool:
        """Whether chunks may be kept by the dead: of a message that was never sent, or of some that were taken."""
        return self._are_chunks_taken_in_vain() or self.is_something_left()

    def too_long(self, length: int) -> ValueError:
        return ValueError(f"{self.text}: a message of {length} bytes; the longest that fits has {self.longest}")

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _find_place(self, tail: int, length: int) -> int:
        """Where the next message goes, under the lock; -1 if there is no room.  ValueError if there never will be."""
        if length > self.longest:
            raise self.too_long(length)
        if self.most_messages != COUNT and self.waiting() >= self.most_messages:  # there is no memory for COUNT of them
            return -1
        view, chunk, place = self.view, self.chunk, (tail & PLACE) << 3
        if place >= self._mapped:
            self.map_up_to(place + at.WORD)
        if (place & self.mask) + length <= self.room:
            return place
        intent = view[self.intent]
        if not 0 <= place // chunk - (intent >> COUNT_SHIFT) < intent & PLACE:
            self._undo_intent()
        run = (length + OVERHEAD + self.mask) // chunk
        states = self.table.tobytes() if self._is_short else self.states()
        used = states.count(_USED_BYTE)
        if used > run and self.look_for_the_dead is not None:
            head = view[self.head]
            if head == self._head_seen:
                self.look_for_the_dead()
            self._head_seen = head
        first = -1
        if used + run <= self._most:
            first = states.find(_FREE_BYTE * run) if run > 1 else self._run_with_memory(states, 1)
        has_memory = first >= 0  # and keeps it: what is FREE stays so until a producer takes it
        if first < 0:
            first = self._find_run(run)
            if first < 0 and self._finish_for_the_dead():
                first = self._find_run(run)
            if first < 0:
                return -1
        end = first + run
        view[self.intent] = first << COUNT_SHIFT | run
        if has_memory or _NO_MEMORY_BYTE not in self.table[first:end].tobytes():
            self.table[first:end] = _USED_BYTE * run
        else:
            for index in range(first, end):
                if self.table[index] == NO_MEMORY:
                    self.memory.reserve(self.geometry.first + self.geometry.table + index * chunk, chunk)  # R5
                self.table[index] = USED
        if end * chunk > self._mapped:
            self.map_up_to(end * chunk)
        first *= chunk
        self.words[place >> 3] = LINK | first >> 3  # R3
        if crash_points:
            crash_points[0]("C32 chunks taken, link written")
        return first

    def _find_run(self, run: int) -> int:
        """The first of so many chunks in a row that are not in use; -1 if there are none, or too many are in use."""
        states = self.states()
        if self._are_too_many_used(states, run):
            return -1
        with_memory = self._run_with_memory(states, run)
        if with_memory < 0 and self.geometry.is_lazy and states.count(_USED_BYTE) + run > self.geometry.kept:
            # There is memory that is about to be free, still in the caches, sooner than new memory would be there.
            self._comes_while_they_copy(self.writable_block, lambda: _FREE_BYTE * run in self.states(), run * self.chunk)
            states = self.states()
            with_memory = self._run_with_memory(states, run)
        return with_memory if with_memory >= 0 else self._run_without_memory(states, run)

    def _run_with_memory(self, states: bytes, run: int) -> int:
        """The first of so many free chunks in a row, or -1; of single ones the next one, see ROTATION."""
        if run == 1:
            after = ((self.view[self.tail] & PLACE) << 3) // self.chunk + 1
            found = states.find(_FREE_BYTE, after, max(after, ROTATION // self.chunk))
            if found >= 0:
                return found
        return states.find(_FREE_BYTE * run)

    def _are_too_many_used(self, states: bytes, run: int) -> bool:
        """Whether others have to be taken before so many more may be used."""
        return states.count(_USED_BYTE) + run > self.geometry.most_beside(run) and not self.is_empty()

    def _run_without_memory(self, states: bytes, run: int) -> int:
        """The first of so many chunks in a row that are not in use, though some of them may have no memory; or -1."""
        first = (states.replace(_FREE_BYTE, _NO_MEMORY_BYTE) + _NO_MEMORY_BYTE * run).find(_NO_MEMORY_BYTE * run)
        return first if first + run <= self.geometry.chunks else -1

    def _undo_intent(self) -> None:
        """Give back, under the lock, what was taken for a message that was never sent (C32), if there is any."""
        intent = self.view[self.intent]
        first, run = intent >> COUNT_SHIFT, intent & PLACE
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

    def _finish_for_the_dead(self) -> bool:
        """Finish what a dead consumer has begun (C35), if no living one is at it."""
        if not self.is_something_left():
            return False
        words = owned_words(self._consumers, [self._consumers.word])
        if words.is_mine():
            return False  # this thread is there already, and we are its signal handler
        try:
            if not words.acquire(False, None, repair=True):
                return False
            self.finish_giving_back()
        finally:
            if words.is_mine():
                words.release(leaving=True)
        return True

    # -- in place -----------------------------------------------------------------------------------------------------

    def begin(self, view: memoryview, length: int) -> tuple[int, int, memoryview] | None:
        """Under the lock: TAIL, the place of the next message, and a view of its bytes; None if there is no room.

        view  the words, looked up before whatever may have forked a child: there it is released, and this ends with ValueError
        """
        tail = view[self.tail]
        place = self._find_place(tail, length)
        return None if place < 0 else (tail, place, self.lend(place, length))

    def finish(self, view: memoryview, place: int, length: int, tag: int = 0) -> None:
        """Under the lock: send the message whose bytes are in place.  It may be shorter than ``begin`` was told.

        view  as for ``begin``
        """
        chunk, intent, tail = self.chunk, view[self.intent], view[self.tail]
        self.words[place >> 3] = length | tag << TAG_SHIFT
        first, run = intent >> COUNT_SHIFT, intent & PLACE
        needed = -(-(length + OVERHEAD) // chunk)
        if needed < run and first * chunk == place:
            self._free([range(first + needed, min(first + run, self.geometry.chunks))], self.states())  # INTENT names them
        if crash_points:
            crash_points[0]("C30 bytes written")
        if IS_WEAK:
            fence()
        view[self.tail] = tail + ONE & HIGH | place + 8 + length + 7 >> 3  # R1
        if crash_points:
            crash_points[0]("C31 TAIL stored")

    def tell(self, count: int = 1) -> None:
        """Without the lock: wake who waits for so many messages.  BrokenPipeError if nobody will take them.

        Who has taken them and closed its end since they were there, has them: that is no error.
        """
        if IS_WEAK:
            fence()  # R7
        w = self.view[self.readable]
        if w & at.PARKED:
            self.wake(self.readable_block, count)
        if w & SHUT and not self.is_empty():
            raise BrokenPipeError(errno.EPIPE, f"{self.text}: the other end is closed")


_kept = 128 << 10  # bytes: what malloc of glibc keeps of itself


def _keep_memory_for(size: int) -> None:
    """Have malloc keep the memory of a batch of messages when they are dropped, instead of returning it to the kernel.

    Else the next batch has a page fault for each of its pages, and these take several times as long as the copying.  glibc
    learns from a large block that is freed to keep twice as much from then on, in any program that ever drops one.
    """
    global _kept
    _kept = size if size < LARGEST_KEPT_BATCH else at.WORD_MASK  # then there is no more to learn
    with contextlib.suppress(MemoryError):
        bytes(min(size, LARGEST_KEPT_BATCH))  # of pages of its own, none of which is touched


class Consumer(_End):
    """The side of a ring on which messages are taken, in this process."""

    __slots__ = (
        "_left", "_tail_seen", "ahead", "ahead_index", "ahead_step", "ahead_tag", "get", "head_left",
        "last_length", "piling",
    )  # fmt: skip

    def __init__(self, memory: Memory, control: int, geometry: Geometry, name: str, terms: Terms | None = None) -> None:
        super().__init__(memory, control, CONSUMERS, geometry, name, terms, "receive")
        #: What HEAD was after some get() of this object, and TAIL at some time before.  While HEAD is that one, there
        #: are messages up to that TAIL.  Not to look at TAIL leaves it, and the lock beside it, in the producers' cache.
        self.head_left = self._tail_seen = -1
        self.last_length = 0  # of what was taken last, if not by the door
        self.piling = Piling(self)
        #: Bodies of the messages that follow HEAD while it is that one, the first one last: they are alike, and were copied
        #: together (``_look_ahead``).  Index of the next; how far HEAD moves by each; their tag.
        self.ahead: list[Any] = []
        self.ahead_index = -1
        self.ahead_step = self.ahead_tag = 0
        self.intent = memory.control(control + CONSUMERS).start + at.BLOCK_INTENT
        self.get = make_get(self) if self._may_go_by_door else self.get_anyhow

    # -- taking -------------------------------------------------------------------------------------------------------

    def get_anyhow(self, lock: Lock | Within | None = None) -> tuple[int, bytes | bytearray] | None:
        """Take the next message: its tag and its bytes; None if there is none.  Waits for nothing but other consumers."""
        view, process = self.view, _process.current
        left: list[range] | None = None
        try:
            with lock or self.way_in:
                head = view[self.head]
                is_alone = head == self.head_left
                if head == self._tail_seen or not is_alone:
                    self._tail_seen = view[self.tail]
                    if self._tail_seen == head:
                        return None
                    if IS_WEAK:
                        fence()
                place = (head & PLACE) << 3
                word = self.words[place >> 3] if place < self._mapped else LINK
                tag, length = word >> TAG_SHIFT, word & LENGTH
                if tag > TAG or (place & self.mask) + length > self.room:
                    left = []
                    place, word = self.follow(place, left)
                    tag, length = word >> TAG_SHIFT & TAG, word & LENGTH
                start = place + 8
                end = start + length
                self.last_length, self.ahead_index = length, -1
                kept = -1
                body: bytes | bytearray
                if tag >= TO_BE_WRITTEN:
                    body = bytearray(self.data[start:end])
                elif is_alone and left is None and length <= MOST_JOINED and self._goes_on_by_door():
                    body, kept = self._look_ahead(head, word)
                else:
                    body = self.mapping[start:end]  # a copy, at half the price of one of a memoryview
                if crash_points:
                    crash_points[0]("C33 bytes read")
                if left is None:
                    view[self.head] = self.head_left = head + (length + STEP >> 3) & WORD_MASK  # R2
                    self.ahead_index = kept  # no call since HEAD was stored
                else:
                    self._step(view, head, head + ONE & HIGH | end + 7 >> 3, left)
                if crash_points:
                    crash_points[0]("C34 HEAD stored")
            if IS_WEAK:
                fence()  # R7
            if view[self.writable] & at.PARKED and (left or self.most_messages != COUNT or self.is_empty()):
                self.wake(self.writable_block)
        except BaseException as error:
            raise self.failed(self.writable_block, error, process) from None
        return tag, body

    def _goes_on_by_door(self) -> bool:
        """Under the lock: whether ``get`` is that of ``_ring_door``, and may get in that way next time."""
        return self._may_go_by_door and bool(self.lock._words.inside.cell_contents)

    def _look_ahead(self, head: int, word: int) -> tuple[bytes, int]:
        """Under the lock: the next message, whose header this is; and ``ahead_index`` for when HEAD has been moved past it.

        Those that follow, and are like it, are kept for the next ``get``.
        """
        place, length, step = (head & PLACE) << 3, word & LENGTH, (word & LENGTH) + STEP >> 3
        many = (self._tail_seen >> COUNT_SHIFT) - (head >> COUNT_SHIFT) & COUNT
        if many < FEWEST_AHEAD or head + MOST_EQUALS * step > WORD_MASK:
            return self.mapping[place + 8 : place + 8 + length], -1
        size = step - ONE << 3
        _, run = self._equals(place, word, size, min(many, MOST_BYTES_AHEAD // size))
        bodies = [body for (body,) in run]
        bodies.reverse()
        body: bytes = bodies.pop()
        kept = len(bodies) - 1
        self.ahead, self.ahead_step, self.ahead_tag = bodies, step, word >> TAG_SHIFT
        return body, kept

    def get_many(self, most: int, lock: Lock | Within | None = None) -> list[tuple[int, bytes | bytearray]]:
        """Take all messages that are there, up to so many, at once: none of them is gone if we die meanwhile."""
        view, process = self.view, _process.current
        found: list[tuple[int, bytes | bytearray]] = []
        append = found.append
        left: list[range] = []
        try:
            with lock or self.way_in:
                head = view[self.head]
                count = min((view[self.tail] >> COUNT_SHIFT) - (head >> COUNT_SHIFT) & COUNT, most, self.most_at_once)
                if not count:
                    return found
                if IS_WEAK:
                    fence()
                place = (head & PLACE) << 3
                words, mapping, mask, room, mapped = self.words, self.mapping, self.mask, self.room, self._mapped
                passed = 0
                while len(found) < count:
                    word = words[place >> 3] if place < mapped else LINK
                    tag, length = word >> TAG_SHIFT, word & LENGTH
                    if tag > TAG or (place & mask) + length > room:
                        known = len(left)
                        place, word = self.follow(place, left)
                        passed += self.check_way(left, known, passed)
                        words, mapping, mapped = self.words, self.mapping, self._mapped
                        tag, length = word >> TAG_SHIFT & TAG, word & LENGTH
                    end = place + 8 + length
                    after = end + 7 & ~7
                    if length <= room and tag < TO_BE_WRITTEN and words[after >> 3] == word:
                        place, run = self._equals(place, word, after - place, count - len(found))
                        found += [(tag, body) for (body,) in run]
                    else:
                        body = mapping[place + 8 : end]
                        append((tag, body if tag < TO_BE_WRITTEN else bytearray(body)))
                        place = after
                if crash_points:
                    crash_points[0]("C33 bytes read")
                self._step(view, head, (head >> COUNT_SHIFT) + count << COUNT_SHIFT & at.WORD_MASK | place >> 3, left)
                if crash_points:
                    crash_points[0]("C34 HEAD stored")
            if IS_WEAK:
                fence()  # R7
            if view[self.writable] & at.PARKED and (left or self.most_messages != COUNT or self.is_empty()):
                self.wake(self.writable_block, count)
        except BaseException as error:
            raise self.failed(self.writable_block, error, process) from None
        self.last_length = len(found[-1][1])
        if (size := count * len(found[0][1])) > _kept:
            _keep_memory_for(size)
        return found

    def _equals(self, place: int, word: int, step: int, most: int) -> tuple[int, Iterable[tuple[bytes]]]:
        """The messages in a row, from a place on, that have the same header as the first one; and the place behind them.

        They lie in one chunk, ``step`` bytes from one to the next, and are all taken by one call.  ``word`` is the first header
        as it was checked: it may be another one by now.
        """
        words, first = self.words, place >> 3
        fitting = min(most, MOST_EQUALS, (self.chunk - at.WORD - (place & self.mask)) // step)
        headers = [word, *words[first : first + fitting * (step >> 3) : step >> 3].tolist()[1:]]
        count = headers.count(word)
        if count < fitting:
            count = next(index for index, header in enumerate(headers) if header != word)
        length, end = word & LENGTH, place + count * step
        return end, struct.iter_unpack(f"=8x{length}s{step - 8 - length}x", self.data[place:end])

    def wake_consumers(self) -> None:
        """Have one that waits for a message look again."""
        if self.view[self.readable] & at.PARKED:
            self.wake(self.readable_block)

    def wait_for_message(self, deadline: float | None, is_over: Callable[[], bool] | None = None) -> bool:
        """Block until there may be a message."""
        has_come = self.wait_until(self.readable_block, lambda: not self.is_empty(), deadline, is_over)
        if has_come:
            self.piling.after_waiting(self.last_length, deadline, self.pass_on)
        return has_come

    def pass_on(self) -> None:
        """After waiting for a message: wake the next one if there are more."""
        if self.view[self.readable] & at.PARKED and not self.is_empty():
            self.wake(self.readable_block)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _step(self, view: memoryview, before: int, after: int, left: list[range]) -> None:
        """Move HEAD, and give back the chunks that are left."""
        if not left:
            view[self.head] = after  # R2
            return
        if view[self.intent]:
            self.finish_giving_back()
        count = (after >> COUNT_SHIFT) - (before >> COUNT_SHIFT) & COUNT
        view[self.intent + 1] = after
        view[self.intent] = count << MESSAGES_SHIFT | (before & PLACE) + 1
        if IS_WEAK:
            fence()  # what was read, before anybody may write there
        view[self.head] = after  # R2
        if crash_points:
            crash_points[0]("C35 HEAD stored, chunks USED")
        self.give_back(left)

    # -- in place -----------------------------------------------------------------------------------------------------

    def begin(self, view: memoryview) -> tuple[int, int, int, memoryview] | None:
        """Under the lock: HEAD, HEAD behind the next message, its tag, and a view of its bytes; None if there is none."""
        head = view[self.head]
        if view[self.tail] == head:
            return None
        if IS_WEAK:
            fence()
        self._left: list[range] = []
        place, word = self.follow((head & PLACE) << 3, self._left)
        length = self.last_length = word & LENGTH
        after = head + ONE & HIGH | place + 8 + length + 7 >> 3
        return head, after, word >> TAG_SHIFT & TAG, self.lend(place, length, read_only=True)

    def finish(self, view: memoryview, after: int) -> None:
        """Under the lock: the message that ``begin`` gave is taken.  ``view``: as for Producer.finish."""
        if crash_points:
            crash_points[0]("C33 bytes read")
        self._step(view, view[self.head], after, self._left)
        if crash_points:
            crash_points[0]("C34 HEAD stored")

    def tell(self) -> None:
        """Without the lock, after ``finish``: wake who waits for room."""
        if IS_WEAK:
            fence()  # R7
        if self.view[self.writable] & at.PARKED:
            self.wake(self.writable_block)
