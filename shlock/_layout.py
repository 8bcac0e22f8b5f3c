"""Where everything lies in a segment: magic, version, offsets in 64-bit words, and the names of bits.  No I/O here.

A segment is one arena: a header, parking spots, names of processes, control blocks and, in a named domain, the table
and the text of names::

    header      512 words   see the constants HEADER_*
    spots       5 arrays of `spots` words: STATE, CLAIM, THREAD, SINCE, PRECEDENCE
    processes   8 words each: identity, then 56 bytes of text
    blocks      16 words each, see the constants BLOCK_*
    names       2 words for each block: hash of the name (0 = free), place and length of its text
    text        the bytes of the names
    semaphores  a futex for each spot, in arenas that are not for primitives of one user only
    data        whole pages, in the segment of a guarded buffer (``_memory``)

The owner word (bits of W; one per Lock or RLock, one per permit of an owned Semaphore)::

    bits 0-4 flags | bits 5-26 pid | bits 27-63 birth: start time of the process in clock ticks since boot

or, where it is biased to a process (``_bias``), the number of a slot, and of the bias; or, where the lock is reserved for
one waiter (``_handover``), pid 0 and in the place of the birth::

    bits 27-37 index of the waiter's spot, + 1 | bits 38-63 the lowest bits of the sequence of its S
    bits 27-37 all set: for nobody             | bits 38-41 a count, bits 42-63 pid of who looks for somebody

The spot word (S)::

    bits 0-1 state | bits 2-25 key (index of the control block) | bits 26-63 sequence
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Final

MAGIC: Final = int.from_bytes(b"shlock\r\n", "little")
VERSION: Final = 6

WORD: Final = 8  # bytes
WORD_MASK: Final = (1 << 64) - 1

STARTING: Final = 1 << 0  # in HEADER_JANITOR

# Flags of an owner word.
PARKED: Final = 1 << 0  # somebody may be asleep on this word: a release has to look for a waiter
DIED: Final = 1 << 1  # an owner died inside and nobody has put in order what it left
TAKEN: Final = 1 << 2  # a supervisor is taking it away from its owner, who is not inside
BIASED: Final = 1 << 3  # see ``_bias``: alone, the word names a slot
REVOKING: Final = 1 << 4  # likewise
REVOKED: Final = BIASED | REVOKING  # both: its owner got in by the biased path
FLAGS: Final = PARKED | DIED | TAKEN | BIASED | REVOKING
OWNER: Final = WORD_MASK & ~FLAGS

PID_SHIFT: Final = 5
PID_BITS: Final = 22
BIRTH_SHIFT: Final = PID_SHIFT + PID_BITS
BIRTH_BITS: Final = 64 - BIRTH_SHIFT
PID: Final = ((1 << PID_BITS) - 1) << PID_SHIFT
RESERVED_SPOT_SHIFT: Final = BIRTH_SHIFT
RESERVED_SPOT_BITS: Final = 11
RESERVED_SEQUENCE_SHIFT: Final = RESERVED_SPOT_SHIFT + RESERVED_SPOT_BITS
NOBODY: Final = (1 << RESERVED_SPOT_BITS) - 1  # in the place of the spot; no segment has as many
ATTEMPT_BITS: Final = 64 - RESERVED_SEQUENCE_SHIFT - PID_BITS

# A word that names a slot: the flag, bits 5-7 slot, bits 8-63 generation.
BIAS_SLOT_SHIFT: Final = 5
BIAS_SLOT_MASK: Final = 7
GENERATION_SHIFT: Final = 8
GENERATION: Final = (1 << 64 - GENERATION_SHIFT) - 1

# Words that count, of Semaphore, Event, Condition and Barrier: flags below, numbers above.
COUNT_SHIFT: Final = 5
ONE: Final = 1 << COUNT_SHIFT
SET: Final = 1 << 1  # Event: the flag is up
BROKEN: Final = 1 << 1  # Barrier: nobody gets through until reset()
ACTING: Final = 1 << 2  # Barrier: everybody has arrived, the last one runs the action

# RWLock: flags of its gate, and of the record of a reader.
DRAINING: Final = 1 << 0  # the owner of W waits for the readers that are inside
SUSPECT: Final = 1 << 1  # and a death inside was still to be told when it began
CROWDED: Final = 1 << 2  # somebody waits for a record
IN_LINE: Final = 1 << 0  # in a record: the reader waits for the writer
LEFT: Final = 1 << 1  # beside IN_LINE: a writer has gone by that did not let it in, and the reader has not looked since

ARRIVED: Final = 1 << 0  # Barrier, word of a party: it waits in this round

# States of a parking spot.
IDLE: Final = 0
WAITING: Final = 1
NOTIFIED: Final = 2
STATE: Final = 3
KEY_SHIFT: Final = 2
KEY_BITS: Final = 24
KEY: Final = ((1 << KEY_BITS) - 1) << KEY_SHIFT
SEQUENCE_SHIFT: Final = KEY_SHIFT + KEY_BITS
SEQUENCE_ONE: Final = 1 << SEQUENCE_SHIFT
SEQUENCE: Final = WORD_MASK & ~(KEY | STATE)

# Header, in words.
HEADER_MAGIC: Final = 0
HEADER_VERSION: Final = 1
HEADER_BOOT: Final = 2  # two words
HEADER_NAMESPACE: Final = 4
HEADER_USER: Final = 5
HEADER_IDENTITY: Final = 6  # a random number that names the arena
HEADER_SIZE: Final = 7  # bytes
HEADER_SPOTS: Final = 8
HEADER_PROCESSES: Final = 9
HEADER_BLOCKS: Final = 10
HEADER_TEXT: Final = 11  # bytes; 0 in an arena without names
HEADER_SPOTS_USED: Final = 12  # no spot at this index or above was ever claimed
HEADER_SEMAPHORES: Final = 13  # 1: those of the spots lie in the segment itself; 0: they are files
HEADER_TEXT_USED: Final = 14  # bytes
HEADER_NAMES_USED: Final = 15
HEADER_JANITOR: Final = 16  # identity of the janitor of an arena without a name, or of who is STARTING it
HEADER_BLOCKS_USED: Final = 17  # no block at this index or above was ever used (only in an arena without names)
HEADER_DATA: Final = 18  # bytes
HEADER_DOMAIN: Final = 32  # length in bytes, then the text
HEADER_NAME: Final = 64  # of the one object in this segment: length in bytes, then the text
HEADER_WORDS: Final = 512

# Arrays of the spots, in their order.
SPOT_STATE, SPOT_CLAIM, SPOT_THREAD, SPOT_SINCE, SPOT_PRECEDENCE = range(5)
SPOT_ARRAYS: Final = 5

PROCESS_WORDS: Final = 8
PROCESS_TEXT: Final = (PROCESS_WORDS - 1) * WORD

SEMAPHORE_WORDS: Final = 4  # the first one counts (``_semaphore``)

# A control block, in words.
BLOCK_WORD: Final = 0  # W
BLOCK_KIND: Final = 1  # bits 0-7 kind, bits 8-15 policy, bit 16 owned, bit 17 leased, bit 18 ranked, bit 19 unbiased
BLOCK_PARAMETER: Final = 2  # Semaphore: initial value and bound; Barrier: parties; RWLock: readers, 0 = as usual
BLOCK_DEAD: Final = 3  # identity of the owner that died last
BLOCK_FOUND: Final = 4  # when that was found, nanoseconds since the epoch
BLOCK_SINCE: Final = 5  # when the present owner got in, monotonic nanoseconds; 0 = unknown
BLOCK_MORE: Final = 6  # index of the first extension block; 0 = none
BLOCK_SENTENCE: Final = 7  # identity of the owner whom the supervisor kills, and why (a reason in the place of the flags)
BLOCK_CELLS: Final = 8  # 8 cells here, then EXTENSION_CELLS in every extension
BLOCK_WORDS: Final = 16
# A ring has no cells either.  What is before these words is of the lease, or of the bias.
BLOCK_PLACE: Final = 12  # TAIL or HEAD
BLOCK_INTENT: Final = 13  # two words; of consumers, TAKING behind them
# Nor has a queue, or a slot of its (``_taken``), whose AFTER is in the place of HEAD.
BLOCK_LENGTH: Final = 13  # bytes of the item in a slot
BLOCK_STATE: Final = 14  # of a slot
BLOCK_MOST_ITEMS: Final = 11
BLOCK_MOST_DELIVERIES: Final = 12
BLOCK_RETURNED: Final = 13  # a hint: there may be an item in a slot that nobody holds
BLOCK_CELL_COUNT: Final = BLOCK_WORDS - BLOCK_CELLS
# A leased Lock or RLock has no cells; these words are there instead.
BLOCK_LEASE: Final = 8  # ns, what it was created with: the terms of who asks for none of their own
BLOCK_GRACE: Final = 9  # ns
BLOCK_TOKEN: Final = 10  # fencing token: grows with every hold
# Nor have others, which may be biased, and the two ends of a ring; nor have these, leased or not, a parameter.
BLOCK_GENERATION: Final = 2  # how often it was
# Of the bias: for each slot a word, the identity of who claimed it; and then for each slot another one, its H.
BLOCK_BIASES: Final = 8
BLOCK_LEASED_BIASES: Final = 11  # behind the words of the lease
INSIDE: Final = 0  # of H: its process is in
OUTSIDE: Final = 1  # it is not, and may go in
SHUT: Final = 1 << 32  # it is not, and cannot go in: to the C library a semaphore without a permit
BLOCK_GATE: Final = 11  # of an RWLock, whose cells, the records of its readers, are all in extensions
USUAL_READERS: Final = 64  # where the parameter is 0
# Of a Lock, RLock or guarded buffer, for those who look for deadlocks (``_deadlock``).
BLOCK_CONFIRMED: Final = 14  # until when EDGE was true, in monotonic ns; in the place of the lowest bits, index of the spot + 1
BLOCK_EDGE: Final = 15  # the spot at which the holder waits, as in a reservation; below it the number of its arena; RAISES
RAISES: Final = 1 << 0
EDGE_ARENA: Final = (1 << RESERVED_SPOT_SHIFT) - 1 & ~RAISES
CONFIRMED_SPOT: Final = (1 << RESERVED_SPOT_BITS) - 1
# Of a guarded buffer, in its first control block; and in its second one a word for each copy of the content.
CONTENT_CURRENT: Final = 11  # the last committed version: bits 0-1 which copy it is, bits 2-63 its number
CONTENT_EDITOR: Final = 12  # identity of who edits the current copy in place, or did so last
CONTENT_VERSIONS: Final = 11  # up to MOST_COPIES of them: number of the version that the copy holds, or will hold: UNFINISHED
UNFINISHED: Final = 1 << 63
COPY_BITS: Final = 2
MOST_COPIES: Final = 1 << COPY_BITS
EXTENSION_CELLS: Final = 2
EXTENSION_CELL_COUNT: Final = BLOCK_WORDS - EXTENSION_CELLS
EXTENSION_NEXT: Final = 0

FREE_BLOCK, LOCK, RLOCK, SEMAPHORE, BOUNDED_SEMAPHORE, CONDITION, EVENT, BARRIER = range(8)
GUARDED, CHANNEL, QUEUE, RWLOCK, EXTENSION = range(8, 13)
KIND_NAMES: Final = (
    "", "Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Event", "Barrier", "Block", "Channel", "Queue",
    "RWLock", "",
)  # fmt: skip
#: Whose words may be reserved (``_handover``).  Not those of an RWLock, whose readers stand in another line.
OWNED_KINDS: Final = (LOCK, RLOCK, GUARDED, CHANNEL, QUEUE)
#: For how many slots of the bias there is room, by kind; and where it is leased.
BIAS_SLOTS: Final = {LOCK: 3, RLOCK: 3, CHANNEL: 2, QUEUE: 2}
LEASED_BIAS_SLOTS: Final = {LOCK: 1, RLOCK: 1}
KIND: Final = 0xFF
POLICY_SHIFT: Final = 8
POLICY: Final = 0xFF << POLICY_SHIFT
OWNED: Final = 1 << 16
LEASED: Final = 1 << 17  # every process that uses it has a contract
UNBIASED: Final = 1 << 19  # who uses it cannot call membarrier
RANKED: Final = 1 << 18  # some of these contracts have precedence: it is handed over in the exact order of the line

# Reasons, in BLOCK_SENTENCE.
REASONS: Final = ("owner died", "lease overrun", "lease revoked", "killed by command", "preempted")
OWNER_DIED, LEASE_OVERRUN, LEASE_REVOKED, KILLED, PREEMPTED = range(5)
POLICIES: Final = ("warn", "ignore", "poison")

NAME_HASH: Final = 0
NAME_TEXT: Final = 1  # bits 0-15 length in bytes, bits 16-63 place in the text
NAME_WORDS: Final = 2
HASH_FREE: Final = 0
HASH_EXTENSION: Final = 2  # the block of that index extends another block; no hash of a name is below 4

MAX_NAME: Final = 200  # bytes of UTF-8
PAGE: Final = 4096  # bytes: tables and data meet at a multiple of it


def pages(size: int) -> int:
    """That many bytes, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Layout:
    """Offsets in words of the tables of one segment, from its four capacities."""

    spots: int
    processes: int
    blocks: int
    text: int  # bytes, a multiple of 8
    semaphores: bool = False  # those of the spots lie in the segment
    data: int = 0  # bytes, whole pages

    spot_table: int = field(init=False, repr=False, default=HEADER_WORDS)
    # Computed once: opening a lock asks for them a dozen times.
    process_table: int = field(init=False, repr=False)
    block_table: int = field(init=False, repr=False)
    name_table: int = field(init=False, repr=False)
    text_start: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        place = self.spot_table
        for name, words in (
            ("process_table", SPOT_ARRAYS * self.spots),
            ("block_table", PROCESS_WORDS * self.processes),
            ("name_table", BLOCK_WORDS * self.blocks),
            ("text_start", NAME_WORDS * self.blocks if self.text else 0),
        ):
            place += words
            object.__setattr__(self, name, place)

    @property
    def tables(self) -> int:
        """Bytes of all that is not data."""
        end = self.semaphore(self.spots if self.semaphores else 0) * WORD
        return pages(end) if self.data else end

    @property
    def size(self) -> int:
        """Bytes of the whole segment."""
        return self.tables + self.data

    def semaphore(self, index: int) -> int:
        """Place of the semaphore of a spot, in an arena that has them."""
        return self.text_start + self.text // WORD + SEMAPHORE_WORDS * index

    def spot(self, array: int, index: int) -> int:
        return HEADER_WORDS + array * self.spots + index

    def block(self, index: int) -> int:
        return self.block_table + BLOCK_WORDS * index


def reservation(index: int, state: int) -> int:
    """The owner field of a lock that is reserved for the waiter at a spot, whose S is ``state``."""
    sequence = state >> SEQUENCE_SHIFT << RESERVED_SEQUENCE_SHIFT & WORD_MASK
    return sequence | index + 1 << RESERVED_SPOT_SHIFT


def reserved_for_nobody(pid: int, attempt: int) -> int:
    """The owner field of a lock that a process is about to reserve for somebody: another one at each attempt."""
    number = (pid << ATTEMPT_BITS | attempt & (1 << ATTEMPT_BITS) - 1) << RESERVED_SEQUENCE_SHIFT & WORD_MASK
    return number | NOBODY << RESERVED_SPOT_SHIFT


def is_reservation(word: int) -> bool:
    """Whether an owner word names a spot, and no process."""
    return bool(word & OWNER) and not word & (PID | BIASED | REVOKING)


def reserved_spot(word: int) -> int:
    """Index of the spot that a reservation names; it may be out of bounds."""
    return (word >> RESERVED_SPOT_SHIFT & (1 << RESERVED_SPOT_BITS) - 1) - 1


def arena_number(identity: int) -> int:
    """The bits of EDGE_ARENA for an arena: a hash, since identities may follow one another."""
    return (identity * 0x9E3779B97F4A7C15 & WORD_MASK) >> 64 - RESERVED_SPOT_SHIFT & EDGE_ARENA


def process_in(word: int) -> int:
    """The identity word of the owner, or 0: nobody, or reserved, or biased."""
    return word & OWNER if word & PID and not names_slot(word) else 0


def names_slot(word: int) -> bool:
    """Whether an owner word names a slot, and no process."""
    return word & REVOKED in (BIASED, REVOKING)


def biased(slot: int, generation: int) -> int:
    """The word of a lock that is kept for the process which has claimed a slot."""
    return generation << GENERATION_SHIFT | slot << BIAS_SLOT_SHIFT | BIASED


def bias_slots(kind_word: int) -> int:
    """How many slots of the bias a control block has; 0: its words are used for something else."""
    return (LEASED_BIAS_SLOTS if kind_word & LEASED else BIAS_SLOTS).get(kind_word & KIND, 0)


def bias_words(kind_word: int) -> tuple[int, int]:
    """Where in a control block the slots begin that it has: the words that say who has claimed them, and their H."""
    first = BLOCK_LEASED_BIASES if kind_word & LEASED else BLOCK_BIASES
    return first, first + bias_slots(kind_word)


def slot_in(word: int) -> int:
    """The slot that a word names; it may be out of bounds."""
    return word >> BIAS_SLOT_SHIFT & BIAS_SLOT_MASK


def byte_of(number: int) -> int:
    """Where in a word the byte is that has its bits from 8 * number on."""
    return number if sys.byteorder == "little" else WORD - 1 - number


def bytes_of_tables(header: bytes, size: int) -> int:
    """How many bytes of a segment to map for its tables, from the beginning of it: all of it, if it has no data."""
    words = memoryview(header[: len(header) // WORD * WORD]).cast("Q")
    if len(words) <= HEADER_DATA or words[HEADER_MAGIC] != MAGIC:
        return size
    data = words[HEADER_DATA]
    return size - data if data % PAGE == 0 and data + HEADER_WORDS * WORD <= size else size
