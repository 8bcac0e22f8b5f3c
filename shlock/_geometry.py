"""Where everything lies in a channel or a queue: control blocks, the pages of its rings, the slots.  No I/O here.

    ring      4 control blocks: PRODUCERS, CONSUMERS, READABLE, WRITABLE; a table of chunks, a byte for each; the chunks
    TAIL, HEAD and the headers of messages are numbers of several parts, which are here as well; what they mean: see ``_ring``
    Channel   one block that says what it is; the ring of what the privileged end sends; the ring of what the user end sends
    Queue     one block that says what it is; the ring of the items; that of the dead letters; DONE; the slots; FREE_SLOT
              data: both rings, then some pages for each slot

Computed from the size alone, so that whoever knows the size need not believe what stands in a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from . import _layout as at
from ._arena import Declaration
from ._owned import IGNORE

if TYPE_CHECKING:
    from ._memory import Memory

__all__ = [
    "CONTROLS", "LONGEST", "MOST_BYTES", "SLOTS", "SLOTS_OF_MACHINE", "Geometry", "channel_controls", "channel_rings",
    "declarations", "prepare", "queue_controls", "queue_rings", "slot_size",
]  # fmt: skip

PRODUCERS, CONSUMERS, READABLE, WRITABLE = range(4)  # control blocks of a ring, from its first one on
CONTROLS: Final = 4
NO_MEMORY, FREE, USED, LEFT = range(4)  # states of a chunk

OVERHEAD: Final = 2 * at.WORD  # of a message: its header, and a link behind it
COUNT_SHIFT: Final = 32
PLACE: Final = (1 << COUNT_SHIFT) - 1
COUNT: Final = PLACE
ONE: Final = 1 << COUNT_SHIFT
HIGH: Final = COUNT << COUNT_SHIFT
#: Added to its length, and divided by 8: how far TAIL or HEAD moves by a message.
STEP: Final = 8 * ONE + 15
LENGTH_BITS: Final = 40
LENGTH: Final = (1 << LENGTH_BITS) - 1
TAG_SHIFT: Final = LENGTH_BITS
TAG: Final = 0xFF
LINK: Final = 1 << 63
#: In READABLE: nobody will take messages any more; in WRITABLE: nobody will put any.
SHUT: Final = 1 << 1
ATTENTION: Final = at.PARKED | SHUT
LONGEST: Final = (PLACE + 1) * at.WORD // 4  # bytes of a message: a run of chunks is found though others lie in between
MOST_BYTES: Final = 1 << 33  # of one direction: places of messages have so many words
#: Chunks that nobody uses and that keep their memory, where memory is taken as it is needed.
KEPT_CHUNKS: Final = 8
#: Likewise after large messages, for so many of those, but not more than so many chunks: taking memory anew costs several
#: times what filling it does, and where a chunk is missing in a row it is taken though others are free.
LARGE_KEPT, MOST_KEPT = 8, 132

#: Of a Pipe or a Queue without a size: messages of up to half of it; memory is taken as it is needed.
LAZY_CHUNK, LAZY_CHUNKS = 1 << 19, 1 << 12
LETTERS_CHUNKS: Final = 1 << 13
#: Chunks of a Queue that nobody uses and that keep their memory.
QUEUE_KEPT: Final = 16
#: Large messages that may wait together where few chunks may be used, so that both ends work at the same time.
LARGE_BESIDE: Final = 4

#: Control blocks of a Queue.
ITEMS, LETTERS = 1, 1 + CONTROLS  # first ones of the two rings
DONE: Final = 1 + 2 * CONTROLS  # counts the items that are done; who joins parks here
FIRST_SLOT: Final = DONE + 1  # and behind the slots a word at which parks who waits for an empty one
SLOTS: Final = 128  # items of one queue that can be taken and not acknowledged at the same time
#: Likewise where all of the memory is taken when the queue is made: each slot has room for the longest item.
SLOTS_OF_MACHINE: Final = 16


@dataclass(frozen=True)
class Geometry:
    """How large a ring is.

    chunk   bytes, a power of two and whole pages
    chunks  how many there are
    most    how many may be in use while more than one message is waiting
    first   byte of the data at which the ring begins: its table, and then its chunks
    is_lazy whether the memory of a chunk is taken when it is first used, and given back when many are not
    kept    of a lazy one: how many chunks that are not in use keep their memory
    """

    chunk: int
    chunks: int
    most: int
    first: int = 0
    is_lazy: bool = False
    kept: int = KEPT_CHUNKS

    @classmethod
    def for_capacity(cls, capacity: int, first: int = 0) -> Geometry:
        """One for messages of about so many bytes in all, and any single one up to that size.  About twice that in memory."""
        chunk = at.PAGE
        while chunk * 16 < capacity:
            chunk *= 2
        run = -(-(capacity + OVERHEAD) // chunk)
        # The last message may lie in the middle: then there is a run on one of its sides.
        return cls(chunk, 2 * run + 1, run + 1, first)

    @property
    def table(self) -> int:
        """Bytes of the table."""
        return at.pages(self.chunks)

    @property
    def content(self) -> int:
        """Bytes of all chunks."""
        return self.chunk * self.chunks

    @property
    def size(self) -> int:
        """Bytes of the whole ring."""
        return self.table + self.content

    def most_beside(self, run: int) -> int:
        """How many chunks may be in use when a message is added that needs so many.

        Some large messages may wait together, so that their producer and their consumer work at the same time: as far as
        that takes no more memory than is kept for them.
        """
        return max(self.most, min(LARGE_BESIDE * run, MOST_KEPT)) if self.is_lazy else self.most

    @property
    def longest(self) -> int:
        """Bytes of the longest message."""
        return min(self.chunk * ((self.chunks - 1) // 2) - OVERHEAD, LONGEST)


def declarations(kind: int, lease: int = 0, grace: int = 0) -> tuple[Declaration, ...]:
    """Those of the control blocks of a new ring.  Who gets a lock of it after a death has nothing to repair."""
    lock = Declaration(kind, policy=IGNORE, lease=lease, grace=grace)
    return lock, lock, Declaration(kind), Declaration(kind)


def prepare(memory: Memory, geometry: Geometry) -> None:
    """Make the first state of a ring, whose words are zero.  OSError if the memory for it can't be had."""
    whole = geometry.table + (geometry.chunk if geometry.is_lazy else geometry.content)
    memory.reserve(geometry.first, whole)
    with memoryview(memory.map(geometry.first, geometry.table)) as table:
        table[: geometry.chunks] = bytes([NO_MEMORY if geometry.is_lazy else FREE]) * geometry.chunks
        table[0] = USED


# -- what is made of rings --------------------------------------------------------------------------------------------------


def channel_rings(size: int) -> tuple[Geometry, Geometry]:
    """Of what the privileged end sends, and of what the user end sends."""
    one = Geometry.for_capacity(size)
    return one, Geometry.for_capacity(size, first=one.size)


def channel_controls(size: int, lease: int = 0, grace: int = 0) -> tuple[Declaration, ...]:
    """What the control blocks of a channel are at first."""
    return (Declaration(at.CHANNEL, parameter=size, lease=lease, grace=grace), *2 * declarations(at.CHANNEL, lease, grace))


def queue_rings(size: int, *, is_of_machine: bool = False) -> tuple[Geometry, Geometry]:
    """Of the items and of the dead letters; ``size`` 0: as large as need be.

    In a domain of the machine all memory is there from the beginning, and so it is little: as many dead letters as items.
    """
    if size:
        items = Geometry.for_capacity(size)
    else:
        items = Geometry(LAZY_CHUNK, LAZY_CHUNKS, LAZY_CHUNKS, is_lazy=True, kept=QUEUE_KEPT)
    if is_of_machine:
        return items, Geometry.for_capacity(size, first=items.size)
    chunk = items.chunk if size else LAZY_CHUNK // 2  # there are few dead letters, if any
    chunks = max(items.content // chunk, min(LETTERS_CHUNKS, 4 * LONGEST // chunk))  # as far as a place can say
    return items, Geometry(chunk, chunks, chunks, items.size, is_lazy=True)


def slot_size(items: Geometry) -> int:
    """Bytes of data of a slot."""
    return at.pages(items.longest)


def queue_controls(size: int, lease: int = 0, grace: int = 0, slots: int = SLOTS) -> tuple[Declaration, ...]:
    """What the control blocks of a queue are at first."""
    slot = Declaration(at.QUEUE, policy=IGNORE, lease=lease, grace=grace)
    return (
        Declaration(at.QUEUE, parameter=size, lease=lease, grace=grace),
        *2 * declarations(at.QUEUE, lease, grace),
        Declaration(at.QUEUE),
        *(slot,) * slots,
        Declaration(at.QUEUE),
    )
