"""A process's own record of what it holds under contracts, in memory that only it and the supervisor can write.

Words in a segment are written by everybody who uses it; they are claims.  A *ledger* is a memory file that a client makes,
seals against truncation and hands to its supervisor.  The supervisor kills a process only if its own ledger says that it is
inside.

One slot for each contract, an array for each field, so that one slice tells which of a thousand holds there are::

    header     16 words   magic, version, identity of the owner
    BEGAN      when the present hold began; 0 = not inside, LEFT = not inside any more       by the client
    TERMINATE  BEGAN of the hold that is asked to leave                                      by the supervisor
    LEASE      ns                                                                            by the client
    GRACE      ns                                                                            by the client
    ARENA      identity of the arena of the control block; 0 = free                          by the client
    BLOCK      index of the control block                                                    by the client
    RANK       rank, 1 << 32 for LeaseExpired in the main thread at the deadline, INHERITS   by the client
    SITE       128 bytes of text: where in its program it took the lock, if asked for        by the client
    THREAD     number of the thread that has the seat, or that of a record, under a contract that inherits   by the client
    RECORD     of a reader's slot: place of the record in its arena; 0 = a contract's own    by the client
    HOLDS      of a reader's slot: how many there were                                       by the client
    DOUBT      1: W has, or had, TAKEN                set by the supervisor, cleared by the client

and two tables for priority inheritance (``supervisor/inheritance.py``)::

    WAITS      a word for each thread that waits under such a contract: thread, WAIT_READS, slot + 1   by the client
    LIFTS      8 words for each thread that is lifted: LIFT_*                                by the supervisor

A slot belongs to one contract of one process; that for an RWLock has one more for each record in which the process has read
under it (``_leased_readers``).  BEGAN and TERMINATE are monotonic seconds, as doubles: who holds a lock writes the clock's own
object there, and leaves it to others to reckon.  BEGAN is written by the thread that holds the lock.  The ledger outlives every
supervisor: what the next one has to know of a contract stands here.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import Final

from . import _process
from ._atomic import Words
from ._layout import WORD

__all__ = [
    "ARENA",
    "BEGAN",
    "BLOCK",
    "DOUBT",
    "GRACE",
    "HOLDS",
    "INHERITS",
    "LEASE",
    "LEFT",
    "LIFTS",
    "NAME",
    "RANK",
    "RECORD",
    "SLOTS",
    "TERMINATE",
    "THREAD",
    "WAITS",
    "Ledger",
    "ledger_of",
    "reader_slots_of",
    "slots_of",
]

MAGIC: Final = int.from_bytes(b"shlkledg", "little")
VERSION: Final = 3
SLOTS: Final = 32768  # contracts of one process, and records in which it has read under them
HEADER: Final = 16  # words
FIELDS: Final = 7
BEGAN, TERMINATE, LEASE, GRACE, ARENA, BLOCK, RANK = (HEADER + field * SLOTS for field in range(FIELDS))
LEFT: Final = -1.0  # in BEGAN
RAISES: Final = 1 << 32  # in RANK
INHERITS: Final = 1 << 40
SITE_BYTES: Final = 128
SITES: Final = (HEADER + FIELDS * SLOTS) * WORD  # bytes
THREAD: Final = (SITES + SLOTS * SITE_BYTES) // WORD
WAITS: Final = THREAD + SLOTS
MOST_WAITS: Final = 64  # threads of one process; who waits beside them lifts nobody
WAIT_SLOT_SHIFT: Final = 32
WAIT_READS: Final = 1 << 31  # it waits to read
LIFTS: Final = WAITS + MOST_WAITS
MOST_LIFTS: Final = 64
LIFT_WORDS: Final = 8
#: Of a lift: the thread (0 = no lift) and its start time; priorities: its own, the one that it was given, and the next one.
LIFT_THREAD, LIFT_BIRTH, LIFT_OWN, LIFT_GIVEN, LIFT_NEXT = range(5)
RECORD: Final = LIFTS + MOST_LIFTS * LIFT_WORDS
HOLDS: Final = RECORD + SLOTS
DOUBT: Final = HOLDS + SLOTS
SIZE: Final = -(-(DOUBT + SLOTS) * WORD // mmap.PAGESIZE) * mmap.PAGESIZE
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
NAME: Final = "shlock-ledger"
#: Of a process: a ledger is made early, and there is one for each domain.
MOST_LOOKED_AT: Final = 16384  # descriptors
MOST_LEDGERS: Final = 64


class Ledger:
    """One mapping of a ledger: ``words``, ``view`` their memoryview, ``moments`` the same as doubles.

    ``owner``: the identity that its header names.
    """

    __slots__ = ("_mmap", "fd", "memory", "moments", "view", "words")

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        self.fd = fd
        self._mmap = mmap.mmap(fd, SIZE, access=mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE)
        self.memory = memoryview(self._mmap)
        self.words = Words(self.memory)
        self.view = self.words.view
        self.moments = self.memory.cast("d")

    @classmethod
    def create(cls) -> Ledger:
        """The ledger of this process.  Untouched pages take no memory."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, SIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            ledger = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        for place, value in ((0, MAGIC), (1, VERSION), (2, _process.current.word)):
            ledger.view[place] = value
        return ledger

    @classmethod
    def over(cls, fd: int, *, read_only: bool = False) -> Ledger:
        """A ledger that a client handed over, checked: its maker cannot pull it away.  ValueError says what is wrong.

        Takes the descriptor over, and closes it if it refuses it.
        """
        try:
            cls._check(fd)
            ledger = cls(fd, read_only=read_only)
        except BaseException:
            os.close(fd)
            raise
        if (ledger.view[0], ledger.view[1]) != (MAGIC, VERSION):
            ledger.close()
            raise ValueError("it is no ledger of this version")
        return ledger

    @staticmethod
    def _check(fd: int) -> None:
        try:  # first: of a file that somebody else serves even fstat may block
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise ValueError("a ledger must be a sealed memory file") from None
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != SIZE:
            raise ValueError(f"a ledger has {SIZE} bytes, this has {facts.st_size}")
        if seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE) != fcntl.F_SEAL_SHRINK:
            raise ValueError("a ledger must be sealed against shrinking, and writable")

    @property
    def owner(self) -> int:
        return self.view[2]

    def site(self, slot: int) -> str | None:
        """Where the holder took the lock, if it recorded that."""
        first = SITES + slot * SITE_BYTES
        text = bytes(self.memory[first : first + SITE_BYTES]).split(b"\0")[0]
        return text.decode("utf-8", "replace") or None

    def write_site(self, slot: int, text: str) -> None:
        first = SITES + slot * SITE_BYTES
        self.memory[first : first + SITE_BYTES] = text.encode("utf-8", "replace")[-SITE_BYTES + 1 :].ljust(SITE_BYTES, b"\0")

    def has_lifts(self) -> bool:
        """Whether a thread of its process is lifted, as far as a supervisor has said."""
        return any(self.view[LIFTS : LIFTS + MOST_LIFTS * LIFT_WORDS : LIFT_WORDS].tolist())

    def close(self) -> None:
        """Let go of mapping and descriptor; views that are still out keep the memory."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                self.view.release()
                self.moments.release()
                self.memory.release()
                self._mmap.close()
            except BufferError:
                pass
            os.close(fd)


def slots_of(ledger: Ledger, arena: int) -> dict[int, int]:
    """The slots of the contracts for locks of an arena, by the index of the control block."""
    view = ledger.view
    arenas = view[ARENA : ARENA + SLOTS].tolist()
    return {view[BLOCK + slot]: slot for slot, found in enumerate(arenas) if found == arena and not view[RECORD + slot]}


def reader_slots_of(ledger: Ledger, arena: int) -> dict[int, int]:
    """The slots of the readers of an arena's RWLocks, by the place of their records."""
    view = ledger.view
    records = view[RECORD : RECORD + SLOTS].tolist()
    return {place: slot for slot, place in enumerate(records) if place and view[ARENA + slot] == arena}


def ledger_of(pid: int, owner: int, arena: int, *, read_only: bool = False, user: int | None = None) -> Ledger | None:
    """The ledger in which a process has a contract for a lock of an arena, through its open descriptors.

    None if there is none, or it can't be looked at.  A process has a ledger for each domain.  ``user``: only one that this
    user has made; another's may have been slipped to the process.
    """
    folder = f"/proc/{pid}/fd"
    try:
        names = sorted(os.listdir(folder), key=int)[:MOST_LOOKED_AT]
    except OSError:
        return None
    ledgers = 0
    for name in names:
        try:
            if not os.readlink(f"{folder}/{name}").startswith(f"/memfd:{NAME}"):
                continue
            access = os.O_RDONLY if read_only else os.O_RDWR
            fd = os.open(f"{folder}/{name}", access | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a fifo
        except OSError:
            continue
        try:
            made_by = os.fstat(fd).st_uid
            ledger = Ledger.over(fd, read_only=read_only)
        except (OSError, ValueError):
            continue
        ledgers += 1
        if user in (None, made_by) and ledger.owner == owner and arena in ledger.view[ARENA : ARENA + SLOTS].tolist():
            return ledger
        ledger.close()
        if ledgers == MOST_LEDGERS:
            break
    return None
