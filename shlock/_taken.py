"""Items that were taken from a queue and are not acknowledged yet: kept whole until they are.

Whoever takes an item copies it into a *slot* first, a control block with a lock of its own and some pages of memory, and then
moves HEAD of the ring past it.  The item is in the slot until it is acknowledged.  The slot's lock says who works on it: when
that process dies, or leaves with an exception, the item is there for the next one.

    STATE of a slot   FILLED | tag << 8 | deliveries << 16, or 0: empty
    AFTER             HEAD of the ring behind this item
    TAKING            of the ring's consumers: number of the slot that is being filled, plus one; 0: none
    RETURNED          of the queue, a hint: there may be an item in a slot that nobody holds

    # slot      lock    entered by                       leaves to
    # EMPTY     free    acknowledge                      FILLING
    # FILLING   held    a consumer                       HELD (HEAD moves past it), EMPTY (its death or exception before)
    # HELD      held    HEAD moves, or taken once more   EMPTY (acknowledge), RETURNED (exception, death of the holder)
    # RETURNED  free    exception, death                 HELD, EMPTY (with a get, or as a dead letter)

    # T1  an item is in the ring or in a slot, never in both: which of the two, HEAD says, in one step; until TAKING is
    #     cleared, a FILLED slot counts only if HEAD is AFTER it
    # T2  deliveries counts up before the item is handed out, so that it is never too low
    # T3  who finds TAKING set after a death decides before anybody moves HEAD: the heir of the consumers' lock does

    killed after                words say                     repaired by                        outcome
    C40 TAKING set              slot empty, HEAD unchanged    heir of the consumers' lock        the message is in the ring
    C41 slot filled             HEAD unchanged                heir of the consumers' lock        the slot is empty again
    C42 HEAD moved              TAKING set, slot filled       heir of the consumers' lock        returned, once
    C43 TAKING cleared          slot filled, its owner dead   who looks for the dead, in 10 ms   returned
    C44 taken once more         deliveries counted up         the same                           returned
    C45 slot emptied            acknowledged, lock held       who takes the slot                 gone
    C46 put among the letters   slot filled                   the same                           a dead letter twice
    C47 given back              slot filled, lock free        RETURNED is set when a consumer    returned
                                                              looks for the dead
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

from . import _layout as at
from . import _process
from ._memory import Memory, pages
from ._ring import COUNT, COUNT_SHIFT, Consumer, Producer
from ._sys import crash_points
from .contract import Terms
from .synchronize import Lock

__all__ = ["SLOTS", "Slot", "Slots"]

SLOTS: Final = 128  # items of one queue that can be taken and not acknowledged at the same time
FILLED: Final = 1
TAG_SHIFT, DELIVERIES_SHIFT = 8, 16
KEPT_BYTES: Final = 1 << 16  # of memory that a slot keeps when it is empty


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
        self.reserved = 0

    @property
    def tag(self) -> int:
        return self.view[self.state] >> TAG_SHIFT & 0xFF

    @property
    def deliveries(self) -> int:
        """How often the item was handed out."""
        return self.view[self.state] >> DELIVERIES_SHIFT

    def is_filled(self) -> bool:
        return bool(self.view[self.state] & FILLED)

    def _map(self, length: int, *, writable: bool) -> mmap.mmap:
        return self.slots.memory.map(self.first, pages(max(1, length)), writable=writable)

    def read(self) -> bytearray | bytes:
        """A copy of the item's bytes, under the lock."""
        length = self.view[self.length]
        if length > self.slots.stride:
            raise self.slots.consumer.damaged("a taken item is longer than there is room for")
        with self._map(length, writable=False) as mapping:
            return bytearray(mapping[:length]) if self.tag >= 3 else mapping[:length]

    def write(self, content: memoryview) -> None:
        """Under its lock and that of the consumers: the bytes of the item that is being taken."""
        length = len(content)
        self.slots.memory.reserve(self.first, pages(max(1, length)))
        self.reserved = length
        with self._map(length, writable=True) as mapping:
            mapping[:length] = content
        self.view[self.length] = length

    def acknowledge(self) -> None:
        """The item is done; under the lock."""
        self.view[self.state] = 0
        if crash_points:
            crash_points[0]("C45 slot emptied")
        length = self.view[self.length]
        if KEPT_BYTES < length <= self.slots.stride:
            self.slots.memory.give_back(self.first + KEPT_BYTES, pages(length) - KEPT_BYTES)


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
    ) -> None:
        """``stride``: bytes of data for each; ``letters``: where items go that were delivered too often."""
        self.memory = memory
        self.first_control = first_control
        self.first_byte = first_byte
        self.stride = stride
        self.consumer = consumer
        self.letters = letters
        self.terms = terms
        self.most_deliveries = 0  # 0: no limit
        self.view = memory.arena.words.view
        self.returned = memory.control(0).start + at.BLOCK_RETURNED
        self.taking = consumer.intent + 2
        self.free_block = memory.control(first_control + SLOTS)
        self._slots: dict[int, Slot] = {}
        self._latest = 0
        layout = memory.arena.layout
        self._states = [layout.block(first_control + index) + at.BLOCK_STATE for index in range(SLOTS)]
        self._words = [layout.block(first_control + index) + at.BLOCK_WORD for index in range(SLOTS)]
        consumer.lock._words.on_heir = self.decide

    def slot(self, index: int) -> Slot:
        slot = self._slots.get(index)
        if slot is None:
            slot = self._slots.setdefault(index, Slot(self, index))
        return slot

    # -- taking -------------------------------------------------------------------------------------------------------

    def take_new(self) -> Slot | None:
        """The next item of the ring, in a slot that we hold; None if there is no item, or no slot."""
        slot = self._lock_free_slot()
        if slot is None:
            return None
        done = False
        try:
            with self.consumer.lock:
                done = self._fill(slot)
        finally:
            if not done:
                self.release(slot)
        return slot if done else None

    def _fill(self, slot: Slot) -> bool:
        consumer, view = self.consumer, self.view
        got = consumer.begin()
        if got is None:
            return False
        after, tag, content = got
        try:
            view[self.taking] = slot.index + 1
            if crash_points:
                crash_points[0]("C40 TAKING set")
            try:
                slot.write(content)
            finally:
                if consumer.lender.end(content):
                    consumer.look_again()
            view[slot.after] = after
            view[slot.state] = FILLED | tag << TAG_SHIFT | 1 << DELIVERIES_SHIFT  # T2
            if crash_points:
                crash_points[0]("C41 slot filled")
            consumer.finish(after)  # T1
            if crash_points:
                crash_points[0]("C42 HEAD moved")
            view[self.taking] = 0
        except BaseException:
            _process.to_the_end(self.decide)
            raise
        if crash_points:
            crash_points[0]("C43 TAKING cleared")
        return True

    def decide(self) -> None:
        """T3: whether the item of which TAKING speaks is in the slot or in the ring.  Under the consumers' lock."""
        number = self.view[self.taking]
        if number:
            if number <= SLOTS:
                start = self.memory.arena.layout.block(self.first_control + number - 1)
                if self.view[self.consumer.head] != self.view[start + at.BLOCK_PLACE]:
                    self.view[start + at.BLOCK_STATE] = 0
            self.view[self.taking] = 0

    def _lock_free_slot(self) -> Slot | None:
        """An empty slot, locked: the latest one if possible."""
        for step in range(SLOTS):
            index = (self._latest + step) % SLOTS
            if self.view[self._states[index]] or (self.view[self._words[index]] & at.OWNER and step < SLOTS // 2):
                continue
            slot = self.slot(index)
            if slot.lock.acquire(False):
                if not slot.is_filled():
                    self._latest = index
                    return slot
                slot.lock.release()
        return None

    def any_free(self) -> bool:
        """Whether a slot is empty."""
        return any(not self.view[state] for state in self._states)

    # -- returned items -----------------------------------------------------------------------------------------------

    def take_returned(self) -> Slot | None:
        """An item that came back, the oldest first, in a slot that we hold; None if there is none."""
        if not self.view[self.returned]:
            return None
        # An exchange: the hint is gone before we look, so that who returns something now sets it again.
        self.memory.arena.words.compare_exchange(self.returned, self.view[self.returned], 0)
        for index in self._candidates():
            slot = self.slot(index)
            if not slot.lock.acquire(False):
                continue
            if self._is_returned(slot):
                self.view[self.returned] = 1  # there may be more
                self.view[slot.state] += 1 << DELIVERIES_SHIFT  # T2
                if crash_points:
                    crash_points[0]("C44 taken once more")
                if not 0 < self.most_deliveries < slot.deliveries:
                    return slot
                self._bury(slot)
            self.release(slot)
        return None

    def _is_returned(self, slot: Slot) -> bool:
        if self.view[self.taking] == slot.index + 1:
            with self.consumer.lock:  # its heir decides
                pass
        return slot.is_filled()

    def _candidates(self) -> list[int]:
        head = self.view[self.consumer.head] >> COUNT_SHIFT
        found = []
        for index, (state, word) in enumerate(zip(self._states, self._words, strict=True)):
            owner = self.view[word] & at.OWNER
            if self.view[state] & FILLED and (not owner or not _process.is_alive(owner)):
                after = self.view[self.memory.arena.layout.block(self.first_control + index) + at.BLOCK_PLACE]
                found.append((-(head - (after >> COUNT_SHIFT) & COUNT), index))
        return [index for _, index in sorted(found)]

    def _bury(self, slot: Slot) -> None:
        """One delivery too many: among the dead letters."""
        body, tag = slot.read(), slot.tag
        while not self.letters.put(body, tag):
            if not self.letters.wait_for_room(len(body), None):
                return
        if crash_points:
            crash_points[0]("C46 put among the letters")
        slot.acknowledge()

    def look_for_the_dead(self) -> bool:
        """Set the hint if a holder has died.  Always False: for who waits and asks whether waiting is over."""
        if self._candidates():
            self.view[self.returned] = 1
        return False

    # -- leaving ------------------------------------------------------------------------------------------------------

    def release(self, slot: Slot) -> None:
        """Let go of a slot; wake who waits for an empty one, or for the item that is in it."""
        is_filled = slot.is_filled()
        slot.lock.release()
        if is_filled:
            if crash_points:
                crash_points[0]("C47 given back")
            self.view[self.returned] = 1
            self.consumer.wake_consumers()
        elif self.view[self.free_block.word] & at.PARKED:
            self.consumer.wake(self.free_block)

    def holders(self) -> Iterator[tuple[int, int]]:
        """Of every item that was taken and not acknowledged: identity word of its holder (0: returned), deliveries."""
        for state, word in zip(self._states, self._words, strict=True):
            if self.view[state] & FILLED:
                yield self.view[word] & at.OWNER, self.view[state] >> DELIVERIES_SHIFT
