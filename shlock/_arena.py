"""The tables of one segment: control blocks and names; who may take and return them.

There are two sorts of arena, with one layout.

*Without a name.*  Made by a process for its own anonymous primitives; only that process ever takes a block of it, so
taking and returning is a matter of one process and a crash leaves nothing to repair.  Children inherit the mapping by
fork, or get the descriptor while they are spawned.  The kernel frees the segment when its last process is gone.  A block
is used again only if no other process can know it: it was neither pickled, nor did a fork happen since it was made.

*A domain.*  A chain of named segments that every process of one user attaches on first use.  A name is looked up without a
lock and created under a lock of the kernel's, which the kernel drops when its holder dies.

    N1  a name is visible only when its control block, its text and its place are complete: the hash is written last
    N2  a name never moves and is never removed while its segment has a name

    killed after                    the table says        outcome
    C1 text room taken              nothing               some bytes of text stay unused
    C2 block and text written       nothing               the next creator uses the same block
    C3 extensions taken             blocks without name   they stay unused
    C4 hash written                 the name              the name is there, its primitive in its first state
    C5 segment made, not published  nothing               the kernel frees it: it has no name yet
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import secrets
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import context as mp_context
from multiprocessing import process as mp_process
from multiprocessing import reduction, util
from typing import Any, Final
from urllib.parse import quote, unquote

from . import _layout as at
from . import _process
from ._atomic import Words
from ._segment import BYTE_CREATING, Segment
from ._sys import SHM_FOLDER, SYSTEM, crash_points
from .errors import SegmentError

__all__ = ["Arena", "Block", "Declaration", "allocate", "attach_inherited", "check_name", "open_named"]

SPOTS: Final = 1024  # threads that can be blocked in one arena at the same time
PROCESSES: Final = 128  # names of processes that are remembered
FIRST_BLOCKS: Final = 256
MOST_BLOCKS: Final = 16384  # every further segment is twice as large as the one before, up to this
TEXT_PER_BLOCK: Final = 40  # bytes of name, on average
DEFAULT_DOMAIN: Final = "default"
PREFIX: Final = "shlock"
CREATION_TIMEOUT: Final = 10.0  # seconds


@dataclass(frozen=True)
class Declaration:
    """What a primitive is when it is new."""

    kind: int
    first_word: int = 0
    parameter: int = 0  # Semaphore: its bound or first value; Barrier: its parties
    cells: int = 0  # further words: permits of an owned Semaphore, parties of a Barrier
    owned: bool = False
    policy: int | None = None  # None: as it is, "warn" if it is new

    def kind_word(self) -> int:
        return self.kind | (self.policy or 0) << at.POLICY_SHIFT | (at.OWNED if self.owned else 0)


class Block:
    """One control block, as one process holds it.  All objects of a process for the same primitive share it.

    ``local`` is for what the primitive remembers in this process.  When the last reference goes, an anonymous block that
    no other process can know is free for the next primitive.
    """

    __slots__ = ("__weakref__", "arena", "cells", "declaration", "exported", "forks", "index", "local", "name", "start")

    def __init__(self, arena: Arena, index: int, name: str | None, cells: Sequence[int]) -> None:
        self.arena = arena
        self.index = index
        self.name = name
        self.start = arena.layout.block(index)
        self.cells = cells
        self.exported = False
        self.forks = _forks
        self.local: Any = None

    @property
    def word(self) -> int:
        """Index of W among the words of the arena."""
        return self.start + at.BLOCK_WORD

    @property
    def kind(self) -> int:
        return self.arena.words.load(self.start + at.BLOCK_KIND) & at.KIND

    @property
    def policy(self) -> int:
        return (self.arena.words.load(self.start + at.BLOCK_KIND) & at.POLICY) >> at.POLICY_SHIFT

    @property
    def owned(self) -> bool:
        return bool(self.arena.words.load(self.start + at.BLOCK_KIND) & at.OWNED)

    @property
    def parameter(self) -> int:
        return self.arena.words.load(self.start + at.BLOCK_PARAMETER)

    def __del__(self) -> None:
        arena = self.arena
        if arena.creator is _process.current and self.forks == _forks and not self.exported:
            arena.take_back(self.index)

    def reduce(self) -> tuple[Any, ...]:
        """What another process needs to attach: a name, or, while a process is being spawned, the descriptor."""
        if self.name is not None:
            return attach_named, (self.arena.domain, self.name)
        self.exported = True
        return attach_inherited, (self.arena.duplicate_for_child(), self.arena.identity, self.index)


#: Counted up before and after every fork: a block that was made at another count may be known to a child.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


_process.before_fork.append(_count_fork)


class Arena:
    """One mapped segment with its tables.  Everything about a segment that could be wrong is checked on attach."""

    def __init__(self, segment: Segment, layout: at.Layout, domain: str | None) -> None:
        self.segment = segment
        self.layout = layout
        self.domain = domain
        self.words = Words(segment.memory)
        self.identity = self.words.load(at.HEADER_IDENTITY)
        self.creator: _process.ProcessIdentity | None = None  # of an arena without a name
        self.parking: Any = None  # made by _parking on first use
        self._returned: list[int] = []
        self._unused = itertools.count()
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
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
            (at.HEADER_MAGIC, at.MAGIC),
        ):
            words.store(place, value)
        if domain is not None:
            encoded = domain.encode()
            words.store(at.HEADER_DOMAIN, len(encoded))
            first = (at.HEADER_DOMAIN + 1) * at.WORD
            segment.memory[first : first + len(encoded)] = encoded
            # As the number of an extension, 0 means "none": block 0 is never used here.
            words.store(layout.name_table + at.NAME_HASH, at.HASH_EXTENSION)
        arena = cls(segment, layout, domain)
        arena.creator = _process.current
        return arena

    @classmethod
    def over(cls, segment: Segment) -> Arena:
        """The arena in a segment that somebody else made, after checking that it is one."""
        layout, domain = check_segment(segment)
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
        extension = self.words.load(self.layout.block(index) + at.BLOCK_MORE)
        self.words.store(self.layout.block(index) + at.BLOCK_KIND, at.FREE_BLOCK)
        self._returned.append(index)
        while extension:
            following = self.words.load(self.layout.block(extension) + at.EXTENSION_NEXT)
            self._returned.append(extension)
            extension = following

    def clear_block(self, index: int) -> None:
        first = self.layout.block(index)
        self.words.view[first : first + at.BLOCK_WORDS] = _ZERO_BLOCK

    def declare(self, index: int, declaration: Declaration, extensions: Sequence[int]) -> None:
        """Write the first state of a primitive into a block that nobody else can see yet."""
        self.clear_block(index)
        start, store = self.layout.block(index), self.words.store
        store(start + at.BLOCK_WORD, declaration.first_word)
        store(start + at.BLOCK_PARAMETER, declaration.parameter)
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

    def cells_of(self, index: int) -> list[int]:
        """Indices of the cell words of a block.  SegmentError if the chain of extensions is damaged."""
        start = self.layout.block(index)
        kind_word, parameter = self.words.load(start + at.BLOCK_KIND), self.words.load(start + at.BLOCK_PARAMETER)
        count = parameter if kind_word & at.KIND == at.BARRIER or kind_word & at.OWNED else 0
        if count > self.layout.blocks * at.EXTENSION_CELL_COUNT:
            raise self.damaged(f"block {index} claims {count} cells, more than there are")
        cells = list(range(start + at.BLOCK_CELLS, start + at.BLOCK_CELLS + min(count, at.BLOCK_CELL_COUNT)))
        extension = self.words.load(start + at.BLOCK_MORE)
        while len(cells) < count:
            if not 0 < extension < self.layout.blocks:
                raise self.damaged(f"the cells of block {index} end after {len(cells)} of {count}")
            first = self.layout.block(extension) + at.EXTENSION_CELLS
            cells += range(first, first + min(count - len(cells), at.EXTENSION_CELL_COUNT))
            extension = self.words.load(self.layout.block(extension) + at.EXTENSION_NEXT)
        return cells

    def duplicate_for_child(self) -> Any:
        """The descriptor, wrapped for the process that is just being spawned; the same for all that refers to this arena."""
        passed = _passed.setdefault(mp_context.get_spawning_popen(), {})
        if self.identity not in passed:
            passed[self.identity] = reduction.DupFd(self.segment.fd)
        return passed[self.identity]

    # -- names --------------------------------------------------------------------------------------------------------

    def find(self, name: bytes) -> int | None:
        """Index of the block of that name.  Takes no lock; bounded also when the table is damaged."""
        table, blocks, load = self.layout.name_table, self.layout.blocks, self.words.load
        wanted = _hash(name)
        for index in _probe(wanted, blocks):
            seen = load(table + index * at.NAME_WORDS + at.NAME_HASH)
            if seen == at.HASH_FREE:
                return None
            if seen == wanted and self.name_at(index) == name:
                return index
        return None

    def name_at(self, index: int) -> bytes | None:
        """The name of a block, or None."""
        if not self.layout.text:
            return None
        entry = self.layout.name_table + index * at.NAME_WORDS
        if self.words.load(entry + at.NAME_HASH) <= at.HASH_EXTENSION:
            return None
        place = self.words.load(entry + at.NAME_TEXT)
        length, offset = place & 0xFFFF, place >> 16
        if offset + length > self.layout.text:
            return None  # damaged: no name of anybody
        first = self.layout.text_start * at.WORD + offset
        return bytes(self.segment.memory[first : first + length])

    def insert(self, name: bytes, declaration: Declaration) -> int | None:
        """Create a name, under the creation lock.  None if this segment has no room."""
        words, table, blocks = self.words, self.layout.name_table, self.layout.blocks
        count = 1 + _extensions(declaration.cells)
        used = words.load(at.HEADER_NAMES_USED)
        text_used = words.load(at.HEADER_TEXT_USED)
        if used + count > blocks * 7 // 8 or text_used + len(name) > self.layout.text:
            return None
        wanted = _hash(name)
        free = list(itertools.islice(self._free_places(wanted), count))
        if len(free) < count:
            return None
        if crash_points:
            crash_points[0]("N1 name: before the text is taken")
        words.store(at.HEADER_TEXT_USED, text_used + len(name))
        words.store(at.HEADER_NAMES_USED, used + count)
        if crash_points:
            crash_points[0]("C1 name: text room taken")
        first = self.layout.text_start * at.WORD + text_used
        self.segment.memory[first : first + len(name)] = name
        index, extensions = free[0], free[1:count]
        for extension in extensions:
            words.store(table + extension * at.NAME_WORDS + at.NAME_HASH, at.HASH_EXTENSION)
        if crash_points:
            crash_points[0]("C3 name: extensions taken")
        self.declare(index, declaration, extensions)
        entry = table + index * at.NAME_WORDS
        words.store(entry + at.NAME_TEXT, text_used << 16 | len(name))
        if crash_points:
            crash_points[0]("C2 name: block and text written")
        # N1: an exchange, so that on every processor all of the above is visible before the hash is.
        words.compare_exchange(entry + at.NAME_HASH, at.HASH_FREE, wanted)
        if crash_points:
            crash_points[0]("C4 name: hash written")
        return index

    def _free_places(self, wanted: int) -> Iterator[int]:
        table = self.layout.name_table
        for index in _probe(wanted, self.layout.blocks):
            if self.words.load(table + index * at.NAME_WORDS + at.NAME_HASH) == at.HASH_FREE:
                yield index

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """Hold the creation lock of the domain, between processes and threads alike.

        The lock belongs to a description of its own: a thread of this process is kept out too, and a child that is
        forked meanwhile drops its copy at once (``_drop_copies``).
        """
        descriptor = SYSTEM.open_segment_again(self.segment.fd)
        _creation_descriptors.add(descriptor)
        try:
            deadline = SYSTEM.monotonic() + CREATION_TIMEOUT
            while not SYSTEM.lock_byte(descriptor, BYTE_CREATING, shared=False):
                if SYSTEM.monotonic() > deadline:
                    raise SegmentError(
                        self.segment.name,
                        f"a process has been creating a name for {CREATION_TIMEOUT:.0f} s and does not go on",
                        "Is one of its users stopped (state T in ps)? Let it run, or end it.",
                    )
                SYSTEM.nap(0.0005)
            yield
        finally:
            if descriptor in _creation_descriptors:  # not so in a forked child
                _creation_descriptors.discard(descriptor)
                SYSTEM.unlock_byte(descriptor, BYTE_CREATING)
                SYSTEM.close(descriptor)

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

    def processes(self) -> list[int]:
        """The identity words that are recorded."""
        first = self.layout.process_table
        return [w for row in range(self.layout.processes) if (w := self.words.load(first + row * at.PROCESS_WORDS))]

    def damaged(self, fact: str) -> SegmentError:
        return SegmentError(
            self.segment.name or "without a name",
            fact,
            "Its contents were overwritten by something else. End the processes that use it, then run 'shlock clean'.",
        )


_ZERO_BLOCK = memoryview(bytes(at.BLOCK_WORDS * at.WORD)).cast("Q")


def _extensions(cells: int) -> int:
    """How many extension blocks that many cells need."""
    return max(0, -(-(cells - at.BLOCK_CELL_COUNT) // at.EXTENSION_CELL_COUNT))


def _hash(name: bytes) -> int:
    number = int.from_bytes(hashlib.blake2b(name, digest_size=at.WORD).digest(), "little")
    return number if number > at.HASH_EXTENSION + 1 else number + 4


def _probe(number: int, size: int) -> Iterator[int]:
    """Every index of a table once, from the one that a hash gives."""
    first = number % size
    yield from range(first, size)
    yield from range(first)


# -- anonymous primitives -------------------------------------------------------------------------------------------------

_own: Arena | None = None
#: What each process that is being spawned is given already: multiprocessing passes a descriptor only once.
_passed: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
_attached: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()


def allocate(declaration: Declaration) -> Block:
    """A block for a new primitive without a name.  OSError if there is no memory for a further segment."""
    global _own
    needed = 1 + _extensions(declaration.cells)
    if needed >= MOST_BLOCKS:
        raise ValueError(f"{declaration.cells} permits or parties are more than one segment holds")
    arena = _own
    if arena is None or arena.creator is not _process.current:
        arena = _own = _new_own(FIRST_BLOCKS, needed)
    taken: list[int] = []
    while len(taken) < needed:
        index = arena.take_block()
        if index is None:
            for unneeded in taken:
                arena.take_back(unneeded)
            taken.clear()
            # Threads that come here at the same time make one segment each; all of them are used.
            arena = _own = _new_own(min(arena.layout.blocks * 2, MOST_BLOCKS), needed)
        elif index or not taken:
            taken.append(index)
    arena.declare(taken[0], declaration, taken[1:])
    return arena.block(taken[0])


def _new_own(blocks: int, needed: int) -> Arena:
    while blocks < 2 * needed:
        blocks *= 2
    arena = Arena.create(blocks)
    _attached[arena.identity] = arena
    return arena


def attach_inherited(duplicate: Any, identity: int, index: int) -> Block:
    """Attach to an anonymous primitive in a process that is being spawned."""
    fd: int = duplicate.detach()
    arena = _attached.get(identity)
    if arena is None:
        SYSTEM.set_cloexec(fd)
        arena = Arena.over(Segment(fd))
        if arena.identity != identity:
            raise arena.damaged("it is not the segment that the parent process meant")
        _attached[identity] = arena
    elif fd != arena.segment.fd:
        SYSTEM.close(fd)
    if not 0 <= index < arena.layout.blocks:
        raise arena.damaged(f"it has no block {index}")
    block = arena.block(index)
    block.exported = True
    return block


# -- primitives by name ---------------------------------------------------------------------------------------------------

_domains: dict[str, list[Arena]] = {}
_creation_descriptors: set[int] = set()


def _drop_copies() -> None:
    while _creation_descriptors:
        SYSTEM.close(_creation_descriptors.pop())


_process.refresh_in_child.append(_drop_copies)


def check_name(name: Any, what: str = "name") -> str:
    """A name of a primitive or a domain, checked: str, not empty, at most 200 bytes of UTF-8, no NUL."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, not {type(name).__name__}")
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {name!r} cannot be written in UTF-8: {error.reason}") from None
    if not name or length > at.MAX_NAME or "\0" in name:
        raise ValueError(f"{what} must have 1 to {at.MAX_NAME} bytes in UTF-8 and no NUL: {name[:40]!r} has {length} bytes")
    return name


def segment_name(domain: str, position: int = 0) -> str:
    """File name of a segment of a domain.  Every user has names of his own."""
    quoted = quote(domain, safe="")
    if len(quoted) > 150:
        quoted = f"{quoted[:100]}~{hashlib.blake2b(domain.encode(), digest_size=16).hexdigest()}"
    return f"{PREFIX}-{SYSTEM.geteuid()}-{quoted}" + (f"+{position}" if position else "")


def _chain(domain: str) -> list[Arena]:
    """The segments of a domain, in order; at least one.  Attaches what others have added."""
    arenas = _domains.setdefault(domain, [])
    while True:
        position = len(arenas)
        arena = _attach(segment_name(domain, position))
        if arena is None:
            if arenas:
                return arenas
            arena = _publish(domain, 0)
        if len(arenas) == position:
            arenas.append(arena)


def _attach(name: str) -> Arena | None:
    try:
        segment = Segment.attach(name)
    except PermissionError:
        owner = os.stat(f"{SHM_FOLDER}/{name}", follow_symlinks=False).st_uid
        raise SegmentError(
            name, f"it belongs to user {owner}", "Names are for the processes of one user: choose another domain."
        ) from None
    except SegmentError:
        raise
    except OSError as error:
        raise SegmentError(name, f"it cannot be opened: {error.strerror}", f"Look at {SHM_FOLDER}/{name}.") from error
    return None if segment is None else Arena.over(segment)


def _publish(domain: str, position: int) -> Arena:
    """Create a segment of a domain, or attach to the one that somebody else has just created."""
    blocks = min(FIRST_BLOCKS * 4 << position, MOST_BLOCKS)
    name = segment_name(domain, position)
    while True:
        arena = Arena.create(blocks, domain)
        if crash_points:
            crash_points[0]("C5 segment: made, not published")
        if arena.segment.publish(name):
            arena.creator = None
            if crash_points:
                crash_points[0]("C6 segment: published")
            return arena
        other = _attach(name)
        if other is not None:
            return other


def attach_named(domain: str, name: str) -> Block:
    """The block of a name that exists."""
    for arena in _chain(domain):
        index = arena.find(name.encode())
        if index is not None:
            return arena.block(index, name)
    raise SegmentError(segment_name(domain), f"it has no {name!r} (any more)", "Create the primitive again.")


def open_named(domain: str, name: str, declaration: Declaration) -> Block:
    """The block of a name, created if there is none.  SegmentError if it exists as something else."""
    encoded = name.encode()
    arenas = _chain(domain)
    for arena in arenas:
        index = arena.find(encoded)
        if index is not None:
            return _checked(arena, index, name, declaration)
    with arenas[0].creating():
        arenas = _chain(domain)
        for arena in arenas:
            index = arena.find(encoded)
            if index is not None:
                return _checked(arena, index, name, declaration)
        for arena in arenas:
            index = arena.insert(encoded, declaration)
            if index is not None:
                return arena.block(index, name)
        while True:
            arena = _publish(domain, len(arenas))
            arenas.append(arena)
            index = arena.insert(encoded, declaration)
            if index is not None:
                return arena.block(index, name)
            if arena.layout.blocks == MOST_BLOCKS:
                raise ValueError(f"{declaration.cells} permits or parties are more than one segment holds")


def _checked(arena: Arena, index: int, name: str, wanted: Declaration) -> Block:
    start = arena.layout.block(index)
    word, parameter = arena.words.load(start + at.BLOCK_KIND), arena.words.load(start + at.BLOCK_PARAMETER)
    kind = word & at.KIND
    if not at.FREE_BLOCK < kind < at.EXTENSION:
        raise arena.damaged(f"{name!r} is of no known kind ({kind})")
    there = Declaration(kind, 0, parameter, 0, bool(word & at.OWNED), (word & at.POLICY) >> at.POLICY_SHIFT)
    asked = Declaration(
        wanted.kind, 0, wanted.parameter, 0, wanted.owned, there.policy if wanted.policy is None else wanted.policy
    )
    if there != asked:
        raise SegmentError(
            arena.segment.name,
            f"{name!r} is {describe(there)} there, and {describe(asked)} is wanted",
            "Use another name or domain, or ask for what is there.",
        )
    return arena.block(index, name)


def describe(declaration: Declaration) -> str:
    kind = at.KIND_NAMES[declaration.kind]
    words = [f"{'an' if kind[0] in 'ER' else 'a'} {kind}"]
    if declaration.kind in (at.SEMAPHORE, at.BOUNDED_SEMAPHORE):
        words.append(f"of {declaration.parameter}{', owned' if declaration.owned else ''}")
    elif declaration.kind == at.BARRIER:
        words.append(f"of {declaration.parameter} parties")
    policy = declaration.policy or 0
    if policy:
        words.append(f"with on_abandoned={at.POLICIES[policy]!r}" if policy < len(at.POLICIES) else "with an unknown policy")
    return " ".join(words)


# -- checking a segment ---------------------------------------------------------------------------------------------------


@functools.cache
def _this_machine() -> tuple[int, int]:
    boot = SYSTEM.boot_id()
    return int.from_bytes(boot[:8], "little"), int.from_bytes(boot[8:], "little")


def check_segment(segment: Segment, *, any_user: bool = False) -> tuple[at.Layout, str | None]:
    """Layout and domain of a segment, if it can be used here.  SegmentError says what is wrong and what to do."""
    name = segment.name or "without a name"
    remove = f"If nobody needs it, remove {SHM_FOLDER}/{segment.name} by hand." if segment.name else "Nothing to do."
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
    if not any_user and not load(at.HEADER_USER) == owner == SYSTEM.geteuid():
        raise SegmentError(
            name,
            f"it belongs to user {owner}, this process is of user {SYSTEM.geteuid()}",
            "Names are for the processes of one user: choose another domain.",
        )
    layout = at.Layout(load(at.HEADER_SPOTS), load(at.HEADER_PROCESSES), load(at.HEADER_BLOCKS), load(at.HEADER_TEXT))
    if min(layout.spots, layout.processes, layout.blocks) < 1 or layout.text % at.WORD or layout.size != segment.size:
        raise SegmentError(
            name, f"it is truncated or damaged: {segment.size} bytes, its header says {load(at.HEADER_SIZE)}", remove
        )
    if not layout.text:
        return layout, None
    length, first = load(at.HEADER_DOMAIN), (at.HEADER_DOMAIN + 1) * at.WORD
    return layout, bytes(segment.memory[first : first + min(length, at.MAX_NAME)]).decode("utf-8", "replace")


def domain_of(file_name: str) -> str | None:
    """The domain in the file name of a segment of this user, as far as it can be read; None if it is none of ours."""
    prefix = f"{PREFIX}-{SYSTEM.geteuid()}-"
    return unquote(file_name[len(prefix) :].split("+")[0]) if file_name.startswith(prefix) else None
