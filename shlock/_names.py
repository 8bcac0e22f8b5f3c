"""Primitives by name: a domain is a chain of segments in which names are found by hash.

Every process of one user that uses a domain attaches all of its segments.  A name is looked up without a lock and created
under a lock of the kernel's, which the kernel drops when its holder dies.

    N1  a name is visible only when its control block, its text and its place are complete: the hash is written last
    N2  a name never moves and is never removed while its segment has a name of its own
    N3  a segment is visible only when its header is complete: it gets its name last, in one step

    killed after                    the table says        outcome
    C1 text room taken              nothing               some bytes of text stay unused
    C2 block and text written       nothing               the next creator uses the same block
    C3 extensions taken             blocks without name   they stay unused
    C4 hash written                 the name              the name is there, its primitive in its first state
    C5 segment made, not published  nothing               the kernel frees it: it has no name yet
    C6 segment published            an empty segment      the next creator uses it
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote, unquote

from . import _layout as at
from . import _process
from ._arena import FIRST_BLOCKS, MOST_BLOCKS, Arena, Block, Declaration, extensions_for
from ._segment import BYTE_CREATING, PREFIX, Segment
from ._sys import SHM_FOLDER, SYSTEM, crash_points
from .errors import SegmentError

__all__ = [
    "DEFAULT_DOMAIN",
    "attach_file",
    "attach_named",
    "check_name",
    "checked",
    "domain_of",
    "name_at",
    "open_named",
    "segment_name",
    "text_of",
]

DEFAULT_DOMAIN: Final = "default"
CREATION_TIMEOUT: Final = 10.0  # seconds
FULL: Final = 9, 10  # a table is full when so much of it is used
STRETCH: Final = 64  # rows of a table that are looked at together
_ROW: Final = at.NAME_WORDS * at.WORD  # bytes
_FREE: Final = at.HASH_FREE.to_bytes(at.WORD, sys.byteorder)


_domains: dict[str, list[Arena]] = {}
_creation_descriptors: set[int] = set()


def _drop_copies() -> None:
    while _creation_descriptors:
        SYSTEM.close(_creation_descriptors.pop())


_process.refresh_in_child.append(_drop_copies)


# -- one segment ---------------------------------------------------------------------------------------------------------


def find(arena: Arena, name: bytes, number: int | None = None) -> int | None:
    """Index of the block of that name, whose hash is ``number``.  Takes no lock; bounded also when the table is damaged."""
    wanted = _hash(name) if number is None else number
    sought = wanted.to_bytes(at.WORD, sys.byteorder)
    for begin, rows in _stretches(arena, wanted):
        free = _row_with(_FREE, rows)
        row = _row_with(sought, rows)
        while 0 <= row < (free if free >= 0 else STRETCH):
            if name_at(arena, begin + row) == name:
                return begin + row
            row = _row_with(sought, rows, row + 1)
        if free >= 0:
            return None
    return None


def name_at(arena: Arena, index: int) -> bytes | None:
    """The name of a block, or None."""
    if arena.only_name is not None:
        return arena.only_name.encode()
    if not arena.layout.text:
        return None
    entry = arena.layout.name_table + index * at.NAME_WORDS
    if arena.words.load(entry + at.NAME_HASH) <= at.HASH_EXTENSION:
        return None
    place = arena.words.load(entry + at.NAME_TEXT)
    length, offset = place & 0xFFFF, place >> 16
    if offset + length > arena.layout.text:
        return None  # damaged: no name of anybody
    first = arena.layout.text_start * at.WORD + offset
    return bytes(arena.segment.memory[first : first + length])


def text_of(name: bytes) -> str:
    """A name as shown: the lock that a named Condition makes for itself stands behind a NUL."""
    return name.decode("utf-8", "replace").replace("\0", " (its ") + (")" if b"\0" in name else "")


def insert(arena: Arena, name: bytes, declaration: Declaration) -> int | None:
    """Create a name, under the creation lock.  None if this segment has no room."""
    words, table, blocks = arena.words, arena.layout.name_table, arena.layout.blocks
    count = 1 + extensions_for(declaration.cells)
    used = words.load(at.HEADER_NAMES_USED)
    text_used = words.load(at.HEADER_TEXT_USED)
    if used + count > blocks * FULL[0] // FULL[1] or text_used + len(name) > arena.layout.text:
        return None
    wanted = _hash(name)
    free = list(itertools.islice(_free_places(arena, wanted), count))
    if len(free) < count:
        return None
    if crash_points:
        crash_points[0]("N1 name: before the text is taken")
    words.store(at.HEADER_TEXT_USED, text_used + len(name))
    words.store(at.HEADER_NAMES_USED, used + count)
    if crash_points:
        crash_points[0]("C1 name: text room taken")
    first = arena.layout.text_start * at.WORD + text_used
    arena.segment.memory[first : first + len(name)] = name
    index, extensions = free[0], free[1:count]
    for extension in extensions:
        words.store(table + extension * at.NAME_WORDS + at.NAME_HASH, at.HASH_EXTENSION)
    if crash_points:
        crash_points[0]("C3 name: extensions taken")
    arena.declare(index, declaration, extensions)
    entry = table + index * at.NAME_WORDS
    words.store(entry + at.NAME_TEXT, text_used << 16 | len(name))
    if crash_points:
        crash_points[0]("C2 name: block and text written")
    # N1: an exchange, so that on every processor all of the above is visible before the hash is.
    words.compare_exchange(entry + at.NAME_HASH, at.HASH_FREE, wanted)
    if crash_points:
        crash_points[0]("C4 name: hash written")
    return index


def _free_places(arena: Arena, wanted: int) -> Iterator[int]:
    for begin, rows in _stretches(arena, wanted):
        row = _row_with(_FREE, rows)
        while row >= 0:
            yield begin + row
            row = _row_with(_FREE, rows, row + 1)


@contextlib.contextmanager
def creating(arena: Arena) -> Iterator[None]:
    """Hold the creation lock of the domain, between processes and threads alike.

    The lock belongs to a description of its own: a thread of this process is kept out too, and a child that is
    forked meanwhile drops its copy at once (``_drop_copies``).
    """
    descriptor = SYSTEM.open_segment_again(arena.segment.fd)
    _creation_descriptors.add(descriptor)
    try:
        deadline = SYSTEM.monotonic() + CREATION_TIMEOUT
        while not SYSTEM.lock_byte(descriptor, BYTE_CREATING, shared=False):
            if SYSTEM.monotonic() > deadline:
                raise SegmentError(
                    arena.segment.name,
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


def _hash(name: bytes) -> int:
    number = int.from_bytes(hashlib.blake2b(name, digest_size=at.WORD).digest(), "little")
    return number if number > at.HASH_EXTENSION + 1 else number + 4


def _stretches(arena: Arena, number: int) -> Iterator[tuple[int, bytes]]:
    """Copies of the table of names in pieces, from the row on that a hash gives, each row once; and where they begin."""
    view, table, size = arena.words.view, arena.layout.name_table, arena.layout.blocks
    first = number % size
    for begin, end in ((first, size), (0, first)):
        for start in range(begin, end, STRETCH):
            stop = min(start + STRETCH, end)
            yield start, bytes(view[table + start * at.NAME_WORDS : table + stop * at.NAME_WORDS])


def _row_with(number: bytes, rows: bytes, first: int = 0) -> int:
    """The next row that begins with the bytes of this hash, or -1."""
    place = rows.find(number, first * _ROW)
    while place % _ROW and place >= 0:
        place = rows.find(number, place + 1)
    return place // _ROW


# -- the chain -----------------------------------------------------------------------------------------------------------


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
        arena = attach_file(segment_name(domain, position))
        if arena is None:
            if arenas:
                return arenas
            arena = _publish(domain, 0)
        if len(arenas) == position:
            arenas.append(arena)


def attach_file(name: str, *, read_only: bool = False) -> Arena | None:
    """The arena in the file of that name; None if there is none.  SegmentError if it can't be used."""
    try:
        segment = Segment.attach(name, read_only=read_only)
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


def blocks_at(position: int) -> int:
    """How many blocks a segment of a domain has.  Each size from the third on comes twice, so that less stays unused."""
    return min(FIRST_BLOCKS * 4 << min(position, 1 + position // 2), MOST_BLOCKS)


def _publish(domain: str, position: int) -> Arena:
    """Create a segment of a domain, or attach to the one that somebody else has just created."""
    blocks = blocks_at(position)
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
        other = attach_file(name)
        if other is not None:
            return other


def attach_named(domain: str, name: str) -> Block:
    """The block of a name that exists."""
    for arena in _chain(domain):
        index = find(arena, name.encode())
        if index is not None:
            return arena.block(index, name)
    raise SegmentError(segment_name(domain), f"it has no {name!r} (any more)", "Create the primitive again.")


def open_named(domain: str, name: str, declaration: Declaration) -> Block:
    """The block of a name, created if there is none.  SegmentError if it exists as something else."""
    encoded = name.encode()
    arenas = _domains.get(domain) or _chain(domain)
    block = _find_among(arenas, name, encoded, declaration)
    if block is not None:
        return block
    with creating(arenas[0]):
        arenas = _chain(domain)
        block = _find_among(arenas, name, encoded, declaration)
        if block is not None:
            return block
        for arena in arenas:
            index = insert(arena, encoded, declaration)
            if index is not None:
                return arena.block(index, name)
        while True:
            arena = _publish(domain, len(arenas))
            arenas.append(arena)
            index = insert(arena, encoded, declaration)
            if index is not None:
                return arena.block(index, name)
            if arena.layout.blocks == MOST_BLOCKS:
                raise ValueError(f"{declaration.cells} permits or parties are more than one segment holds")


def _find_among(arenas: list[Arena], name: str, encoded: bytes, declaration: Declaration) -> Block | None:
    number = _hash(encoded)
    for arena in arenas:
        index = find(arena, encoded, number)
        if index is not None:
            return checked(arena, index, name, declaration)
    return None


def checked(arena: Arena, index: int, name: str, wanted: Declaration) -> Block:
    """The block there, if it is what is wanted.  SegmentError says what it is."""
    word, parameter = arena.kind_word(index), arena.parameter(index)
    kind = word & at.KIND
    if not at.FREE_BLOCK < kind < at.EXTENSION:
        raise arena.damaged(f"{name!r} is of no known kind ({kind})")
    there = Declaration(kind, 0, parameter, 0, bool(word & at.OWNED), (word & at.POLICY) >> at.POLICY_SHIFT)
    size = wanted.parameter or (parameter if kind == wanted.kind >= at.GUARDED else 0)  # of a buffer or RWLock: 0 = as it is
    asked = Declaration(wanted.kind, 0, size, 0, wanted.owned, there.policy if wanted.policy is None else wanted.policy)
    if wanted.lease and not word & at.LEASED:
        raise SegmentError(
            arena.segment.name,
            f"{name!r} is {describe(there)} without a lease there",
            "Who uses it has no contract: use another name or domain, or ask for no lease.",
        )
    if there != asked:
        raise different(arena.segment.name or "of the machine", name, there, asked)
    return arena.block(index, name)


def different(segment: str, name: str, there: Declaration, wanted: Declaration) -> SegmentError:
    return SegmentError(
        segment,
        f"{name!r} is {describe(there)} there, and {describe(wanted)} is wanted",
        "Use another name or domain, or ask for what is there.",
    )


def other_rights(name: str, *, is_writable: bool) -> ValueError:
    """This process has a name open with other rights than are wanted."""
    return ValueError(
        f"this process has {name!r} open {'for writing, too' if is_writable else 'for reading only'}. One process "
        "has one contract for it: ask for the same operations, or drop the other object first."
    )


def describe(declaration: Declaration) -> str:
    kind = at.KIND_NAMES[declaration.kind]
    words = [f"{'an' if kind[0] in 'ER' else 'a'} {kind}"]
    if declaration.kind in (at.SEMAPHORE, at.BOUNDED_SEMAPHORE):
        words.append(f"of {declaration.parameter}{', owned' if declaration.owned else ''}")
    elif declaration.kind == at.BARRIER:
        words.append(f"of {declaration.parameter} parties")
    elif declaration.kind == at.RWLOCK:
        words.append(f"of {declaration.parameter or at.USUAL_READERS} readers")
    elif declaration.kind >= at.GUARDED and declaration.parameter:
        words.append(f"of {declaration.parameter} bytes")
    policy = declaration.policy or 0
    if policy:
        words.append(f"with on_abandoned={at.POLICIES[policy]!r}" if policy < len(at.POLICIES) else "with an unknown policy")
    return " ".join(words)


def domain_of(file_name: str) -> str | None:
    """The domain in the file name of a segment of this user, as far as it can be read; None if it is none of ours."""
    prefix = f"{PREFIX}-{SYSTEM.geteuid()}-"
    return unquote(re.split("[+=]", file_name[len(prefix) :])[0]) if file_name.startswith(prefix) else None
