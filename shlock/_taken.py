"""Items that were taken from a queue and are not acknowledged yet: kept whole until they are.

Whoever takes an item copies it into a *slot* first, a control block with a lock of its own and some pages of memory, and then
moves HEAD of the ring past it.  The item is in the slot until it is acknowledged.  The slot's lock says who works on it: when
that process dies, or leaves with an exception, the item is there for the next one.

    STATE of a slot   FILLED | tag << 8 | deliveries << 16 | acknowledged << 32: how many items were, modulo 2**32
    AFTER             HEAD of the ring behind this item
    LENGTH            bytes of the item, as long as it is there or its memory was not given back
    TAKING            of the ring's consumers: number of the slot that is being filled, plus one; 0: none
    RETURNED          of the queue, a hint: there may be an item in a slot that nobody holds
    KEPT              of the queue: 0 if no slot is filled, and so none of it has to be looked at

    # slot      lock    entered by                       leaves to
    # EMPTY     free    acknowledge, get                 FILLING
    # FILLING   held    a consumer                       HELD (HEAD moves past it), EMPTY (its death or exception before)
    # HELD      held    HEAD moves, or taken once more   EMPTY (acknowledge), RETURNED (exception, death of the holder)
    # RETURNED  free    exception, death                 HELD, EMPTY (with a get, or as a dead letter)

    # T1  an item is in the ring or in a slot, never in both: which of the two, HEAD says, in one step; until TAKING is
    #     cleared, a FILLED slot counts only if HEAD is AFTER it
    # T2  deliveries counts up before the item is handed out, so that it is never too low
    # T3  who finds TAKING set after a death decides before anybody moves HEAD: the heir of the consumers' lock does
    # T4  an item is gone and is counted as done in one step; a get empties the slot and leaves the counting to task_done
    # T5  KEPT is set before a slot is filled, and cleared when none is, both under the consumers' lock
    # T6  the consumers' lock is waited for with a slot in hand only to learn what TAKING means; slots are never waited for

    killed after                words say                     repaired by                        outcome
    C40 TAKING set              slot empty, HEAD unchanged    heir of the consumers' lock        the message is in the ring
    C41 slot filled             HEAD unchanged                heir of the consumers' lock        the slot is empty again
    C42 HEAD moved              TAKING set, slot filled       heir of the consumers' lock        returned, once
    C43 TAKING cleared          slot filled, its owner dead   who looks for the dead, in 10 ms   returned
    C44 taken once more         deliveries counted up         the same                           returned
    C45 slot emptied            done, lock held               who looks for the dead             gone, with its memory
    C46 put among the letters   slot filled                   who looks for the dead             a dead letter twice
    C47 given back              slot filled, lock free        the same                           returned

Whoever waits for an item looks for the dead at each poll; who takes or gets without waiting does so before it looks for an
item, if KEPT is set and it has not looked for the length of a poll interval.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from typing import Final

from . import _layout as at
from . import _process
from ._atomic import fence
from ._geometry import COUNT, COUNT_SHIFT, SLOTS
from ._memory import Memory
from ._parking import POLL_INTERVAL
from ._ring import Consumer, Producer, Within
from ._sys import SYSTEM, crash_points
from .contract import Terms
from .synchronize import Lock

__all__ = ["MOST_DELIVERIES", "SLOTS", "Grip", "Slot", "Slots", "within"]

FILLED: Final = 1
TAG_SHIFT, DELIVERIES_SHIFT, ACKNOWLEDGED_SHIFT = 8, 16, 32
TAG: Final = 0xFF
MOST_DELIVERIES: Final = 0xFFFF  # that are counted
ACKNOWLEDGED: Final = COUNT << ACKNOWLEDGED_SHIFT
KEPT_BYTES: Final = 1 << 16  # of memory that a slot keeps when it is empty
#: Seconds for which a call that waits for no item and no room waits for somebody who is in the middle of putting or getting.
COURTESY: Final = 1.0


def within(end: Consumer | Producer, deadline: float | None) -> Within | None:
    """The lock of one end of a ring, for a call with a deadline: TimeoutError; None: as long as it takes."""
    return None if deadline is None else Within(end, max(deadline, SYSTEM.monotonic() + COURTESY), deadline)


class Grip:
    """A thread's hold of a slot, or its attempt: named before its lock is taken, so that an interruption finds it."""

    __slots__ = ("is_of_other_thread", "slot")

    def __init__(self) -> None:
        self.slot: Slot | None = None
        self.is_of_other_thread = False  # of this process, which took it and left it to us to release


class Slot:
    """One slot, as this process uses it."""

    def __init__(self, slots: Slots, index: int) -> None:
        memory = slots.memory
        block = memory.control(slots.first_control + index)
        self.slots = slots
        self.index = index
        self.lock = Lock._over(block, slots.terms, needs="receive")
        self.view = memory.arena.words.view
        self.word = block.word
        self.state = block.start + at.BLOCK_STATE
        self.after = block.start + at.BLOCK_PLACE
        self.length = block.start + at.BLOCK_LENGTH
        self.first = slots.first_byte + index * slots.stride
        self._reserved = 0  # bytes that have their memory, as far as this object knows
        self._beginning: mmap.mmap | None = None  # KEPT_BYTES of it, mapped

    @property
    def tag(self) -> int:
        return self.view[self.state] >> TAG_SHIFT & TAG

    @property
    def deliveries(self) -> int:
        """How often the item was handed out."""
        return self.view[self.state] >> DELIVERIES_SHIFT & MOST_DELIVERIES

    def is_filled(self) -> bool:
        return bool(self.view[self.state] & FILLED)

    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self.lock._words.is_mine()

    def is_of_this_process(self) -> bool:
        return self.view[self.word] & at.OWNER == _process.current.word

    def _map(self, length: int) -> mmap.mmap:
        kept = min(KEPT_BYTES, self.slots.stride)
        if length > kept:
            return self.slots.memory.map(self.first, at.pages(length))
        if self._beginning is None:
            self._beginning = self.slots.memory.map(self.first, kept)
        return self._beginning

    def _reserve(self, length: int) -> None:
        self.slots.memory.reserve(self.first, at.pages(max(1, length)))
        self._reserved = length

    def read(self) -> bytearray | bytes:
        """A copy of the item's bytes, under the lock."""
        length = self.view[self.length]
        if length > self.slots.stride:
            raise self.slots.consumer.damaged("a taken item is longer than there is room for")
        if length > self._reserved:
            self._reserve(length)  # it has its memory, unless LENGTH was overwritten: an OSError then, and no SIGBUS
        mapping = self._map(length)
        if self.tag < 3:
            return mapping[:length]
        with memoryview(mapping) as view:
            return bytearray(view[:length])

    def write(self, content: memoryview) -> None:
        """Under its lock and that of the consumers: the bytes of the item that is being taken.  OSError without memory."""
        length = len(content)
        self.give_memory_back()  # of an item that somebody acknowledged who died then
        self._reserve(length)
        self._map(length)[:length] = content
        self.view[self.length] = length

    def acknowledge(self) -> None:
        """The item is done; under the lock."""
        self._empty(1)

    def empty(self) -> None:
        """The item is somebody's who got it; under the lock."""
        self._empty(0)

    def _empty(self, done: int) -> None:
        self.view[self.state] = self.view[self.state] + (done << ACKNOWLEDGED_SHIFT) & ACKNOWLEDGED  # T4
        if crash_points:
            crash_points[0]("C45 slot emptied")
        self.give_memory_back()

    def give_memory_back(self) -> None:
        """Let go of what the last item had; under the lock, when it is empty."""
        length = self.view[self.length]
        if length:
            if KEPT_BYTES < length <= self.slots.stride:
                self._reserved = 0
                self.slots.memory.give_back(self.first + KEPT_BYTES, at.pages(length) - KEPT_BYTES)
            self.view[self.length] = 0


class Slots:
    """All slots of one queue, as this process uses them."""

    def __init__(
        self,
        memory: Memory,
        first_control: int,
        first_byte: int,
        stride: int,
        consumer: Consumer,
        letters: Producer,
        terms: Terms | None,
        done: int,
        count: int = SLOTS,
    ) -> None:
        """``stride``: bytes of data for each of ``count``; ``letters``: where items go that were delivered too often; ``done``:
        control block that counts the items which were got and are done."""
        self.memory = memory
        self.first_control = first_control
        self.first_byte = first_byte
        self.stride = stride
        self.count = count
        self.consumer = consumer
        self.letters = letters
        self.terms = terms
        self.most_deliveries = 0  # 0: no limit
        self.view = memory.arena.words.view
        self.returned = memory.control(0).start + at.BLOCK_RETURNED
        self.kept = self.returned + 1
        self.taking = consumer.intent + 2
        self.free_block = memory.control(first_control + count)
        self.done_block = memory.control(done)
        self._slots: dict[int, Slot] = {}
        self._latest = 0
        self._next_look = 0.0
        layout = memory.arena.layout
        begin, end = layout.block(first_control), layout.block(first_control + count)
        self._state, self._word, self._after = (
            slice(begin + place, end, at.BLOCK_WORDS) for place in (at.BLOCK_STATE, at.BLOCK_WORD, at.BLOCK_PLACE)
        )
        consumer.lock._words.on_heir = self.decide = _decision(self)

    def slot(self, index: int) -> Slot:
        slot = self._slots.get(index)
        if slot is None:
            slot = self._slots.setdefault(index, Slot(self, index))
        return slot

    # -- taking -------------------------------------------------------------------------------------------------------

    def take_new(self, grip: Grip, deadline: float | None) -> bool:
        """Take hold of the next item of the ring, in a slot; whether there was an item, and a slot.  TimeoutError.

        Whatever is raised, ``let_go`` puts things right.
        """
        consumer, process = self.consumer, _process.current
        if consumer.is_empty():
            return False
        self.slot(self._latest)  # a contract for it, if need be, before others have to wait for us
        try:
            with within(consumer, deadline) or consumer.lock:
                if consumer.is_empty() or not self._lock_free_slot(grip):
                    return False
                assert grip.slot is not None
                self._fill(grip.slot)
        except BaseException as error:
            raise consumer.failed(consumer.writable_block, error, process) from None
        consumer.tell()
        return True

    def _fill(self, slot: Slot) -> None:
        consumer, process = self.consumer, _process.current
        view = consumer.view  # useless in a child that is forked meanwhile
        try:
            got = consumer.begin(view)
            if got is None:
                raise consumer.damaged("TAIL was moved while nobody put anything")
            _, after, tag, content = got
            view[self.kept] = 1  # T5
            view[self.taking] = slot.index + 1
            if crash_points:
                crash_points[0]("C40 TAKING set")
            slot.write(content)
            _process.to_the_end(consumer.take_back)
            view[slot.after] = after
            view[slot.state] = view[slot.state] & ACKNOWLEDGED | FILLED | tag << TAG_SHIFT | 1 << DELIVERIES_SHIFT  # T2
            if crash_points:
                crash_points[0]("C41 slot filled")
            consumer.finish(view, after)  # T1
            if crash_points:
                crash_points[0]("C42 HEAD moved")
            view[self.taking] = 0
        except BaseException:
            if process is _process.current:
                _process.to_the_end(consumer.take_back)
                _process.to_the_end(self.decide)
            raise
        if crash_points:
            crash_points[0]("C43 TAKING cleared")

    def _lock_free_slot(self, grip: Grip) -> bool:
        """Take hold of an empty slot, under the consumers' lock: the latest one if possible."""
        for also_of_the_dead in (False, True):
            for step in range(self.count):
                index = (self._latest + step) % self.count
                if not self._is_free(index, also_of_the_dead):
                    continue
                slot = self.slot(index)
                if self._lock(slot, grip):
                    if not slot.is_filled():
                        self._latest = index
                        return True
                    self.let_go(grip)
        return False

    def _is_free(self, index: int, also_of_the_dead: bool) -> bool:
        start, view = self._state.start + index * at.BLOCK_WORDS, self.view
        if view[start] & FILLED:
            return False
        owner = view[start - at.BLOCK_STATE + at.BLOCK_WORD] & at.OWNER
        return not owner or (also_of_the_dead and not _process.is_alive(owner))

    def any_free(self) -> bool:
        """Whether a slot is empty, and nobody alive has it."""
        return any(self._is_free(index, True) for index in range(self.count))

    def _lock(self, slot: Slot, grip: Grip) -> bool:
        """Take hold of a slot if nobody has it."""
        if slot.is_mine():
            return False
        grip.slot = slot
        if slot.lock.acquire(False):
            return True
        grip.slot = None
        return False

    # -- returned items -----------------------------------------------------------------------------------------------

    def take_returned(self, grip: Grip, deadline: float | None) -> bool:
        """Take hold of an item that came back, the oldest first; False if there is none.  TimeoutError.

        Whatever is raised, ``let_go`` puts things right.
        """
        view = self.view
        if not view[self.returned]:
            return False
        try:
            # An exchange: the hint is gone before we look, so that who returns something now sets it again.
            self.memory.arena.words.compare_exchange(self.returned, view[self.returned], 0)
            for index in self._candidates():
                slot = self.slot(index)
                if not self._lock(slot, grip):
                    continue
                if self._is_returned(slot, deadline):
                    view[self.returned] = 1  # there may be more
                    if slot.deliveries < MOST_DELIVERIES:
                        view[slot.state] += 1 << DELIVERIES_SHIFT  # T2
                    if crash_points:
                        crash_points[0]("C44 taken once more")
                    if not 0 < self.most_deliveries < slot.deliveries:
                        return True
                    self._bury(slot, deadline)
                self.let_go(grip)
        except BaseException:
            view[self.returned] = 1
            raise
        return False

    def _is_returned(self, slot: Slot, deadline: float | None) -> bool:
        if self.view[self.taking] == slot.index + 1:
            consumer = self.consumer
            if consumer.lock._words.is_mine():
                return False  # we are a signal handler of this thread, which is putting it there
            try:
                with within(consumer, deadline) or consumer.lock:  # its heir decides
                    pass
            finally:
                if consumer.lock._words.is_mine():  # a signal came at the first step of the way out
                    consumer.lock.__exit__()
        return slot.is_filled()

    def _candidates(self) -> list[int]:
        """Slots with an item that nobody alive holds, the oldest item first."""
        view = self.view
        head = view[self.consumer.head] >> COUNT_SHIFT
        alive: dict[int, bool] = {0: False}
        found = []
        for index, (state, word) in enumerate(zip(view[self._state].tolist(), view[self._word].tolist(), strict=True)):
            if state & FILLED:
                owner = word & at.OWNER
                if owner not in alive:
                    alive[owner] = _process.is_alive(owner)
                if not alive[owner]:
                    after = view[self._after.start + index * at.BLOCK_WORDS] >> COUNT_SHIFT
                    found.append((-(head - after & COUNT), index))
        return [index for _, index in sorted(found)]

    def count_returned(self) -> int:
        """How many items nobody alive holds."""
        return len(self._candidates()) if self.view[self.kept] else 0

    def _bury(self, slot: Slot, deadline: float | None) -> None:
        """One delivery too many: among the dead letters."""
        if not self.letters.put(slot.read(), slot.tag, within(self.letters, deadline)):
            raise OSError(errno.ENOSPC, f"{self.letters.text}: no room for another dead letter; take some out")
        if crash_points:
            crash_points[0]("C46 put among the letters")
        slot.acknowledge()
        self.wake_joiners()

    def look_for_the_dead(self) -> bool:
        """Set the hint if a holder has died.  Always False: for who waits and asks whether waiting is over."""
        view = self.view
        if not view[self.kept]:
            return False
        self._tidy_up()
        if self._candidates():
            view[self.returned] = 1
        elif not self._is_any_filled() and not self.consumer.lock._words.is_mine():  # else we are its thread's signal handler
            lock = self.consumer.lock
            try:
                if lock.acquire(False) and not self._is_any_filled():
                    view[self.kept] = 0  # T5
            finally:
                if lock._words.is_mine():
                    lock.__exit__()
        return False

    def _tidy_up(self) -> None:
        """C45: give back the memory of items that somebody acknowledged who died then."""
        view = self.view
        for index, (state, word) in enumerate(zip(view[self._state].tolist(), view[self._word].tolist(), strict=True)):
            owner = word & at.OWNER
            if owner and not state & FILLED and not _process.is_alive(owner):
                grip = Grip()
                try:
                    if self._lock(self.slot(index), grip) and grip.slot is not None and not grip.slot.is_filled():
                        grip.slot.give_memory_back()
                finally:
                    self.let_go(grip)

    def look_now_and_then(self) -> None:
        """``look_for_the_dead``, for who does not wait: at most once per poll interval."""
        if self.view[self.kept]:
            now = SYSTEM.monotonic()
            if now >= self._next_look:
                self._next_look = now + POLL_INTERVAL
                self.look_for_the_dead()

    def _is_any_filled(self) -> bool:
        return bool(self.view[self.taking]) or any(state & FILLED for state in self.view[self._state].tolist())

    # -- leaving ------------------------------------------------------------------------------------------------------

    def let_go(self, grip: Grip) -> None:
        """Release the slot, if this thread has it; wake who waits for an empty one, or for the item that is in it.

        May be called again: a signal may come at its first step.
        """
        slot = grip.slot
        if slot is None:
            return

        def let_go() -> None:
            if grip.is_of_other_thread or slot.is_mine():
                grip.is_of_other_thread = False  # release() goes on to its end, whatever it raises
                slot.lock.release()
            if slot.is_filled():
                if crash_points:
                    crash_points[0]("C47 given back")
                self.view[self.returned] = 1
                fence()  # pairs with the mark of who is about to sleep: it sees the hint, or we see the mark
                self.consumer.wake_consumers()
            if self.view[self.free_block.word] & at.PARKED:
                self.consumer.wake(self.free_block)

        _process.to_the_end(let_go)
        grip.slot = None

    def pass_on(self) -> None:
        """After waiting for an item or a slot: wake the next one if there is more."""
        consumer, view = self.consumer, self.view
        there_is_more = not consumer.is_empty() or view[self.returned]
        if there_is_more and view[consumer.readable] & at.PARKED:
            consumer.wake(consumer.readable_block)
        if there_is_more and view[self.free_block.word] & at.PARKED and (view[self.returned] or self.any_free()):
            consumer.wake(self.free_block)

    # -- what is done -------------------------------------------------------------------------------------------------

    def unfinished(self) -> int:
        """How many of all items that were put are not done."""
        view = self.view
        acknowledged = sum(state >> ACKNOWLEDGED_SHIFT for state in view[self._state].tolist())
        done = (view[self.done_block.word] >> at.COUNT_SHIFT) + acknowledged  # first: else it may pass the TAIL that was seen
        return (view[self.consumer.tail] >> COUNT_SHIFT) - done & COUNT

    def wake_joiners(self) -> None:
        """Wake who waits until all items are done, if they are."""
        if self.view[self.done_block.word] & at.PARKED and not self.unfinished():
            self.consumer.wake(self.done_block, SLOTS * SLOTS)


def _decision(slots: Slots) -> Callable[[], None]:
    """T3: what the heir of the consumers' lock does.  Not a method: it must not keep alive what it belongs to."""
    view, layout, first = slots.view, slots.memory.arena.layout, slots.first_control
    taking, head, count = slots.taking, slots.consumer.head, slots.count

    def decide() -> None:
        """Whether the item of which TAKING speaks is in the slot or in the ring.  Under the consumers' lock."""
        number = view[taking]
        if number:
            if number <= count:
                start = layout.block(first + number - 1)
                if view[head] != view[start + at.BLOCK_PLACE]:
                    view[start + at.BLOCK_STATE] &= ACKNOWLEDGED
            view[taking] = 0

    return decide
