"""The tables of one segment: control blocks, their cells, and the names of processes.

A segment is one arena.  Arenas without a name are for the anonymous primitives of the process that made them
(``_anonymous``); a chain of named ones is a domain (``_names``).  Everything about a segment that could be wrong is checked
when it is attached, and nothing that another process wrote is believed without a bound.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import secrets
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import process as mp_process
from multiprocessing import util
from typing import Any, Final, NamedTuple

from . import _layout as at
from . import _process
from ._atomic import Words
from ._segment import Segment
from ._sys import SHM_FOLDER, SYSTEM
from .errors import Abandoned, SegmentError

__all__ = [
    "Arena",
    "Block",
    "Declaration",
    "Extent",
    "Part",
    "Rights",
    "check_place",
    "check_segment",
    "extensions_for",
    "write_header",
]

SPOTS: Final = 1024  # threads that can be blocked in one arena at the same time
PROCESSES: Final = 128  # names of processes that are remembered
FIRST_BLOCKS: Final = 256
MOST_BLOCKS: Final = 16384  # every further segment is twice as large as the one before, up to this
TEXT_PER_BLOCK: Final = 40  # bytes of name, on average


@dataclass(frozen=True)
class Declaration:
    """What a primitive is when it is new."""

    kind: int
    first_word: int = 0
    parameter: int = 0  # Semaphore: its bound or first value; Barrier: its parties
    cells: int = 0  # further words: permits of an owned Semaphore, parties of a Barrier, records of an RWLock
    owned: bool = False
    policy: int | None = None  # None: as it is, "warn" if it is new
    lease: int = 0  # ns, 0 = none; what it is created with
    grace: int = 0  # ns
    copies: int = 0  # of the content of a guarded buffer
    limits: tuple[int, int] = (0, 0)  # of a new queue: BLOCK_MOST_ITEMS and BLOCK_MOST_DELIVERIES

    def kind_word(self) -> int:
        flags = (at.OWNED if self.owned else 0) | (at.LEASED if self.lease else 0)
        return self.kind | (self.policy or 0) << at.POLICY_SHIFT | flags


class Block:
    """One control block, as one process holds it.  All objects of a process for the same primitive share it.

    ``local`` is for what the primitive remembers in this process.  When the last reference goes, an anonymous block that
    no other process can know is free for the next primitive.
    """

    __slots__ = (
        "__weakref__",
        "arena",
        "cells",
        "declaration",
        "exported",
        "extensions",
        "forks",
        "index",
        "local",
        "name",
        "start",
    )

    def __init__(self, arena: Arena, index: int, name: str | None, cells: Sequence[int]) -> None:
        self.arena = arena
        self.index = index
        self.name = name
        self.start = arena.layout.block(index)
        self.cells = cells
        self.extensions: Sequence[int] = ()
        self.exported = False
        self.forks = _forks
        self.local: Any = None

    @property
    def word(self) -> int:
        """Index of W among the words of the arena."""
        return self.start + at.BLOCK_WORD

    @property
    def kind(self) -> int:
        return self.kind_word & at.KIND

    @property
    def kind_word(self) -> int:
        return self.arena.kind_word(self.index)

    @property
    def policy(self) -> int:
        return (self.kind_word & at.POLICY) >> at.POLICY_SHIFT

    @property
    def owned(self) -> bool:
        return bool(self.kind_word & at.OWNED)

    @property
    def leased(self) -> bool:
        return self.arena.made is not None or bool(self.kind_word & at.LEASED)  # of the machine everything is

    def mark_ranked(self) -> None:
        """From now on the lock is handed over in the exact order of the line."""
        words, place = self.arena.words, self.start + at.BLOCK_KIND
        for _ in range(1000):  # somebody may overwrite it all the time
            seen = words.load(place)
            if seen & at.RANKED or words.compare_exchange(place, seen, seen | at.RANKED):
                break

    @property
    def parameter(self) -> int:
        return self.arena.parameter(self.index)

    def __del__(self) -> None:
        try:
            arena = self.arena
            is_ours = arena.creator is _process.current and self.forks == _forks and not self.exported
        except AttributeError:  # interrupted while it was made: nobody knows of it; or the interpreter is shutting down
            return
        if is_ours:
            # As this process remembers them, not as the segment may say by now.
            for index in (self.index, *self.extensions):
                arena.take_back(index)


#: Counted up before and after every fork: a block that was made at another count may be known to a child.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


_process.before_fork.append(_count_fork)


#: What this process has mapped, for those who look for deadlocks.
living: weakref.WeakSet[Arena] = weakref.WeakSet()


class Extent(NamedTuple):
    """Some bytes of the data of an object, and in which of its memory files they are, from which byte on; 0: the segment."""

    first: int
    end: int
    part: int
    offset: int


class Rights(NamedTuple):
    """What a supervisor allowed this process when it gave it the segment, and by which rule."""

    operations: frozenset[str] = frozenset()
    rule: str = "no rule"


class Part:
    """A memory file without tables, by its descriptor, which is closed with the last use."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            SYSTEM.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # the interpreter is shutting down
            self.close()


class Arena:
    """One mapped segment with its tables.  Everything about a segment that could be wrong is checked on attach."""

    def __init__(self, segment: Segment, layout: at.Layout, domain: str | None) -> None:
        self.segment = segment
        self.layout = layout
        self.domain = domain
        self.words = Words(segment.memory)
        self.identity = self.words.load(at.HEADER_IDENTITY)
        #: Of the one object in it: in an arena of the machine, and in that of a buffer with a name.
        self.only_name: str | None = header_text(segment, at.HEADER_NAME) if domain is not None and layout.data else None
        self.made: object = None  # of an arena of the machine: what it was made for (``_machine``)
        #: Of the machine: further memory files of the object, by number, as far as this process was given them; and where its
        #: data is.  Empty where all of it is in the segment.
        self.parts: dict[int, Part] = {}
        self.extents: tuple[Extent, ...] = ()
        self.rights = Rights()
        #: Of an arena of the machine: what its control blocks are, whatever stands there.
        self.declared: tuple[Declaration, ...] = ()
        self.creator: _process.ProcessIdentity | None = None  # of an arena without a name
        self.parking: Any = None  # made by _parking on first use
        self._returned: list[int] = []
        self._unused = itertools.count()
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        living.add(self)
        if not segment.memory.readonly:
            self.record_process()
            util.register_after_fork(self, Arena.record_process)

    # -- making and attaching -----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, blocks: int, domain: str | None = None) -> Arena:
        """A new arena in a segment without a name.  OSError if the memory cannot be had."""
        text = -(-blocks * TEXT_PER_BLOCK // at.WORD) * at.WORD if domain is not None else 0
        layout = at.Layout(SPOTS, PROCESSES, blocks, text)
        segment = Segment.create(layout.size)
        write_header(segment, layout, domain)
        if domain is not None:
            # As the number of an extension, 0 means "none": block 0 is never used here.
            Words(segment.memory).store(layout.name_table + at.NAME_HASH, at.HASH_EXTENSION)
        arena = cls(segment, layout, domain)
        arena.creator = _process.current
        return arena

    @classmethod
    def over(cls, segment: Segment, *, user: int | None = None) -> Arena:
        """The arena in a segment that somebody else made, after checking that it is one, and of that user (default: ours)."""
        layout, domain = check_segment(segment, SYSTEM.geteuid() if user is None else user)
        return cls(segment, layout, domain)

    # -- blocks without a name ----------------------------------------------------------------------------------------

    def take_block(self) -> int | None:
        """Index of a block that nobody uses, or None.  For the creator of the arena only."""
        try:
            return self._returned.pop()
        except IndexError:
            index = next(self._unused)
        if index >= self.layout.blocks:
            return None
        self.words.raise_to(at.HEADER_BLOCKS_USED, index + 1)
        return index

    def take_back(self, index: int) -> None:
        self.words.store(self.layout.block(index) + at.BLOCK_KIND, at.FREE_BLOCK)
        self._returned.append(index)

    def clear_block(self, index: int) -> None:
        first = self.layout.block(index)
        self.words.view[first : first + at.BLOCK_WORDS] = _ZERO_BLOCK

    def declare(self, index: int, declaration: Declaration, extensions: Sequence[int]) -> None:
        """Write the first state of a primitive into a block that nobody else can see yet."""
        self.clear_block(index)
        start, store = self.layout.block(index), self.words.store
        store(start + at.BLOCK_WORD, declaration.first_word)
        store(start + at.BLOCK_PARAMETER, declaration.parameter)
        if declaration.lease:
            store(start + at.BLOCK_LEASE, declaration.lease)
            store(start + at.BLOCK_GRACE, declaration.grace)
        for extension, following in zip(extensions, (*extensions, 0)[1:], strict=True):
            self.clear_block(extension)
            store(self.layout.block(extension) + at.BLOCK_KIND, at.EXTENSION)
            store(self.layout.block(extension) + at.EXTENSION_NEXT, following)
        store(start + at.BLOCK_MORE, extensions[0] if extensions else 0)
        store(start + at.BLOCK_KIND, declaration.kind_word())

    def block(self, index: int, name: str | None = None) -> Block:
        """The one Block object of this process for that index."""
        block = self._blocks.get(index)
        if block is None:
            block = Block(self, index, name, self.cells_of(index))
            block = self._blocks.setdefault(index, block)
        return block

    def kind_word(self, index: int) -> int:
        if self.declared:
            return self.declared[index].kind_word()
        return self.words.load(self.layout.block(index) + at.BLOCK_KIND)

    def parameter(self, index: int) -> int:
        if self.declared:
            return self.declared[index].parameter
        load, start = self.words.load, self.layout.block(index)
        has_one = load(start + at.BLOCK_KIND) & at.KIND not in (at.LOCK, at.RLOCK)  # else it is BLOCK_GENERATION
        return load(start + at.BLOCK_PARAMETER) if has_one else 0

    def cells_of(self, index: int) -> list[int]:
        """Indices of the cell words of a block.  SegmentError if the chain of extensions is damaged."""
        if self.declared:  # nothing of the machine has any
            return []
        start = self.layout.block(index)
        kind_word, parameter = self.words.load(start + at.BLOCK_KIND), self.words.load(start + at.BLOCK_PARAMETER)
        is_rwlock = kind_word & at.KIND == at.RWLOCK
        count = parameter if kind_word & at.KIND == at.BARRIER or kind_word & at.OWNED else 0
        if is_rwlock:
            count = parameter or at.USUAL_READERS
        if count > self.layout.blocks * at.EXTENSION_CELL_COUNT:
            raise self.damaged(f"block {index} claims {count} cells, more than there are")
        here = 0 if is_rwlock else min(count, at.BLOCK_CELL_COUNT)
        cells = list(range(start + at.BLOCK_CELLS, start + at.BLOCK_CELLS + here))
        extension = self.words.load(start + at.BLOCK_MORE)
        while len(cells) < count:
            if not 0 < extension < self.layout.blocks:
                raise self.damaged(f"the cells of block {index} end after {len(cells)} of {count}")
            first = self.layout.block(extension) + at.EXTENSION_CELLS
            cells += range(first, first + min(count - len(cells), at.EXTENSION_CELL_COUNT))
            extension = self.words.load(self.layout.block(extension) + at.EXTENSION_NEXT)
        return cells

    # -- processes ----------------------------------------------------------------------------------------------------

    def record_process(self) -> None:
        """Remember what this process is, for those who outlive it.  Best effort: the table is small and only informs."""
        me = _process.current.word
        program = os.path.basename(next(iter(getattr(sys, "argv", ())), "")) or "python"
        text = f"{mp_process.current_process().name} ({program})"
        encoded = text.encode("utf-8", "replace")[: at.PROCESS_TEXT].ljust(at.PROCESS_TEXT, b"\0")
        for row in self._process_rows(me):
            seen = self.words.load(row)
            is_free = not seen or not _process.is_alive(seen)
            if seen == me or (is_free and self.words.compare_exchange(row, seen, me)):
                first = (row + 1) * at.WORD
                self.segment.memory[first : first + at.PROCESS_TEXT] = encoded
                return

    def process_name(self, word: int) -> str | None:
        """What the process of an owner word is or was; None if nobody remembers."""
        owner = word & at.OWNER
        for row in self._process_rows(owner):
            if self.words.load(row) == owner:
                first = (row + 1) * at.WORD
                return bytes(self.segment.memory[first : first + at.PROCESS_TEXT]).rstrip(b"\0").decode("utf-8", "replace")
        return None

    def _process_rows(self, word: int) -> Iterator[int]:
        """The few rows in which a process may stand."""
        rows = self.layout.processes
        for step in range(min(8, rows)):
            yield self.layout.process_table + (_process.pid_of(word) + step) % rows * at.PROCESS_WORDS

    def abandoned(self, start: int) -> Abandoned:
        """Who was the last to die inside, and why, as the control block at that place says."""
        dead, found = self.words.load(start + at.BLOCK_DEAD), self.words.load(start + at.BLOCK_FOUND)
        return Abandoned(_process.pid_of(dead), self.process_name(dead), found / 1e9, self.reason(start, dead))

    def reason(self, start: int, dead: int) -> str:
        """Why an owner lost the lock: what it was sentenced for, or that it died."""
        sentence = self.words.load(start + at.BLOCK_SENTENCE)
        number = sentence & at.FLAGS if sentence & at.OWNER == dead else at.OWNER_DIED
        return at.REASONS[number if number < len(at.REASONS) else at.OWNER_DIED]

    def processes(self) -> list[int]:
        """The identity words that are recorded."""
        first = self.layout.process_table
        return [w for row in range(self.layout.processes) if (w := self.words.load(first + row * at.PROCESS_WORDS))]

    def different(self, fact: str) -> SegmentError:
        return SegmentError(self.segment.name, fact, "Use another name or domain, or ask for what is there.")

    def damaged(self, fact: str) -> SegmentError:
        return SegmentError(
            self.segment.name or "without a name",
            fact,
            "Its contents were overwritten by something else. End the processes that use it, then run 'shlock clean'.",
        )


_ZERO_BLOCK = memoryview(bytes(at.BLOCK_WORDS * at.WORD)).cast("Q")


def extensions_for(cells: int) -> int:
    """How many extension blocks that many cells need."""
    return max(0, -(-(cells - at.BLOCK_CELL_COUNT) // at.EXTENSION_CELL_COUNT))


def write_header(segment: Segment, layout: at.Layout, domain: str | None, name: str | None = None) -> None:
    """Make a segment full of zeros an arena.  ``name``: of the one object in it."""
    words = Words(segment.memory)
    boot = SYSTEM.boot_id()
    for place, value in (
        (at.HEADER_VERSION, at.VERSION),
        (at.HEADER_BOOT, int.from_bytes(boot[:8], "little")),
        (at.HEADER_BOOT + 1, int.from_bytes(boot[8:], "little")),
        (at.HEADER_NAMESPACE, SYSTEM.pid_namespace()),
        (at.HEADER_USER, SYSTEM.geteuid()),
        (at.HEADER_IDENTITY, secrets.randbits(63) | 1),
        (at.HEADER_SIZE, layout.size),
        (at.HEADER_SPOTS, layout.spots),
        (at.HEADER_PROCESSES, layout.processes),
        (at.HEADER_BLOCKS, layout.blocks),
        (at.HEADER_TEXT, layout.text),
        (at.HEADER_SEMAPHORES, layout.semaphores),
        (at.HEADER_DATA, layout.data),
        (at.HEADER_MAGIC, at.MAGIC),
    ):
        words.store(place, value)
    for place, text in ((at.HEADER_DOMAIN, domain), (at.HEADER_NAME, name)):
        if text is not None:
            encoded = text.encode()
            words.store(place, len(encoded))
            first = (place + 1) * at.WORD
            segment.memory[first : first + len(encoded)] = encoded


# -- checking a segment ---------------------------------------------------------------------------------------------------


@functools.cache
def _this_machine() -> tuple[int, int]:
    boot = SYSTEM.boot_id()
    return int.from_bytes(boot[:8], "little"), int.from_bytes(boot[8:], "little")


def _how_to_remove(segment: Segment) -> str:
    return f"If nobody needs it, remove {SHM_FOLDER}/{segment.name} by hand." if segment.name else "Nothing to do."


def check_place(segment: Segment, user: int) -> None:
    """Whether a segment was made here, by that user, in this version.  SegmentError says what is wrong and what to do."""
    name = segment.name or "without a name"
    remove = _how_to_remove(segment)
    if segment.size < at.HEADER_WORDS * at.WORD:
        raise SegmentError(name, f"it is truncated: {segment.size} bytes, less than a header", remove)
    load = Words(segment.memory).load
    if load(at.HEADER_MAGIC) != at.MAGIC:
        raise SegmentError(name, "it was not made by shlock", remove)
    if load(at.HEADER_VERSION) != at.VERSION:
        raise SegmentError(
            name,
            f"it has layout version {load(at.HEADER_VERSION)}, this shlock knows {at.VERSION}",
            "End the processes that use the other version, then run its 'shlock clean'.",
        )
    if (load(at.HEADER_BOOT), load(at.HEADER_BOOT + 1)) != _this_machine():
        raise SegmentError(name, "it is from another boot of a machine; its owners mean nothing here", remove)
    if load(at.HEADER_NAMESPACE) != SYSTEM.pid_namespace():
        raise SegmentError(
            name,
            f"it belongs to pid namespace {load(at.HEADER_NAMESPACE)}, this process is in {SYSTEM.pid_namespace()}",
            "A living owner would look dead from here: share locks inside one pid namespace (container) only.",
        )
    owner = os.fstat(segment.fd).st_uid
    if not load(at.HEADER_USER) == owner == user:
        raise SegmentError(
            name,
            f"it belongs to user {owner}, this process is of user {SYSTEM.geteuid()}",
            "Names are for the processes of one user: choose another domain.",
        )


def check_segment(segment: Segment, user: int) -> tuple[at.Layout, str | None]:
    """Layout and domain of a segment of a user, if it can be used here.  SegmentError says what is wrong and what to do."""
    check_place(segment, user)
    name, load = segment.name or "without a name", Words(segment.memory).load
    remove = _how_to_remove(segment)
    spots, processes, blocks, text = (
        load(place) for place in (at.HEADER_SPOTS, at.HEADER_PROCESSES, at.HEADER_BLOCKS, at.HEADER_TEXT)
    )
    layout = at.Layout(spots, processes, blocks, text, semaphores=bool(load(at.HEADER_SEMAPHORES)), data=load(at.HEADER_DATA))
    if (
        min(layout.spots, layout.processes, layout.blocks) < 1
        or layout.text % at.WORD
        or layout.data % at.PAGE
        or layout.size != segment.size
        or layout.tables != len(segment.memory)
    ):
        raise SegmentError(
            name, f"it is truncated or damaged: {segment.size} bytes, its header says {load(at.HEADER_SIZE)}", remove
        )
    if not layout.text and not load(at.HEADER_DOMAIN):
        return layout, None
    return layout, header_text(segment, at.HEADER_DOMAIN)


def header_text(segment: Segment, place: int) -> str:
    """A text in the header."""
    length, first = Words(segment.memory).load(place), (place + 1) * at.WORD
    return bytes(segment.memory[first : first + min(length, at.MAX_NAME)]).decode("utf-8", "replace")
